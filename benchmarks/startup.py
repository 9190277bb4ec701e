"""Time to the first batch, time of a batch and memory with up to 110,000 cases, beside nnU-Net.

    python benchmarks/startup.py [--cases 10 1000 10000 110000] [--workers 2] [--repeats 3]

nnU-Net's own commands plan and preprocess one generated phantom; the other cases are links to its files. For each
number of cases VFPretrainTrainer and nnUNetTrainer take turns: a process of its own makes the trainer as
``nnUNetv2_train`` does, starts it, and takes batches. Memory is the proportional set size of the process and its
workers, so that memory which they share counts once.

Duration: 7 minutes on 2 CPU cores. Needs: Linux, 2 CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import (
    PHANTOMS,
    PHANTOMS_ID,
    describe_device,
    make_parser,
    median_and_range,
    prepare_phantoms,
    proportional_memory,
    report,
)

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

TRAINERS = ("VFPretrainTrainer", "nnUNetTrainer")
BATCHES = 40
QUANTITIES = {  # name -> digits after the point
    "to the first batch, s": 1,
    "a further batch, ms": 0,
    "memory, MB": 0,
    "of that since the imports, MB": 0,
}


def main() -> None:
    parser = make_parser(__doc__, output=True)
    parser.add_argument("--cases", type=int, nargs="+", default=[10, 1000, 10_000, 110_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--start", choices=TRAINERS, help=argparse.SUPPRESS)  # in the process that is measured
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start_trainer(args.start)))
        return
    rows, raw = [], []
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder), processes=args.workers)
        prepare_phantoms(workspace, 1, spacing=2.0)
        for cases in sorted(args.cases):
            link_cases(workspace.preprocessed / PHANTOMS / "nnUNetPlans_3d_fullres", cases)
            for trainer, runs in measure(workspace, args.repeats).items():
                raw.append({"cases": cases, "trainer": trainer, **runs})
                values = {name: median_and_range(runs[name], digits=digits) for name, digits in QUANTITIES.items()}
                rows.append({"cases": f"{cases:,}", "trainer": trainer, **values})
                print(rows[-1], flush=True)
    about = f"{describe_device('cpu')}, {args.workers} workers: median (range)"
    report(args, "startup_cpu", about, rows, runs=raw)


def link_cases(folder: Path, count: int) -> None:
    """Add links to the files of the one real case until there are ``count`` cases."""
    (case,) = (path.stem for path in folder.glob("*.pkl") if not path.is_symlink())
    files = list(folder.glob(f"{case}*"))
    for number in range(len(list(folder.glob("*.pkl"))), count):
        for file in files:
            (folder / file.name.replace(case, f"link_{number:06d}")).symlink_to(file.name)


def measure(workspace: Workspace, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return the quantities of each trainer; each run is a process of its own, and the trainers take turns."""
    runs: dict[str, dict[str, list[float]]] = {trainer: {name: [] for name in QUANTITIES} for trainer in TRAINERS}
    for _ in range(repeats):
        for trainer, quantities in runs.items():
            command = [sys.executable, "-W", "ignore", __file__, "--start", trainer]
            done = subprocess.run(command, env=workspace.environment, stdout=subprocess.PIPE, text=True, check=True)
            for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                quantities[name].append(value)
    return runs


def start_trainer(name: str) -> dict[str, float]:
    """Make a trainer as nnUNetv2_train does, start it and take batches; return the quantities."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    imported, before = time.monotonic(), proportional_memory(os.getpid())
    trainer = get_trainer_from_args(str(PHANTOMS_ID), "3d_fullres", "all", name, device=torch.device("cpu"))
    trainer.on_train_start()
    next(trainer.dataloader_train)
    first = time.monotonic()
    for _ in range(BATCHES):
        next(trainer.dataloader_train)
    last = time.monotonic()
    after = proportional_memory(os.getpid())
    trainer.disable_checkpointing = True
    trainer.on_train_end()  # ends the workers
    values = (first - imported, 1e3 * (last - first) / BATCHES, after, after - before)
    return dict(zip(QUANTITIES, values, strict=True))


if __name__ == "__main__":
    main()
