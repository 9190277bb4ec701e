"""A step of pretraining beside a supervised step of nnU-Net: same plan, same device, same number of workers.

    python benchmarks/pretrain_step.py [--device cpu|cuda] [--workers 2] [--steps 24] [--rounds 4] [--spacing 6]

nnU-Net's own commands plan and preprocess generated phantoms. nnUNetTrainer and VFPretrainTrainer are made as
``nnUNetv2_train`` makes them and then take turns. A turn has fresh workers, and no others are alive: it trains on
``--drop`` batches that do not count and on ``--steps`` that do, and ends when the device has done its work. The wait
for batches and the rest are measured apart. "loader alone" is a turn without training: the time of a batch, which is
what a device would wait for that needs less than that for a step. Prints a Markdown table; writes
``docs/pretrain_step_DEVICE.json``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from side_by_side import DOCS, machine, ratio, report, summary

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Host

DATASET_ID = 1
DATASET = f"Dataset{DATASET_ID:03d}_Phantoms"
CASES = 8
ALONE = 16  # batches that are taken without training
SUPERVISED, PRETRAINING = "nnUNetTrainer", "VFPretrainTrainer"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--workers", type=int, default=2, help="nnUNet_n_proc_DA; nnU-Net's default is 12")
    parser.add_argument("--drop", type=int, help="first steps of a turn, not counted; default: what queues hold")
    parser.add_argument("--steps", type=int, default=24, help="of a turn that count")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--spacing", type=float, default=6.0, help="of the phantoms, mm: smaller ones, larger patches")
    parser.add_argument("--memory", type=float, default=2.0, help="-gpu_memory_target of the plan")
    parser.add_argument("--docs", type=Path, default=DOCS)
    args = parser.parse_args()
    device = torch.device(args.device)
    drop = most_prepared(args.workers) if args.drop is None else args.drop
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        plan = prepare(Host(Path(folder), args.workers), args.spacing, args.memory)
        waiting, working, alone = measure(device, drop, args.steps, args.rounds)
    rows = [
        {
            "trainer": name,
            "step, ms": summary(working[name], digits=0),
            f"step / {SUPERVISED}": f"{ratio(working[name], working[SUPERVISED]):.2f}",
            "wait for data, ms": summary(waiting[name], digits=1),
            "wait / (wait + step)": f"{wait_share(waiting[name], working[name]):.1%}",
            "loader alone, ms a batch": summary(alone[name], digits=1),
        }
        for name in working
    ]
    patch = " x ".join(map(str, plan["patch_size"]))
    about = f"patch {patch}, batch {plan['batch_size']}, {args.workers} workers, {machine(device)}: median (range)"
    report(f"pretrain_step_{device.type}", about, rows, args.docs, waiting=waiting, working=working, alone=alone)


def most_prepared(workers: int) -> int:
    """Batches that may lie ready: nnU-Net has two queues, and one in the hands of each worker and of who carries over.

    Ours has fewer: 6, rounded up to a multiple of the workers.
    """
    return 2 * max(6, workers // 2) + workers + 1


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


def measure(device: torch.device, drop: int, steps: int, rounds: int) -> tuple[dict[str, list[float]], ...]:
    """By trainer: seconds waited for each batch; of a step, the mean of each turn; of a batch alone, likewise."""
    trainers = {name: make_trainer(name, device) for name in (SUPERVISED, PRETRAINING)}
    waiting: dict[str, list[float]] = {name: [] for name in trainers}
    working: dict[str, list[float]] = {name: [] for name in trainers}
    alone: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            waits, worked = training_turn(trainer, drop, steps)
            waiting[name] += waits
            working[name].append(worked)
            alone[name].append(loading_turn(trainer, drop))
        print(*(f"{name}: {statistics.median(working[name]):.2f} s" for name in trainers), sep=", ", flush=True)
    return waiting, working, alone


def make_trainer(name: str, device: torch.device) -> Any:
    """A trainer that has taken its first step, which may compile the network while a queue fills; without workers."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", "all", name, device=device)
    trainer.disable_checkpointing = True  # on_train_end is called after every turn
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    take_steps(trainer, 1)
    end_workers(trainer)
    return trainer


def training_turn(trainer: Any, drop: int, steps: int) -> tuple[list[float], float]:
    """Seconds waited for each batch, and of all the rest of a step."""
    with fresh_workers(trainer):
        take_steps(trainer, drop)
        waits, worked = take_steps(trainer, steps)
    return waits, worked / steps


def loading_turn(trainer: Any, drop: int) -> float:
    """Seconds until the next batch, when nothing is done with them."""
    with fresh_workers(trainer):
        for _ in range(drop):
            next(trainer.dataloader_train)
        start = time.perf_counter()
        for _ in range(ALONE):
            next(trainer.dataloader_train)
        return (time.perf_counter() - start) / ALONE


def take_steps(trainer: Any, steps: int) -> tuple[list[float], float]:
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


@contextmanager
def fresh_workers(trainer: Any) -> Iterator[None]:
    """Workers that have prepared nothing yet, as long as the context lasts."""
    trainer.on_train_epoch_start()
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    yield
    end_workers(trainer)


def end_workers(trainer: Any) -> None:
    """Each trainer knows best what holds its workers."""
    trainer.on_train_end()
    alive = multiprocessing.active_children()
    if alive:
        raise RuntimeError(f"would disturb the next turn: {alive}")


if __name__ == "__main__":
    main()
