"""Time of a pretraining step beside a supervised step of nnU-Net: same plans, same device, same number of workers.

    python benchmarks/pretrain_step.py [--network U-Net|ResEnc-L|PCT-Net|FMUNet] [--pretext fusion|masked|fusion+masked]
        [--device cpu|cuda] [--workers 2] [--steps 24] [--rounds 4] [--spacing 6] [--memory 2]

nnU-Net's own commands plan and preprocess generated phantoms. nnUNetTrainer and VFPretrainTrainer take turns; only the
workers of one of them are alive at a time. A turn first trains on as many batches as the queues of the workers can
hold, which do not count, then on ``--steps`` batches that do. The wait for a batch and the rest of the step are timed
apart; a GPU waits only if it has nothing left to do when the batch arrives. "loader alone" is a turn without training:
the time of a batch, and so the shortest step that the workers can supply.

Duration: 5 minutes on 2 CPU cores. Needs: with ``--device cuda`` a GPU.
"""

from __future__ import annotations

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
from common import (
    NETWORK_PLANS,
    PHANTOMS_ID,
    Seconds,
    by,
    describe_device,
    make_parser,
    median_and_range,
    median_ratio,
    prepare_phantoms,
    report,
    wait_for_device,
)

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace
from nnunetv2_vf.settings.pretraining import PRETEXTS

CASES = 8
LOADED_BATCHES = 16  # timed in a turn without training
SUPERVISED, PRETRAINING = "nnUNetTrainer", "VFPretrainTrainer"


def main() -> None:
    parser = make_parser(__doc__, device=True, output=True)
    parser.add_argument("--network", default="U-Net", choices=[*NETWORK_PLANS])
    parser.add_argument("--pretext", default="fusion", choices=PRETEXTS)
    parser.add_argument("--workers", type=int, default=2, help="nnUNet_n_proc_DA; nnU-Net's default is 12")
    parser.add_argument("--steps", type=int, default=24, help="counted steps of a turn")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--spacing", type=float, default=6.0, help="mm; smaller voxels mean larger patches")
    parser.add_argument("--memory", type=float, default=2.0, help="target of planning, GB")
    args = parser.parse_args()
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), args.workers)
        plan = prepare_phantoms(workspace, CASES, args.spacing, args.network, args.memory)
        # nnU-Net reads its variables when it is imported
        os.environ |= {**workspace.environment, "nnUNet_vf_pretext": args.pretext}
        plans_name = NETWORK_PLANS[args.network][1]
        wait, step, load = measure(plans_name, args.device, args.workers, args.steps, args.rounds)
    rows = [
        {
            "trainer": name,
            "step, ms": median_and_range(step[name], 1e3, digits=0),
            f"step / {SUPERVISED}": f"{median_ratio(step[name], step[SUPERVISED]):.2f}",
            "wait for data, ms": median_and_range(wait[name], 1e3, digits=1),
            "wait / (wait + step)": f"{wait_share(wait[name], step[name]):.1%}",
            "loader alone, ms a batch": median_and_range(load[name], 1e3, digits=1),
        }
        for name in step
    ]
    plan_text = f"{args.network}, {args.pretext}, patch {by(plan['patch_size'])}, batch {plan['batch_size']}"
    about = f"{plan_text}, {args.workers} workers, {describe_device(args.device)}: median (range)"
    kind = "".join(f"_{value}" for value in (args.network, args.pretext) if value not in ("U-Net", "fusion"))
    report(args, f"pretrain_step{kind}_{args.device}", about, rows, waiting=wait, working=step, alone=load)


def wait_share(waits: list[float], steps: list[float]) -> float:
    wait, step = statistics.fmean(waits), statistics.fmean(steps)
    return wait / (wait + step)


def measure(plans_name: str, device: str, workers: int, steps: int, rounds: int) -> tuple[Seconds, Seconds, Seconds]:
    """Return, by trainer: the wait for each batch, the mean step of each turn, the mean time to load a batch."""
    # nnU-Net has two queues; each worker, and the thread between the queues, holds one more batch. Ours has fewer:
    # 6, rounded up to a multiple of the workers.
    queued = 2 * max(6, workers // 2) + workers + 1
    trainers = {name: make_trainer(name, plans_name, device) for name in (SUPERVISED, PRETRAINING)}
    wait, step, load = ({name: [] for name in trainers} for _ in range(3))
    for _ in range(rounds):
        for name, trainer in trainers.items():
            with fresh_workers(trainer):
                take_steps(trainer, queued)
                waits, working = take_steps(trainer, steps)
            wait[name] += waits
            step[name].append(working / steps)
            with fresh_workers(trainer):
                load[name].append(time_loader(trainer, queued))
        print(*(f"{name}: {statistics.median(step[name]):.2f} s" for name in trainers), sep=", ", flush=True)
    return wait, step, load


def make_trainer(name: str, plans_name: str, device: str) -> Any:
    """Return a trainer without workers that has taken its first step, which may compile the network."""
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args(
        str(PHANTOMS_ID), "3d_fullres", "all", name, plans_name, device=torch.device(device)
    )
    if device == "cuda":  # as nnUNetv2_train
        torch.backends.cudnn.benchmark = True
        torch.set_num_threads(1)
    trainer.disable_checkpointing = True  # on_train_end is called after every turn
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    take_steps(trainer, 1)
    end_workers(trainer)
    return trainer


def take_steps(trainer: Any, steps: int) -> tuple[list[float], float]:
    """Train; return the seconds that the device waited for each batch, and those of everything else together."""
    waits = []
    start = time.perf_counter()
    for _ in range(steps):
        before = time.perf_counter()
        batch = next(trainer.dataloader_train)
        waits.append(time.perf_counter() - before if is_idle(trainer.device) else 0.0)
        trainer.train_step(batch)
    wait_for_device(trainer.device)
    return waits, time.perf_counter() - start - sum(waits)


def is_idle(device: torch.device) -> bool:
    """True if a GPU has finished its queued work; a CPU never has any."""
    return device.type != "cuda" or torch.cuda.current_stream(device).query()


def time_loader(trainer: Any, queued: int) -> float:
    """Return the seconds per batch of the loader alone, after the batches that are queued by now."""
    for _ in range(queued):
        next(trainer.dataloader_train)
    start = time.perf_counter()
    for _ in range(LOADED_BATCHES):
        next(trainer.dataloader_train)
    return (time.perf_counter() - start) / LOADED_BATCHES


@contextmanager
def fresh_workers(trainer: Any) -> Iterator[None]:
    """Give the trainer workers with empty queues; end them when the context ends."""
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    trainer.on_train_epoch_start()
    yield
    end_workers(trainer)


def end_workers(trainer: Any) -> None:
    trainer.on_train_end()  # each trainer ends its own workers there
    alive = multiprocessing.active_children()
    if alive:
        raise RuntimeError(f"these workers would disturb the next turn: {alive}")


if __name__ == "__main__":
    main()
