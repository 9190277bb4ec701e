"""How training grows from one process to two, a core (or a GPU) each: samples per second, and what sharing costs.

    python benchmarks/scaling.py [--device cpu|cuda] [--processes 2] [--rounds 3] [--steps 12] [--spacing 6]

nnU-Net's own commands plan and preprocess generated phantoms; ``torchrun -m nnunetv2_vf.distributed`` trains, with the
plan's batch on every process (nnUNet_vf_batch_per_gpu). On the CPU every process has one core and makes its samples
itself. Three contenders take turns: one process; as many processes as asked for that know nothing of one another, which
is what the machine can do when all its cores share its memory; and as many that train one network. Prints a Markdown
table; writes ``docs/scaling_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from pretrain_step import DATASET, DATASET_ID, prepare
from side_by_side import DOCS, machine, report

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Host

EPOCHS = 4  # the first does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="an epoch")
    parser.add_argument("--spacing", type=float, default=6.0, help="of the phantoms, mm: smaller ones, larger patches")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    many = args.processes
    contenders = {"one process": [1], f"{many} processes, each by itself": [1] * many, f"{many} processes": [many]}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder), processes=2)
        plan = prepare(host, args.spacing, memory=2.0)
        host.environment |= settings(plan["batch_size"], args.steps, args.device)
        for _ in range(args.rounds):
            for name, launches in contenders.items():
                speeds[name].append(samples_per_second(host, launches, args.device))
                print(f"{name}: {speeds[name][-1]:.3g} samples/s", flush=True)
    alone = statistics.median(speeds["one process"])
    rows = [
        {
            "": name,
            "samples/s": f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})",
            "efficiency": f"{statistics.median(found) / (alone * sum(contenders[name])):.2f}",
        }
        for name, found in speeds.items()
    ]
    patch = " x ".join(map(str, plan["patch_size"]))
    torch.set_num_threads(1)
    about = (
        f"patch {patch}, batch {plan['batch_size']} on each, {machine(torch.device(args.device))} each: median (range)"
    )
    report(f"scaling_{args.device}", about, rows, args.docs, samples_per_second=speeds)


def settings(batch: int, steps: int, device: str) -> dict[str, str]:
    values = {
        "num_epochs": EPOCHS,
        "iterations_per_epoch": steps,
        "val_iterations_per_epoch": 1,
        "batch_per_gpu": batch,
    }
    own = {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0"} if device == "cpu" else {"nnUNet_n_proc_DA": "8"}
    return {**{f"nnUNet_vf_{name}": str(value) for name, value in values.items()}, **own}


def samples_per_second(host: Host, launches: list[int], device: str) -> float:
    """Of several trainings at once, of so many processes each; together."""
    results = [Path(tempfile.mkdtemp(dir=host.folder)) for _ in launches]
    running = []
    for number, (processes, folder) in enumerate(zip(launches, results, strict=True)):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "nnunetv2_vf.distributed", str(DATASET_ID), "3d_fullres", "all"),
            *("-tr", "VFPretrainTrainer", "-device", device),
        ]
        environment = {**host.environment, "nnUNet_results": str(folder)}
        if device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(number * processes + i) for i in range(processes))
        cores = {number} if sum(launches) == 1 or len(launches) > 1 else set(range(processes))
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.DEVNULL,
                preexec_fn=(lambda own=cores: os.sched_setaffinity(0, own)) if device == "cpu" else None,
            )
        )
    if any(process.wait() for process in running):
        sys.exit("a training failed")
    return sum(map(recorded_speed, results))


def recorded_speed(results: Path) -> float:
    run = results / DATASET / "VFPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    checkpoint = torch.load(run / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    return statistics.median(checkpoint["logging"]["samples_per_second"][1:])


if __name__ == "__main__":
    main()
