"""Time and peak memory of PCT-Net or FMUNet beside MIS-FM's: forward pass, backward pass and training step.

    python benchmarks/network_speed.py pct_net|fmunet [--peers FOLDER] [--device cpu|cuda] [--size 64 64 64] [--batch 2]
        [--repeats 5] [--precisions fp32 bf16]

All contenders have the published sizes, one output and 5 classes:

- MIS-FM as released (single precision, not compiled), and the same network in channels-last memory format;
- ours as VFPretrainTrainer trains it: in single precision in both memory formats, in bf16 in the network's default
  format, with ``--compile`` also compiled.

A training step is the forward pass, nnU-Net's Dice and cross-entropy loss, the backward pass and Adam; ours has the
trainer's fused optimiser, gradient clipping and check for non-finite gradients. On CUDA MIS-FM's single-precision
convolutions run in TF32, which is torch's default; ours in the same precision is "tf32", and "fp32" is exact.

Peak memory is measured over a training step: on CUDA the memory that torch allocated for the contender, weights
included; on the CPU the growth of the resident set, each contender in a process of its own.

Duration: on 2 CPU cores 7 minutes (PCT-Net) and 18 (FMUNet in fp32; bf16 takes much longer on many CPUs). Needs: for
MIS-FM ``pip install einops`` (PCT-Net) or ``PyMIC`` in ``--peers`` (FMUNet); with ``--device cuda`` a GPU.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import (
    by,
    describe_device,
    find_peer,
    make_parser,
    median_and_range,
    median_ratio,
    report,
    take_turns,
    wait_for_device,
)
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunetv2_vf import fmunet, pct_net
from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training.optimizer import make_optimizer
from nnunetv2_vf.training.step import Precision, take_step

NETWORKS = {"pct_net": pct_net.PCTNet, "fmunet": fmunet.FMUNet}
FEATURES = {"pct_net": pct_net.PUBLISHED_FEATURES, "fmunet": fmunet.PUBLISHED_FEATURES}
NEEDED_PEERS = {"pct_net": ("MIS-FM",), "fmunet": ("MIS-FM", "PyMIC")}  # MIS-FM's FMUNet imports PyMIC
CLASSES = 5
PRECISIONS = ("fp32", "bf16")
MISFM = "MIS-FM, fp32"


class Contender:
    """A network on a device and its training step. This class trains as MIS-FM does."""

    def __init__(self, network: nn.Module, device: str, input_format: torch.memory_format = torch.contiguous_format):
        self.network = network.to(device).train()
        self.input_format = input_format
        dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Optimizer:
        return torch.optim.Adam(self.network.parameters(), 1e-3, weight_decay=1e-5)

    def set_float32_precision(self) -> None:
        """Set the precision of the whole process; torch's defaults here."""
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def compute_loss(self, x: Tensor, target: Tensor) -> Tensor:
        with self.autocast():
            return self.loss(self.network(x), target)

    def forward(self, x: Tensor, target: Tensor) -> None:
        with torch.no_grad(), self.autocast():
            self.network(x)

    def forward_and_backward(self, x: Tensor, target: Tensor) -> None:
        with self.autocast():
            output = self.network(x)
        output.float().square().mean().backward()
        self.optimizer.zero_grad()

    def training_step(self, x: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        self.compute_loss(x, target).backward()
        self.optimizer.step()


class OurContender(Contender):
    """Trains as VFPretrainTrainer does."""

    def __init__(self, network: nn.Module, device: str, precision: str):
        self.precision = Precision(precision, device)
        self.scaler = self.precision.scaler()
        super().__init__(network, device)

    def make_optimizer(self) -> Optimizer:
        return make_optimizer(self.network.parameters(), VFSettings(), fused=True)

    def set_float32_precision(self) -> None:
        self.precision.set_float32_precision()

    def autocast(self) -> AbstractContextManager[Any]:
        return self.precision.autocast()

    def training_step(self, x: Tensor, target: Tensor) -> None:
        take_step(self.compute_loss(x, target), self.network, self.optimizer, self.scaler)


TASKS = {"forward": "forward", "forward + backward": "forward_and_backward", "training step": "training_step"}


def main() -> None:
    parser = make_parser(__doc__, device=True, peers=("MIS-FM", "PyMIC"), output=True)
    parser.add_argument("network", choices=[*NETWORKS])
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 64), metavar=("D", "H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of our networks")
    parser.add_argument("--compile", action="store_true", help="also measure ours with torch.compile")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # in the process whose memory is measured
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = True  # as nnU-Net
    makers = contender_makers(args)
    x = torch.randn(args.batch, 1, *args.size, device=args.device)
    target = torch.randint(0, CLASSES, x.shape, device=args.device)
    if args.memory_of:
        print(measure_peak(makers[args.memory_of](), x, target, already_allocated=0))
        return
    contenders: dict[str, Contender] = {}
    peaks: dict[str, float] = {}
    for name, make in makers.items():
        allocated = torch.cuda.memory_allocated() if x.is_cuda else 0
        contenders[name] = make()
        peaks[name] = measure_peak(contenders[name], x, target, allocated) if x.is_cuda else peak_in_new_process(name)
        print(f"{name}: {peaks[name]:.2f} GB", flush=True)
    seconds = {
        task: take_turns(
            {name: make_run(contender, task, x, target) for name, contender in contenders.items()}, args.repeats
        )
        for task in TASKS
    }
    reference = MISFM if MISFM in contenders else next(iter(contenders))
    rows = [
        {
            "": name,
            **{f"{task}, s": median_and_range(seconds[task][name], digits=3) for task in TASKS},
            **{
                f"{task} / {reference}": f"{median_ratio(seconds[task][name], seconds[task][reference]):.2f}"
                for task in TASKS
            },
            "peak, GB": f"{peaks[name]:.2f}",
        }
        for name in contenders
    ]
    about = f"batch {args.batch} of {by(args.size)}, {describe_device(args.device)}: median (range)"
    report(args, f"network_speed_{args.network}_{args.device}", about, rows, seconds=seconds, peak_gb=peaks)


def contender_makers(args: argparse.Namespace) -> dict[str, Callable[[], Contender]]:
    """Return, by name, a function that makes each contender."""

    def ours(precision: str, compiled: bool = False, **layout: bool) -> Contender:
        network = NETWORKS[args.network](1, FEATURES[args.network], MODES[0], CLASSES, **layout)
        return OurContender(torch.compile(network) if compiled else network, args.device, precision)

    def misfm(memory_format: torch.memory_format) -> Contender:
        network = load_misfm(args).to(memory_format=memory_format)
        return Contender(network, args.device, memory_format)

    makers: dict[str, Callable[[], Contender]] = {}
    if all(find_peer(args.peers, name) for name in NEEDED_PEERS[args.network]):
        makers[MISFM] = functools.partial(misfm, torch.contiguous_format)
        makers[f"{MISFM}, channels-last"] = functools.partial(misfm, torch.channels_last_3d)
    if "fp32" in args.precisions:
        makers["ours, fp32, channels-last"] = functools.partial(ours, "fp32", channels_last=True)
        makers["ours, fp32, contiguous"] = functools.partial(ours, "fp32", channels_last=False)
        if args.device == "cuda":
            makers["ours, tf32"] = functools.partial(ours, "tf32")
    if "bf16" in args.precisions:
        makers["ours, bf16"] = functools.partial(ours, "bf16")
        if args.compile:
            makers["ours, bf16, compiled"] = functools.partial(ours, "bf16", compiled=True)
    return makers


def load_misfm(args: argparse.Namespace) -> nn.Module:
    """Return MIS-FM's network with one output, as released."""
    sys.path[:0] = [str(find_peer(args.peers, name)) for name in NEEDED_PEERS[args.network]]
    parameters = {"in_chns": 1, "class_num": CLASSES, "feature_chns": list(FEATURES[args.network])}
    if args.network == "fmunet":
        from net.fmunet import FMUNet as MisfmFMUNet

        return MisfmFMUNet({**parameters, "multiscale_pred": False})
    from net.pct_net import PCTNet as MisfmPCTNet

    return MisfmPCTNet({**parameters, "input_size": list(args.size)})


def make_run(contender: Contender, task: str, x: Tensor, target: Tensor) -> Callable[[], None]:
    """Return a function that does a task once and waits until the device has finished."""
    x = x.contiguous(memory_format=contender.input_format)
    method = getattr(contender, TASKS[task])

    def run() -> None:
        contender.set_float32_precision()
        method(x, target)
        wait_for_device(x.device)

    return run


# ---------------------------------------------------------------- memory


def peak_in_new_process(name: str) -> float:
    """Return the peak in GiB, measured where no other contender has grown the resident set."""
    command = [sys.executable, "-W", "ignore", *sys.argv, "--memory-of", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def measure_peak(contender: Contender, x: Tensor, target: Tensor, already_allocated: int) -> float:
    """Return the peak in GiB of a contender's second training step; the first creates Adam's state.

    Args:
        already_allocated: bytes on the GPU that were allocated before the contender was made.
    """
    step = make_run(contender, "training step", x, target)
    before = resident_kib("VmRSS")
    step()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step()
    if x.is_cuda:
        return (torch.cuda.max_memory_allocated() - already_allocated) / 2**30
    return (resident_kib("VmHWM") - before) / 2**20


def resident_kib(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the largest so far) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
