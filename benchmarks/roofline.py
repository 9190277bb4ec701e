"""Time of PCT-Net's forward and backward pass against the limits of the machine, by kind of operation.

    python benchmarks/roofline.py [--device cpu|cuda] [--size 64 64 64] [--batch 2] [--precision fp32|bf16]

Both limits are measured: the rate of a large matrix product in that precision, and the rate of copying memory. torch
counts the operations of the forward and backward pass; its profiler gives the time of each operator, on CUDA the time
of the kernels that the operator launched.

The bound of convolutions and matrix products is their number of operations at the rate of products. The bound of every
other kind is the bytes of its operators' inputs and outputs at the rate of copying. That is an estimate: a tensor in
the cache costs less, a tensor that a kernel reads twice costs more, and fused operators would not write their
intermediate tensors.

Duration: 2 minutes on 2 CPU cores. Needs: 8 GB of memory; with ``--device cuda`` a GPU.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import (
    by,
    describe_device,
    make_parser,
    markdown_table,
    median_and_range,
    report,
    take_turns,
    wait_for_device,
)
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.pct_net import PUBLISHED_FEATURES, PCTNet
from nnunetv2_vf.training.step import Precision

KINDS = {  # kind -> parts of operator names; the first kind that matches counts
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
    parser = make_parser(__doc__, device=True, output=True)
    parser.add_argument("--size", type=int, nargs=3, default=(64, 64, 64), metavar=("D", "H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    precision = Precision(args.precision, device.type)
    precision.set_float32_precision()  # fp32 is exact, also in convolutions
    torch.backends.cudnn.benchmark = True  # as nnU-Net
    network = PCTNet(1, PUBLISHED_FEATURES, MODES[0], 5).to(device).train()
    x = torch.randn(args.batch, 1, *args.size, device=device)

    def step() -> None:
        with precision.autocast():
            output = network(x)
        output.float().square().mean().backward()
        network.zero_grad()
        wait_for_device(device)

    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        step()
    operations = counter.get_total_flops()
    rate, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    seconds = time_runs(step, args.repeats)
    rows = [
        {"": "operations of forward and backward pass", "value": f"{operations / 1e12:.2f} TFLOP"},
        {"": f"largest rate of matrix products, {args.precision}", "value": f"{rate / 1e9:.0f} GFLOP/s"},
        {"": "rate of copying memory", "value": f"{bandwidth / 1e9:.0f} GB/s"},
        {"": "time at that rate of products", "value": f"{operations / rate:.3f} s"},
        {"": "time measured, median (range)", "value": f"{median_and_range(seconds, digits=3)} s"},
        {"": "share of the ceiling", "value": f"{operations / rate / statistics.median(seconds):.0%}"},
    ]
    spent = time_by_kind(step, device)
    bounds = {
        **{name: number / bandwidth for name, number in traffic.bytes.items()},
        **{name: number / rate for name, number in operations_by_kind(counter).items()},
    }
    kinds = [kind_row(name, spent[name], spent.total(), bounds.get(name, 0.0)) for name, _ in spent.most_common()]
    about = f"PCT-Net, batch {args.batch} of {by(args.size)}, {args.precision}, {describe_device(args.device)}"
    report(
        args,
        f"roofline_{args.device}_{args.precision}",
        about,
        rows,
        seconds=seconds,
        kinds=kinds,
        spent=spent,
        bounds=bounds,
    )
    print(f"\n{markdown_table(kinds)}")


def kind_row(name: str, spent: float, total: float, bound: float) -> dict[str, str]:
    return {
        "kind": name,
        "time, ms": f"{1e3 * spent:.1f}",
        "share": f"{spent / total:.0%}",
        "bound, ms": f"{1e3 * bound:.1f}",
        "share of the bound reached": f"{bound / spent:.0%}",
    }


def time_runs(run: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of each run."""
    return take_turns({"run": run}, repeats, warm_up=0)["run"]


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest FLOP/s of several products of square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)
        wait_for_device(device)

    return 2 * side**3 / min(time_runs(product, 10))


def copy_rate(device: torch.device) -> float:
    """Return the bytes read and written per second when copying far more than a cache holds."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait_for_device(device)

    return 2 * source.nbytes / min(time_runs(copy, 5))


def time_by_kind(step: Callable[[], object], device: torch.device) -> Counter[str]:
    """Return the seconds of one step in each kind of operator, without the operators that it calls."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CPU:  # kernels are events too, but their operators already hold their time
            times[kind_of(event.key)] += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
    return +times


def operations_by_kind(counter: FlopCounterMode) -> Counter[str]:
    operations: Counter[str] = Counter()
    for operator, number in counter.get_flop_counts()["Global"].items():
        operations[kind_of(str(operator))] += number
    return operations


class Traffic(TorchDispatchMode):
    """Counts the bytes of the operators' inputs and outputs, by kind.

    Views and allocations move no bytes. A tensor that is changed in place counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name()
        if not func.is_view and "view" not in name and "empty" not in name:
            tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
            self.bytes[kind_of(name)] += sum(tensor.nbytes for tensor in tensors.values())
        return result


def kind_of(name: str) -> str:
    lowered = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lowered for part in parts)), OTHER)


if __name__ == "__main__":
    main()
