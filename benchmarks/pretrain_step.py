"""A step of pretraining beside a supervised step of nnU-Net: same plan, same device, same number of workers.

    python benchmarks/pretrain_step.py [--device cpu|cuda] [--workers 2] [--steps 6] [--rounds 4] [--spacing 6]

nnU-Net's own commands plan and preprocess generated phantoms. nnUNetTrainer and VFPretrainTrainer are made as
``nnUNetv2_train`` makes them and then take turns of ``--steps`` training steps, after one that does not count; a turn
ends when the device has done its work. The wait for batches and the rest are measured apart. Prints a Markdown table;
writes ``docs/pretrain_step_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from side_by_side import DOCS, machine, ratio, report, summary

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.host import Host
from nnunetv2_vf.phantoms import write_dataset

DATASET_ID = 1
DATASET = f"Dataset{DATASET_ID:03d}_Phantoms"
CASES = 8
SUPERVISED, PRETRAINING = "nnUNetTrainer", "VFPretrainTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=2, help="nnUNet_n_proc_DA; nnU-Net's default is 12")
    parser.add_argument("--steps", type=int, default=6, help="a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--spacing", type=float, default=6.0, help="of the phantoms, mm: smaller ones, larger patches")
    parser.add_argument("--memory", type=float, default=2.0, help="-gpu_memory_target of the plan")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    device = torch.device(args.device)
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        plan = prepare(Host(Path(folder), args.workers), args.spacing, args.memory)
        waiting, working = measure(device, args.steps, args.rounds)
    rows = [
        {
            "trainer": name,
            "step, ms": summary(working[name], digits=0),
            f"step / {SUPERVISED}": f"{ratio(working[name], working[SUPERVISED]):.2f}",
            "wait for data, ms": summary(waiting[name], digits=1),
            "wait / (wait + step)": f"{wait_share(waiting[name], working[name]):.1%}",
        }
        for name in working
    ]
    patch = " x ".join(map(str, plan["patch_size"]))
    about = f"patch {patch}, batch {plan['batch_size']}, {args.workers} workers, {machine(device)}: median (range)"
    report(f"pretrain_step_{device.type}", about, rows, args.docs, waiting=waiting, working=working)


def wait_share(waiting: list[float], working: list[float]) -> float:
    wait, work = statistics.fmean(waiting), statistics.fmean(working)
    return wait / (wait + work)


def prepare(host: Host, spacing: float, memory: float) -> dict[str, Any]:
    """Plan and preprocess; returns the plan. nnU-Net reads the variables when it is imported."""
    write_dataset(host.raw / DATASET, range(CASES), spacing=spacing)
    host.run("nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", "3d_fullres", "-gpu_memory_target", memory)
    os.environ.update({name: value for name, value in host.environment.items() if name.startswith("nnUNet")})
    plans = json.loads((host.preprocessed / DATASET / "nnUNetPlans.json").read_text())
    configuration: dict[str, Any] = plans["configurations"]["3d_fullres"]
    return configuration


def measure(device: torch.device, steps: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds waited for each batch, and seconds of each step, by trainer."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainers = {}
    for name in (SUPERVISED, PRETRAINING):
        trainers[name] = get_trainer_from_args(str(DATASET_ID), "3d_fullres", "all", name, device=device)
        trainers[name].on_train_start()
        trainers[name].on_train_epoch_start()
    waiting: dict[str, list[float]] = {name: [] for name in trainers}
    working: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            one_turn(trainer, 1)
            waits, worked = one_turn(trainer, steps)
            waiting[name] += waits
            working[name].append(worked / steps)
        print(*(f"{name}: {statistics.median(working[name]):.2f} s" for name in trainers), sep=", ", flush=True)
    for trainer in trainers.values():
        trainer.disable_checkpointing = True
        trainer.on_train_end()
    return waiting, working


def one_turn(trainer: Any, steps: int) -> tuple[list[float], float]:
    """Seconds waited for each batch, and seconds of all the rest."""
    waits = []
    start = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(trainer.dataloader_train)
        waits.append(time.perf_counter() - before)
        trainer.train_step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return waits, time.perf_counter() - start - sum(waits)


if __name__ == "__main__":
    main()
