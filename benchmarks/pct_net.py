"""PCT-Net side by side with MIS-FM's: time and peak memory of forward pass, backward pass and training step.

    python benchmarks/pct_net.py [--mis-fm PATH] [--device cpu|cuda] [--size 64 64 64] [--batch 2] [--repeats 5]

PATH is a checkout of openmedlab/MIS-FM (which also needs pip install einops); without it ours runs alone. The same
published sizes, one output, 5 classes. Contenders: MIS-FM as released, single precision, eager, and the same
channels-last; ours as a plan builds it and as VFPretrainTrainer trains it, in single precision and in bf16, and with
``--compile`` compiled. A training step is the forward pass, nnU-Net's Dice and cross-entropy, the backward pass and
Adam; ours is the trainer's, with its fused optimiser, clipping and look at whether the gradient is finite. Prints
Markdown tables; writes ``docs/pct_net_DEVICE.json``.

On CUDA, torch's defaults let the convolutions of MIS-FM's single precision be computed in TF32. Ours does that as
"tf32"; its "fp32" is exact. cuDNN looks for the fastest kernels, as nnU-Net has it.

Peak memory is of a training step: on CUDA what torch allocated since before the contender was made, weights included;
on the CPU the growth of the resident set, each contender's in a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from side_by_side import DOCS, alternate, machine, ratio, report, summary
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training.optimizer import make_optimizer
from nnunetv2_vf.training.step import Precision, take_step

CLASSES = 5
THEIRS = "MIS-FM, fp32"


class Contender:
    """A network on a device, with what a training step of it needs; this one trains as MIS-FM does."""

    def __init__(self, network: nn.Module, device: torch.device, channels_last: bool = False):
        self.network = network.to(device).train()
        self.layout = torch.channels_last_3d if channels_last else torch.contiguous_format  # of the input
        dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
        self.optimizer = self.make_optimizer()

    def make_optimizer(self) -> Optimizer:
        return torch.optim.Adam(self.network.parameters(), 1e-3, weight_decay=1e-5)

    def use_settings(self) -> None:
        """Set what the process has but one of; here to torch's defaults."""
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

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
        self.loss_of(x, target).backward()
        self.optimizer.step()

    def loss_of(self, x: Tensor, target: Tensor) -> Tensor:
        with self.autocast():
            return self.loss(self.network(x), target)


class Ours(Contender):
    """Trains as VFPretrainTrainer does."""

    def __init__(self, network: nn.Module, device: torch.device, precision: str):
        self.precision = Precision(precision, device.type)
        self.scaler = self.precision.scaler()
        super().__init__(network, device)

    def make_optimizer(self) -> Optimizer:
        return make_optimizer(self.network.parameters(), VFSettings(), fused=True)

    def use_settings(self) -> None:
        self.precision.set_float32_precision()

    def autocast(self) -> AbstractContextManager[Any]:
        return self.precision.autocast()

    def training_step(self, x: Tensor, target: Tensor) -> None:
        take_step(self.loss_of(x, target), self.network, self.optimizer, self.scaler)


# By name, so that a contender's own method is called.
TASKS = {"forward": "forward", "forward + backward": "forward_and_backward", "training step": "training_step"}
Makers = dict[str, Callable[[], Contender]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mis-fm", type=Path, metavar="PATH")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 64))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # for the process whose memory is measured
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    makers = contenders(device, args.size, args.mis_fm, args.compile)
    x = torch.randn(args.batch, 1, *args.size, device=device)
    target = torch.randint(0, CLASSES, x.shape, device=device)
    if args.memory_of:
        print(peak_memory(makers[args.memory_of](), x, target, 0))
        return
    made: dict[str, Contender] = {}
    peaks: dict[str, float] = {}
    for name, make in makers.items():
        before = torch.cuda.memory_allocated() if x.is_cuda else 0
        made[name] = make()
        peaks[name] = peak_memory(made[name], x, target, before) if x.is_cuda else peak_memory_apart(name)
        print(f"{name}: {peaks[name]:.2f} GB", flush=True)
    seconds = {}
    for task in TASKS:
        seconds[task] = measure(task, made, x, target, args.repeats)
        print(task, *(f"{name}: {summary(its, unit=1, digits=3)} s" for name, its in seconds[task].items()), sep="\n  ")
    reference = THEIRS if THEIRS in made else next(iter(made))
    rows = [
        {
            "": name,
            **{f"{task}, s": summary(seconds[task][name], unit=1, digits=3) for task in TASKS},
            **{
                f"{task} / {reference}": f"{ratio(seconds[task][name], seconds[task][reference]):.2f}" for task in TASKS
            },
            "peak, GB": f"{peaks[name]:.2f}",
        }
        for name in made
    ]
    about = f"batch {args.batch} of {'x'.join(map(str, args.size))}, {machine(device)}: median (range)"
    report(f"pct_net_{args.device}", about, rows, args.docs, seconds=seconds, peak_gb=peaks)


def measure(task: str, made: dict[str, Contender], x: Tensor, target: Tensor, repeats: int) -> dict[str, list[float]]:
    return alternate({name: runner(contender, task, x, target) for name, contender in made.items()}, repeats)


def runner(contender: Contender, task: str, x: Tensor, target: Tensor) -> Callable[[], None]:
    """What does a task once, and waits until the device has done it."""
    x = x.contiguous(memory_format=contender.layout)
    method = getattr(contender, TASKS[task])

    def run() -> None:
        contender.use_settings()
        method(x, target)
        if x.is_cuda:
            torch.cuda.synchronize()

    return run


def contenders(device: torch.device, size: tuple[int, ...], mis_fm: Path | None, compiled: bool) -> Makers:
    """What makes each of them, by name."""

    def theirs(channels_last: bool = False) -> Contender:
        network = mis_fm_network(mis_fm, size)
        if channels_last:
            network = network.to(memory_format=torch.channels_last_3d)
        return Contender(network, device, channels_last)

    def ours(precision: str = "fp32", compiled: bool = False, channels_last: bool = True) -> Contender:
        network = PCTNet(1, PUBLISHED_FEATURES, MODES[0], CLASSES, channels_last=channels_last)
        return Ours(torch.compile(network) if compiled else network, device, precision)

    makers: Makers = {}
    if mis_fm is not None:
        makers[THEIRS] = theirs
        makers[f"{THEIRS}, channels-last"] = lambda: theirs(channels_last=True)
    makers["ours, fp32"] = ours
    makers["ours, fp32, channels first"] = lambda: ours(channels_last=False)
    if device.type == "cuda":
        makers["ours, tf32"] = lambda: ours("tf32")
    makers["ours, bf16"] = lambda: ours("bf16")
    if compiled:
        if device.type == "cpu":  # GPUs train in half precision
            makers["ours, fp32, compiled"] = lambda: ours(compiled=True)
        makers["ours, bf16, compiled"] = lambda: ours("bf16", compiled=True)
    return makers


def mis_fm_network(checkout: Path, size: tuple[int, ...]) -> nn.Module:
    sys.path.insert(0, str(checkout))
    from net.pct_net import PCTNet as Released

    return Released(
        {"in_chns": 1, "class_num": CLASSES, "input_size": list(size), "feature_chns": list(PUBLISHED_FEATURES)}
    )


# ------------------------------------------------------------------ memory


def peak_memory_apart(name: str) -> float:
    """GiB, in a process of its own, whose resident set nothing else has grown."""
    command = [sys.executable, "-W", "ignore", *sys.argv, "--memory-of", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def peak_memory(contender: Contender, x: Tensor, target: Tensor, allocated: int) -> float:
    """GiB of a contender's second training step; the first makes Adam's state, and looks for kernels.

    Args:
        allocated: bytes on the GPU that are not its.
    """
    step = runner(contender, "training step", x, target)
    before = resident("VmRSS")
    step()
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    step()
    if x.is_cuda:
        return (torch.cuda.max_memory_allocated() - allocated) / 2**30
    return (resident("VmHWM") - before) / 2**20


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
