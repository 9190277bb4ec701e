"""PCT-Net side by side with MIS-FM's: time and peak memory of forward pass, backward pass and training step.

    python benchmarks/pct_net.py [--mis-fm PATH] [--device cpu|cuda] [--size 64 64 64] [--batch 2] [--repeats 5]

PATH is a checkout of openmedlab/MIS-FM (which also needs pip install einops); without it ours runs alone. The same
published sizes, one output, 5 classes. Contenders: MIS-FM as released, single precision, eager; ours as a plan builds
it, in single precision and under autocast (bf16), and with ``--compile`` compiled. A training step is the forward pass,
nnU-Net's Dice and cross-entropy, the backward pass, clipping and Adam. Prints Markdown tables; writes
``docs/pct_net_DEVICE.json``.

Peak memory is of one training step: on CUDA what torch allocated, weights included; on the CPU the growth of the
resident set of a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from side_by_side import DOCS, alternate, machine, ratio, report, summary
from torch import Tensor, nn

from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet

CLASSES = 5
THEIRS = "MIS-FM, fp32"


@dataclass
class Contender:
    """A network on a device, with what a training step of it needs."""

    network: nn.Module
    device: torch.device
    precision: torch.dtype | None = None  # of autocast

    def __post_init__(self) -> None:
        self.network.to(self.device).train()
        self.optimizer = torch.optim.Adam(self.network.parameters(), 1e-4)
        dice = {"batch_dice": True, "do_bg": True, "smooth": 1e-5, "ddp": False}
        self.loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)

    def forward(self, x: Tensor, target: Tensor) -> None:
        with torch.no_grad(), self._autocast():
            self.network(x)
        self._wait()

    def forward_and_backward(self, x: Tensor, target: Tensor) -> None:
        with self._autocast():
            output = self.network(x)
        output.float().square().mean().backward()
        self.optimizer.zero_grad()
        self._wait()

    def training_step(self, x: Tensor, target: Tensor) -> None:
        with self._autocast():
            output = self.network(x)
        self.loss(output.float(), target).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 12)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._wait()

    def _autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.precision is None else torch.autocast(self.device.type, self.precision)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


TASKS: dict[str, Callable[[Contender, Tensor, Tensor], None]] = {
    "forward": Contender.forward,
    "forward + backward": Contender.forward_and_backward,
    "training step": Contender.training_step,
}


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
    makers = contenders(device, args.size, args.mis_fm, args.compile)
    x = torch.randn(args.batch, 1, *args.size, device=device)
    target = torch.randint(0, CLASSES, x.shape, device=device)
    if args.memory_of:
        print(growth(makers[args.memory_of](), x, target))
        return
    made = {name: make() for name, make in makers.items()}
    seconds = {task: measure(task, made, x, target, args.repeats) for task in TASKS}
    peaks = {name: peak_memory(name, made[name], x, target) for name in made}
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
    def runner(contender: Contender) -> Callable[[], None]:
        return lambda: TASKS[task](contender, x, target)

    return alternate({name: runner(contender) for name, contender in made.items()}, repeats)


def contenders(
    device: torch.device, size: tuple[int, ...], mis_fm: Path | None, compiled: bool
) -> dict[str, Callable[[], Contender]]:
    """What makes each of them, by name."""

    def ours(precision: torch.dtype | None = None, compiled: bool = False, channels_last: bool = True) -> Contender:
        network = PCTNet(1, PUBLISHED_FEATURES, MODES[0], CLASSES, channels_last=channels_last)
        return Contender(torch.compile(network) if compiled else network, device, precision)

    makers: dict[str, Callable[[], Contender]] = {}
    if mis_fm is not None:
        makers[THEIRS] = lambda: Contender(mis_fm_network(mis_fm, size), device)
    makers["ours, fp32"] = ours
    makers["ours, fp32, channels first"] = lambda: ours(channels_last=False)
    makers["ours, bf16"] = lambda: ours(torch.bfloat16)
    if compiled:
        makers["ours, fp32, compiled"] = lambda: ours(None, True)
        makers["ours, bf16, compiled"] = lambda: ours(torch.bfloat16, True)
    return makers


def mis_fm_network(checkout: Path, size: tuple[int, ...]) -> nn.Module:
    sys.path.insert(0, str(checkout))
    from net.pct_net import PCTNet as Released

    return Released(
        {"in_chns": 1, "class_num": CLASSES, "input_size": list(size), "feature_chns": list(PUBLISHED_FEATURES)}
    )


# ------------------------------------------------------------------ memory


def peak_memory(name: str, contender: Contender, x: Tensor, target: Tensor) -> float:
    """GiB."""
    if x.device.type == "cpu":
        done = subprocess.run(
            [sys.executable, *sys.argv, "--memory-of", name], capture_output=True, text=True, check=True
        )
        return float(done.stdout.splitlines()[-1])
    torch.cuda.reset_peak_memory_stats()
    contender.training_step(x, target)
    return torch.cuda.max_memory_allocated() / 2**30


def growth(contender: Contender, x: Tensor, target: Tensor) -> float:
    """How much the resident set of this process grew in a training step, GiB."""
    before = resident("VmRSS")
    contender.training_step(x, target)
    return (resident("VmHWM") - before) / 2**20


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
