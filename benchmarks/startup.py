"""Start-up and growth of pretraining, and of nnU-Net: 10 to 110,000 cases, until the first batch and beyond.

    python benchmarks/startup.py [--cases 10 1000 110000] [--workers 2] [--repeats 3] [--out FOLDER]

nnU-Net's own commands plan and preprocess one generated phantom; the other cases are links to its files. For each
number of cases, VFPretrainTrainer and nnUNetTrainer take turns: a process of its own makes the trainer as
``nnUNetv2_train`` does, starts it, and takes batches. Prints a Markdown table; writes ``docs/startup_cpu.json``. Memory
is the proportional set size of the process and its workers, so that what they share counts once.
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

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Host

DATASET_ID = 1
DATASET = f"Dataset{DATASET_ID:03d}_Phantoms"
TRAINERS = ("VFPretrainTrainer", "nnUNetTrainer")
BATCHES = 40
DIGITS = {"to the first batch, s": 1, "a further batch, ms": 0, "memory, MB": 0, "of that since the imports, MB": 0}
Runs = dict[str, list[float]]  # by quantity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[10, 1000, 10_000, 110_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where to keep everything; default: a temporary folder")
    parser.add_argument("--docs", type=Path)
    parser.add_argument("--start", choices=TRAINERS, help=argparse.SUPPRESS)  # the process that is measured
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start)))
        return
    from side_by_side import DOCS, machine, report, summary
    from torch import device

    with one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        host = Host(args.out or Path(temporary), processes=args.workers)
        folder = preprocess_one(host)
        rows, raw = [], []
        for cases in sorted(args.cases):
            link_cases(folder, cases)
            for trainer, runs in in_turn(host, args.repeats).items():
                raw.append({"cases": cases, "trainer": trainer, **runs})
                values = {name: summary(runs[name], unit=1, digits=digits) for name, digits in DIGITS.items()}
                rows.append({"cases": f"{cases:,}", "trainer": trainer, **values})
                print(rows[-1], flush=True)
    about = f"{machine(device('cpu'))}, {args.workers} workers: median (range)"
    report("startup_cpu", about, rows, args.docs or DOCS, runs=raw)


def preprocess_one(host: Host) -> Path:
    """The folder of the preprocessed phantom."""
    write_dataset(host.raw / DATASET, range(1), spacing=2.0)
    host.run("nnUNetv2_plan_and_preprocess", "-d", DATASET_ID, "-c", "3d_fullres", "-gpu_memory_target", 2)
    return host.preprocessed / DATASET / "nnUNetPlans_3d_fullres"


def link_cases(folder: Path, count: int) -> None:
    """Add links to the one case until there are ``count``."""
    (case,) = (path.stem for path in folder.glob("*.pkl") if not path.is_symlink())
    files = list(folder.glob(f"{case}*"))
    for number in range(len(list(folder.glob("*.pkl"))), count):
        for file in files:
            (folder / file.name.replace(case, f"link_{number:06d}")).symlink_to(file.name)


def in_turn(host: Host, repeats: int) -> dict[str, Runs]:
    """What each trainer took, in processes of their own: A B A B ..."""
    runs: dict[str, Runs] = {trainer: {name: [] for name in DIGITS} for trainer in TRAINERS}
    for _ in range(repeats):
        for trainer, quantities in runs.items():
            for name, value in started_apart(host, trainer).items():
                quantities[name].append(value)
    return runs


def started_apart(host: Host, trainer: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--start", trainer]
    done = subprocess.run(command, env=host.environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def start(name: str) -> dict[str, float]:
    """Make a trainer as nnUNetv2_train does, start it, take batches; what that took."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    imported, before = time.monotonic(), memory()
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", "all", name, device=torch.device("cpu"))
    trainer.on_train_start()
    next(trainer.dataloader_train)
    first = time.monotonic()
    for _ in range(BATCHES):
        next(trainer.dataloader_train)
    last = time.monotonic()
    after = memory()
    trainer.disable_checkpointing = True
    trainer.on_train_end()  # ends the workers
    values = (first - imported, 1e3 * (last - first) / BATCHES, after, after - before)
    return dict(zip(DIGITS, values, strict=True))


def memory() -> float:
    """Proportional set size of this process and its children, MB."""
    me = os.getpid()
    family = [me, *(int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and parent(p) == me)]
    lines = [line for pid in family for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # has ended
        return -1


if __name__ == "__main__":
    main()
