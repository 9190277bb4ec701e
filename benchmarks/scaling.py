"""Training speed of two processes against one, each with one CPU core or GPU.

    python benchmarks/scaling.py [--device cpu|cuda] [--processes 2] [--rounds 3] [--steps 12] [--spacing 6]

nnU-Net's own commands plan and preprocess generated phantoms; ``torchrun -m nnunetv2_vf.distributed`` pretrains, with
the plans' batch on every process (nnUNet_vf_batch_per_gpu). On the CPU every process has one core and makes its samples
itself. Three contenders take turns: one process; ``--processes`` independent ones, which show what the machine can do
when its cores share the memory; and as many that train one network.

Duration: 10 minutes on 2 CPU cores. Needs: as many cores, or GPUs, as processes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import (
    PHANTOMS,
    PHANTOMS_ID,
    by,
    describe_device,
    make_parser,
    median_and_range,
    median_ratio,
    prepare_phantoms,
    report,
)

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

CASES = 8
EPOCHS = 4  # the first is not counted


def main() -> None:
    parser = make_parser(__doc__, device=True, output=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="steps of an epoch")
    parser.add_argument("--spacing", type=float, default=6.0, help="mm; smaller voxels mean larger patches")
    args = parser.parse_args()
    many = args.processes
    contenders = {  # name -> number of processes of each training
        "one process": [1],
        f"{many} processes, each by itself": [1] * many,
        f"{many} processes that train one network": [many],
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), processes=2)
        plan = prepare_phantoms(workspace, CASES, args.spacing)
        workspace.environment |= make_variables(plan["batch_size"], args.steps, args.device)
        for _ in range(args.rounds):
            for name, trainings in contenders.items():
                speeds[name].append(train_together(workspace, trainings, args.device))
                print(f"{name}: {speeds[name][-1]:.3g} samples/s", flush=True)
    rows = [
        {
            "": name,
            "samples/s": median_and_range(found),
            "efficiency": f"{median_ratio(found, speeds['one process']) / sum(contenders[name]):.2f}",
        }
        for name, found in speeds.items()
    ]
    torch.set_num_threads(1)
    plan_text = f"patch {by(plan['patch_size'])}, batch {plan['batch_size']} on each process"
    about = f"{plan_text}, {describe_device(args.device)} each: median (range)"
    report(args, f"scaling_{args.device}", about, rows, samples_per_second=speeds)


def make_variables(batch: int, steps: int, device: str) -> dict[str, str]:
    """Return the environment variables of the trainings."""
    variables = {
        "nnUNet_vf_num_epochs": str(EPOCHS),
        "nnUNet_vf_iterations_per_epoch": str(steps),
        "nnUNet_vf_val_iterations_per_epoch": "1",
        "nnUNet_vf_batch_per_gpu": str(batch),
    }
    if device == "cpu":
        return variables | {"OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "0"}
    return variables | {"nnUNet_n_proc_DA": "8"}


def train_together(workspace: Workspace, trainings: list[int], device: str) -> float:
    """Run trainings at the same time, each with a number of processes; return their samples per second together."""
    folders = [Path(tempfile.mkdtemp(dir=workspace.folder)) for _ in trainings]
    running = []
    first = 0  # core or GPU of a training's first process
    for processes, folder in zip(trainings, folders, strict=True):
        own = range(first, first + processes)
        first += processes
        environment = {**workspace.environment, "nnUNet_results": str(folder)}
        if device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, own))
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "nnunetv2_vf.distributed", str(PHANTOMS_ID), "3d_fullres", "all"),
            *("-tr", "VFPretrainTrainer", "-device", device),
        ]
        pin = (lambda cores=set(own): os.sched_setaffinity(0, cores)) if device == "cpu" else None
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, preexec_fn=pin))
    statuses = [process.wait() for process in running]
    if any(statuses):
        raise UserError("a training failed; its messages are above")
    return sum(map(read_speed, folders))


def read_speed(results: Path) -> float:
    """Return the median samples per second of a training's epochs without the first."""
    fold = results / PHANTOMS / "VFPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all"
    checkpoint = torch.load(fold / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    return statistics.median(checkpoint["logging"]["samples_per_second"][1:])


if __name__ == "__main__":
    main()
