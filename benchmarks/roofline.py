"""What a training step of PCT-Net could cost on this machine, what it costs, and where the rest goes.

    python benchmarks/roofline.py [--device cpu|cuda] [--size 64 64 64] [--batch 2] [--precision fp32|bf16]

Ceilings are measured: the rate of a large matrix product in that precision, and of copying memory. The operations of
the forward and backward pass are counted by torch, the time of each kind of operation by its profiler. Prints Markdown
tables; writes ``docs/roofline_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from side_by_side import DOCS, machine, markdown, report
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet

KINDS = {  # what the profiler's names belong to, the first that is found in them
    "convolutions": ("conv", "cudnn"),
    "matrix products": ("mm", "gemm", "attention", "sdpa"),
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
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    network = PCTNet(1, PUBLISHED_FEATURES, MODES[0], 5).to(device).train()
    x = torch.randn(args.batch, 1, *args.size, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = network(x)
        output.float().square().mean().backward()
        network.zero_grad()
        wait(device)

    with FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    rate, bandwidth = matmul_rate(device, dtype), copy_rate(device)
    seconds = median_seconds(step, repeats=3)
    rows = [
        {"": "operations of forward and backward pass", "value": f"{operations / 1e12:.2f} TFLOP"},
        {"": f"largest rate of matrix products, {args.precision}", "value": f"{rate / 1e9:.0f} GFLOP/s"},
        {"": "rate of copying memory", "value": f"{bandwidth / 1e9:.0f} GB/s"},
        {"": "time at that rate of products", "value": f"{operations / rate:.2f} s"},
        {"": "time measured", "value": f"{seconds:.2f} s"},
        {"": "share of the ceiling", "value": f"{operations / rate / seconds:.0%}"},
    ]
    shares = time_by_kind(step, device)
    spent = [{"kind": kind, "share of the time": f"{share:.0%}"} for kind, share in shares.items()]
    about = f"PCT-Net, batch {args.batch} of {'x'.join(map(str, args.size))}, {args.precision}, {machine(device)}"
    report(f"roofline_{device.type}", about, rows, args.docs, spent=shares)
    print(f"\n{markdown(spent)}")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several products of square matrices."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.matmul(a, b)
        wait(device)

    return 2 * side**3 / min(median_seconds(product, 1) for _ in range(10))


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second, copying far more than a cache holds."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        wait(device)

    return 2 * source.nbytes / min(median_seconds(copy, 1) for _ in range(5))


def time_by_kind(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """The share of each kind of operation, the largest first."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[kind(event.key)] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
    total = sum(times.values())
    return {name: spent / total for name, spent in times.most_common()}


def kind(name: str) -> str:
    lowered = name.lower()
    return next((of for of, parts in KINDS.items() if any(part in lowered for part in parts)), OTHER)


if __name__ == "__main__":
    main()
