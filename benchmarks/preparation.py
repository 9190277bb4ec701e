"""The road before training: import, fingerprint and preprocessing, beside nnU-Net's own commands.

    python benchmarks/preparation.py --work FOLDER [--volumes 2000] [--spacing 5]

CT-like volumes (about 48x44x64 voxels of 5 mm, 240x220x320 of 1 mm) go through ``nnUNetv2_vf import``, ``fingerprint``
and ``preprocess``, and through ``nnUNetv2_extract_fingerprint`` and ``nnUNetv2_preprocess``, with 1 and with 2
processes. Each of our commands is then killed with SIGKILL after half of its time, and run again. At the end all files
are compared with those of nnU-Net.

Efficiency is the time with 1 process, divided by twice the time with 2. Memory is the proportional set size of all
processes. Writes ``preparation_VOLUMES_cpu.json``.

Duration: 1 hour on 2 CPU cores. Needs: Linux.
"""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from common import RESULTS, make_parser, markdown_table, time_command, write_result
from import_volumes import write_volumes

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

DATASET_ID, DATASET = 1, "Dataset001_Benchmark"
CASES = "nnUNetPlans_3d_fullres"  # the folder of the preprocessed cases
FINGERPRINT = "dataset_fingerprint.json"
STOCK = {"fingerprint": "nnUNetv2_extract_fingerprint", "preprocess": "nnUNetv2_preprocess"}


def main() -> None:
    parser = make_parser(__doc__, output=True, work=True)
    parser.add_argument("--volumes", type=int, default=2000)
    parser.add_argument("--spacing", type=float, default=5.0, metavar="MM")
    args = parser.parse_args()
    with one_line_errors():
        data = args.work / f"volumes_{args.volumes}_of_{args.spacing}_mm"
        if not data.is_dir():
            part = data.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            write_volumes(part, args.volumes, args.spacing)
            part.rename(data)
        runs = {name: Run(args.work / name, data) for name in ("ours", "stock")}
        rows = measure(runs["ours"], runs["stock"])
        killed = [measure_kill(Run(args.work / "killed", data), step, rows) for step in ("import", *STOCK)]
        compare(runs["ours"].cases, runs["stock"].cases)
        compare(args.work / "killed" / "preprocessed" / DATASET / CASES, runs["stock"].cases)
    result = {
        "machine": f"{os.cpu_count()} CPU cores",
        "volumes": args.volumes,
        "spacing, mm": args.spacing,
        "steps": rows,
        "killed": killed,
    }
    write_result(args.output or RESULTS / f"preparation_{args.volumes}_cpu.json", result)
    print(f"\n{markdown_table(rows)}\n\n{markdown_table(killed)}")


class Run:
    """A folder in which the three steps run, with our commands or with nnU-Net's."""

    def __init__(self, folder: Path, data: Path):
        self.workspace, self.data = Workspace(folder, processes=2), data
        self.dataset = self.workspace.preprocessed / DATASET
        self.cases = self.dataset / CASES

    def command(self, step: str, processes: int, is_stock: bool = False) -> list[str]:
        dataset = ["-d", str(DATASET_ID), "-np", str(processes)]
        flags = {
            "import": ["-n", "Benchmark", str(self.data)],
            "fingerprint": ["--clean"],
            "preprocess": ["-c", "3d_fullres"],
        }[step]
        if is_stock:
            return [str(Path(sys.executable).with_name(STOCK[step])), *dataset, *flags]
        return [sys.executable, "-m", "nnunetv2_vf", step, *dataset, *flags]

    def time(self, step: str, processes: int, is_stock: bool = False, kill_after: float | None = None) -> Any:
        command = self.command(step, processes, is_stock)
        measured = time_command(command, self.workspace.environment, kill_after)
        print(f"{step}, {processes} processes, {'nnU-Net' if is_stock else 'ours'}: {measured}", flush=True)
        return measured

    def plan(self) -> None:
        if not (self.dataset / "nnUNetPlans.json").is_file():
            self.workspace.run("nnUNetv2_plan_experiment", "-d", DATASET_ID)

    def forget(self, step: str) -> None:
        """Remove what a step has written."""
        if step == "import":
            shutil.rmtree(self.workspace.raw / DATASET, ignore_errors=True)
        elif step == "preprocess":
            for folder in (self.cases, self.dataset / "journals" / CASES):
                shutil.rmtree(folder, ignore_errors=True)


def measure(ours: Run, stock: Run) -> list[dict[str, Any]]:
    """Run each step with 1 and with 2 processes, ours and nnU-Net's in turn."""
    rows = []
    for step in ("import", *STOCK):
        runs = {"ours": ours, "nnU-Net": stock} if step in STOCK else {"ours": ours}
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for processes in (1, 2):
            for name, run in runs.items():
                run.forget(step)
                measured[name].append(run.time(step, processes, is_stock=name == "nnU-Net"))
        if step == "import":  # nnU-Net's commands begin with the imported dataset
            shutil.copytree(ours.workspace.raw / DATASET, stock.workspace.raw / DATASET, dirs_exist_ok=True)
        if step == "fingerprint":
            assert (ours.dataset / FINGERPRINT).read_bytes() == (stock.dataset / FINGERPRINT).read_bytes()
            ours.plan()
            stock.plan()
        rows += [describe(step, name, *values) for name, values in measured.items()]
    return rows


def describe(step: str, name: str, one: tuple[float, float], two: tuple[float, float]) -> dict[str, Any]:
    return {
        "step": step,
        "whose": name,
        "1 process, s": round(one[0], 1),
        "2 processes, s": round(two[0], 1),
        "efficiency": round(one[0] / (2 * two[0]), 2),
        "peak memory of 2, MiB": two[1],
    }


def measure_kill(run: Run, step: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Kill a step with 2 processes after half of its time, and run it again."""
    if step == "preprocess":
        run.plan()
    run.forget(step)
    (whole,) = (row["2 processes, s"] for row in rows if (row["step"], row["whose"]) == (step, "ours"))
    run.time(step, 2, kill_after=whole / 2)
    seconds, _ = run.time(step, 2)
    return {"step": step, "whole, s": whole, "killed after, s": round(whole / 2, 1), "then, s": round(seconds, 1)}


def compare(ours: Path, stock: Path) -> None:
    """Raise AssertionError unless two folders hold the same preprocessed cases."""
    names = sorted(file.name for file in stock.iterdir())
    assert sorted(file.name for file in ours.iterdir()) == names
    for name in names:
        np.testing.assert_equal(read(ours / name), read(stock / name), name)
    print(f"{len(names)} files of {ours} are equal to nnU-Net's")


def read(file: Path) -> np.ndarray | Mapping[str, Any]:
    if file.suffix == ".b2nd":
        array: np.ndarray = blosc2.open(str(file), mode="r")[:]
        return array
    content: Mapping[str, Any] = pickle.loads(file.read_bytes())
    return content


if __name__ == "__main__":
    main()
