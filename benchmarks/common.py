"""Shared by the benchmarks: command line options, contenders that take turns, the printed table and the result file."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace

RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
PEERS = {
    "MIS-FM": "https://github.com/openmedlab/MIS-FM",
    "PyMIC": "https://github.com/HiLab-git/PyMIC",
    "nnssl": "https://github.com/MIC-DKFZ/nnssl",
}
NETWORK_PLANS = {  # network -> the command that plans it, the name of the plans
    "U-Net": (("nnUNetv2_plan_experiment",), "nnUNetPlans"),
    "ResEnc-L": (("nnUNetv2_plan_experiment", "-pl", "nnUNetPlannerResEncL"), "nnUNetResEncUNetLPlans"),
    "PCT-Net": (("nnUNetv2_vf", "plan"), "PCTNetPlans"),
    "FMUNet": (("nnUNetv2_vf", "plan", "--network", "FMUNet"), "FMUNetPlans"),
}
PHANTOMS_ID = 1
PHANTOMS = f"Dataset{PHANTOMS_ID:03d}_Phantoms"

Seconds = dict[str, list[float]]  # contender -> seconds of each of its runs


# ---------------------------------------------------------------- command line


def make_parser(
    description: str | None,
    device: bool = False,
    peers: Sequence[str] = (),
    output: bool = False,
    work: bool = False,
) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of the script, with the options that the benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if device:
        parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    if peers:
        what = f"folder with the checkouts to compare with: {', '.join(peers)}; default: none"
        parser.add_argument("--peers", type=Path, metavar="FOLDER", help=what)
    if work:
        what = "for datasets, trainings and predictions; finished steps are not repeated"
        parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help=what)
    if output:
        parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file; default: in benchmarks/results")
    return parser


def find_peer(peers: Path | None, name: str) -> Path | None:
    """Return the checkout of a peer, or None, with a printed note, if there is none."""
    if peers is None:
        return None
    checkout = peers / name
    if checkout.is_dir():
        return checkout.resolve()
    print(f"{name} is left out: {checkout} does not exist; git clone {PEERS[name]} {checkout}")
    return None


# ---------------------------------------------------------------- data


def prepare_phantoms(
    workspace: Workspace, cases: int, spacing: float, network: str = "U-Net", memory: float = 2
) -> dict[str, Any]:
    """Plan and preprocess generated phantoms with nnU-Net's commands.

    Args:
        spacing: mm; smaller voxels mean larger patches.
        network: one of :data:`NETWORK_PLANS`.
        memory: target of planning, GB.

    Returns:
        The 3d_fullres configuration of the plans.
    """
    write_dataset(workspace.raw / PHANTOMS, range(cases), spacing=spacing)
    planning, plans_name = NETWORK_PLANS[network]
    workspace.run("nnUNetv2_extract_fingerprint", "-d", PHANTOMS_ID)
    workspace.run(*planning, "-d", PHANTOMS_ID, "-gpu_memory_target", memory, "-overwrite_plans_name", plans_name)
    workspace.run("nnUNetv2_preprocess", "-d", PHANTOMS_ID, "-plans_name", plans_name, "-c", "3d_fullres")
    plans = json.loads((workspace.preprocessed / PHANTOMS / f"{plans_name}.json").read_text())
    configuration: dict[str, Any] = plans["configurations"]["3d_fullres"]
    return configuration


# ---------------------------------------------------------------- measuring


def take_turns(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> Seconds:
    """Time every contender in turn (A B C A B C ...), so that a busy machine slows all of them alike.

    Args:
        repeats: counted runs of each contender, after ``warm_up`` runs that are not counted.
        clock: ``time.process_time`` counts processor time only, which other processes on the machine do not
            lengthen; use it for work on one core.
    """
    seconds: Seconds = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, run in contenders.items():
            start = clock()
            result = run()
            elapsed = clock() - start
            del result  # its memory is freed outside the measured time
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def wait_for_device(device: Any) -> None:
    """Wait until a GPU has finished its queued work."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def proportional_memory(pid: int) -> float:
    """Return the proportional set size of a process and all its descendants in MiB (Linux).

    Memory that they share counts once.

    Raises:
        OSError: one of them has just ended.
    """
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    own = sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    children = (file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children"))
    return own + sum(proportional_memory(int(child)) for of_thread in children for child in of_thread)


def time_command(
    command: Sequence[str], environment: Mapping[str, str], kill_after: float | None = None
) -> tuple[float, float]:
    """Run a command; return its seconds, start-up included, and the peak memory of all its processes in MiB (Linux).

    Args:
        kill_after: seconds after which the command is killed with SIGKILL.

    Raises:
        UserError: the command failed.
    """
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        with contextlib.suppress(OSError):  # a process has just ended
            peak = max(peak, proportional_memory(process.pid))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(1.0, kill_after or 1.0))  # measuring takes about 40 ms of processor time
        if kill_after is not None and time.perf_counter() - start > kill_after:
            process.kill()
            process.wait()
            return time.perf_counter() - start, round(peak)
    if process.returncode:
        raise UserError(f"{command[0]} failed with exit status {process.returncode}; its message is above")
    return time.perf_counter() - start, round(peak)


# ---------------------------------------------------------------- reporting


def median_and_range(values: Sequence[float], scale: float = 1, digits: int = 2) -> str:
    """Return ``median (lowest to highest)`` of values times ``scale``."""
    median, lowest, highest = (f"{scale * f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({lowest} to {highest})"


def median_ratio(values: Sequence[float], reference: Sequence[float]) -> float:
    return statistics.median(values) / statistics.median(reference)


def describe_device(device: str) -> str:
    """Return the GPU's name or the number of CPU threads, and the version of torch."""
    import torch

    if device == "cuda":
        return f"one {torch.cuda.get_device_name()}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    model = platform.processor() or platform.machine()
    return f"{threads} CPU core{'s' if threads > 1 else ''} ({model}), torch {torch.__version__}"


def by(sides: Iterable[Any]) -> str:
    """Return ``64 x 128 x 128`` for the sides of a shape or a spacing."""
    return " x ".join(f"{side:g}" for side in sides)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of rows with the same keys."""
    lines: list[Iterable[Any]] = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def write_result(file: Path, content: Any) -> None:
    """Write a JSON file, completely or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=2) + "\n")
    part.replace(file)


def report(args: argparse.Namespace, name: str, about: str, rows: Sequence[Mapping[str, Any]], **raw: Any) -> None:
    """Print the table; write it and the single measurements to ``--output``.

    Args:
        name: of the result file without its ending, unless ``--output`` is given.
        about: what was measured, and on what.
    """
    print(f"\n{about}\n\n{markdown_table(rows)}")
    write_result(args.output or RESULTS / f"{name}.json", {"about": about, "rows": rows, **raw})
