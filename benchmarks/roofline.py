"""What a training step of PCT-Net could cost on this machine, what it costs, and where the rest goes.

    python benchmarks/roofline.py [--device cpu|cuda] [--size 64 64 64] [--batch 2] [--precision fp32|bf16]

Ceilings are measured: the rate of a large matrix product in that precision, and of copying memory. The operations of
the forward and backward pass are counted by torch, the time of each operator by its profiler: on CUDA that of the
kernels that it launched. Prints Markdown tables; writes ``docs/roofline_DEVICE.json``.

The bound of convolutions and matrix products is their operations at the rate of products; that of all other kinds is
the bytes of the tensors that their operators take and return at the rate of copying. That is an estimate: a tensor that
is still in the cache costs less, one that a kernel reads twice costs more, and operators that could be one kernel
would not hand over what is between them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import DOCS, machine, markdown, report, summary
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet
from nnunetv2_vf.training.step import Precision

KINDS = {  # parts of the operators' names, the first that is found
    "convolutions": ("conv",),
    "matrix products": ("mm", "attention"),
    "PReLU": ("prelu",),
    "dropout": ("bernoulli", "dropout"),
    "norms": ("norm",),
    "softmax": ("softmax",),
    "pooling": ("pool",),
}
OTHER = "copies and other element-wise work"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 64))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    precision = Precision(args.precision, device.type)
    precision.set_float32_precision()  # fp32 is exact, for the convolutions too
    torch.backends.cudnn.benchmark = True  # nnU-Net's
    network = PCTNet(1, PUBLISHED_FEATURES, MODES[0], 5).to(device).train()
    x = torch.randn(args.batch, 1, *args.size, device=device)

    def step() -> None:
        with precision.autocast():
            output = network(x)
        output.float().square().mean().backward()
        network.zero_grad()
        wait(device)

    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        step()
    operations = counter.get_total_flops()
    rate, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    seconds = runs(step, args.repeats)
    rows = [
        {"": "operations of forward and backward pass", "value": f"{operations / 1e12:.2f} TFLOP"},
        {"": f"largest rate of matrix products, {args.precision}", "value": f"{rate / 1e9:.0f} GFLOP/s"},
        {"": "rate of copying memory", "value": f"{bandwidth / 1e9:.0f} GB/s"},
        {"": "time at that rate of products", "value": f"{operations / rate:.3f} s"},
        {"": "time measured, median (range)", "value": f"{summary(seconds, unit=1, digits=3)} s"},
        {"": "share of the ceiling", "value": f"{operations / rate / statistics.median(seconds):.0%}"},
    ]
    spent = time_by_kind(step, device)
    bounds = {
        **{name: number / bandwidth for name, number in traffic.bytes.items()},
        **{name: number / rate for name, number in operations_by_kind(counter).items()},
    }
    kinds = [kind_row(name, spent[name], spent.total(), bounds.get(name, 0.0)) for name, _ in spent.most_common()]
    about = f"PCT-Net, batch {args.batch} of {'x'.join(map(str, args.size))}, {args.precision}, {machine(device)}"
    report(f"roofline_{device.type}", about, rows, args.docs, seconds=seconds, kinds=kinds, spent=spent, bounds=bounds)
    print(f"\n{markdown(kinds)}")


def kind_row(name: str, spent: float, total: float, bound: float) -> dict[str, str]:
    return {
        "kind": name,
        "time, ms": f"{1e3 * spent:.1f}",
        "share": f"{spent / total:.0%}",
        "bound, ms": f"{1e3 * bound:.1f}",
        "share of the bound reached": f"{bound / spent:.0%}",
    }


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def runs(run: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several products of square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)
        wait(device)

    return 2 * side**3 / min(runs(product, 10))


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second, copying far more than a cache holds."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait(device)

    return 2 * source.nbytes / min(runs(copy, 5))


def time_by_kind(step: Callable[[], object], device: torch.device) -> Counter[str]:
    """Seconds of one step in each kind of operator, without what it calls."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # the others are kernels, whose time their operators have too
            times[kind(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return +times


def operations_by_kind(counter: FlopCounterMode) -> Counter[str]:
    operations: Counter[str] = Counter()
    for operator, number in counter.get_flop_counts()["Global"].items():
        operations[kind(str(operator))] += number
    return operations


class Traffic(TorchDispatchMode):
    """Counts the bytes of the tensors that operators take and return, by kind.

    Views and allocations move none. What an operator works on in place counts once, as it does for a copy and a fill.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and "view" not in name and "empty" not in name:
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
            self.bytes[kind(name)] += sum(tensor.nbytes for tensor in tensors.values())
        return result


def kind(name: str) -> str:
    lowered = name.lower()
    return next((of for of, parts in KINDS.items() if any(part in lowered for part in parts)), OTHER)


if __name__ == "__main__":
    main()
