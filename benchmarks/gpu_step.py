"""Time, memory and start of the training step of one network on a GPU, in a process of its own.

    python benchmarks/gpu_step.py misfm|pct_net|fmunet --output FILE [--peers FOLDER] [--compile off|network|blocks]
        [--layout channels_last|contiguous] [--prelu ours|torch|where] [--cudnn-benchmark] [--device cuda|cpu]

A step is the forward pass, cross-entropy, the backward pass and Adam. ``misfm`` is MIS-FM's PCT-Net as released, in
single precision with TF32 convolutions; ours run in bf16, with the fused optimiser, gradient clipping and check for
non-finite gradients of VFPretrainTrainer. "ready" is the time from building the network to the end of its first step,
which compiles. If the whole network is compiled, the compiler counts: the kernels that it has written, the GB that the
step reads and writes (convolutions included), and the places at which it had to leave the graph.

``--compile blocks`` compiles the blocks of the network one by one. ``--prelu`` writes the activation of PCT-Net in
another way with the same values and gradients, which the compiler turns into other kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch._inductor.metrics as compiler_metrics
import torch.nn.functional as F  # noqa: N812
from common import make_parser, wait_for_device, write_result
from network_speed import CLASSES, FEATURES, NETWORKS, Contender, OurContender, load_misfm
from torch import Tensor, nn
from torch._dynamo.utils import counters

from nnunetv2_vf import pct_net
from nnunetv2_vf.five_level_network import MODES, Decoder, Encoder

WARM_UP = 3  # steps, the first of which compiles


class WherePReLU(nn.PReLU):
    """PReLU as an ordinary choice between two values."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, (self.weight * x).to(x.dtype))


PRELUS = {"ours": pct_net.PReLU, "torch": nn.PReLU, "where": WherePReLU}


def main() -> None:
    parser = make_parser(__doc__, peers=("MIS-FM",), output=True)
    parser.add_argument("network", choices=("misfm", *NETWORKS))
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--compile", default="off", choices=("off", "network", "blocks"))
    parser.add_argument("--layout", choices=("channels_last", "contiguous"), help="default: that of the network")
    parser.add_argument("--prelu", default="ours", choices=[*PRELUS])
    parser.add_argument("--cudnn-benchmark", action="store_true", help="as nnU-Net trains")
    parser.add_argument("--size", type=int, nargs=3, default=(64, 128, 128), metavar=("D", "H", "W"))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    result = measure(args)
    write_result(args.output or Path("gpu_step.json"), result)
    print(json.dumps(result))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Return the milliseconds of each counted step, their median, peak memory, time until ready and kernels."""
    torch._logging.set_logs(inductor_metrics=True)  # else the compiler does not count bytes
    x = torch.randn(args.batch, 1, *args.size, device=args.device)
    target = torch.randint(0, CLASSES, x.shape, device=args.device)
    start = time.perf_counter()
    contender = make_contender(args)
    contender.set_float32_precision()
    seconds = []
    for _ in range(WARM_UP + args.steps):
        before = time.perf_counter()
        contender.training_step(x, target)
        wait_for_device(args.device)
        seconds.append(time.perf_counter() - before)
        if len(seconds) == 1:
            ready = time.perf_counter() - start
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
    milliseconds = [round(1e3 * value, 2) for value in seconds[WARM_UP:]]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if args.device == "cuda" else None
    counted = {
        "kernels": compiler_metrics.generated_kernel_count,
        "moved_gb": round(compiler_metrics.num_bytes_accessed / 2**30, 2),
        "graph_breaks": sum(counters["graph_break"].values()),
    }
    return {
        "step_ms": round(statistics.median(milliseconds), 1),
        "peak_gb": peak,
        "ready_s": round(ready, 1),
        **(counted if args.compile == "network" else dict.fromkeys(counted)),
        "steps_ms": milliseconds,
    }


def make_contender(args: argparse.Namespace) -> Contender:
    if args.network == "misfm":
        peers = SimpleNamespace(peers=args.peers, network="pct_net", size=args.size)
        contender = Contender(load_misfm(peers), args.device)
    else:
        layout = {} if args.layout is None else {"channels_last": args.layout == "channels_last"}
        network = NETWORKS[args.network](1, FEATURES[args.network], MODES[0], CLASSES, **layout)
        replace_prelus(network, PRELUS[args.prelu])
        if args.compile == "network":
            network.compile()
        elif args.compile == "blocks":
            compile_blocks(network)
        contender = OurContender(network, args.device, "bf16" if args.device == "cuda" else "fp32")
    contender.loss = cross_entropy
    return contender


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.float(), target[:, 0])


def replace_prelus(network: nn.Module, prelu: type[nn.PReLU]) -> None:
    """Exchange all PReLUs; the new ones keep the learnt slopes."""
    for name, module in [*network.named_modules()]:
        if isinstance(module, nn.PReLU):
            new = prelu()
            new.weight = module.weight
            network.set_submodule(name, new)


def compile_blocks(network: nn.Module) -> None:
    """Compile each block by itself: alike blocks are compiled faster than one large graph."""
    torch._dynamo.config.recompile_limit = 64  # one for each block
    for part in network.modules():
        if isinstance(part, Encoder | Decoder):
            for blocks in (part.stages, part.downs if isinstance(part, Encoder) else part.ups):
                for block in blocks:
                    block.compile(dynamic=False)


if __name__ == "__main__":
    main()
