"""Everything that waits for a GPU, in order of value and within a deadline.

    python benchmarks/gpu.py --minutes 9 [--peers FOLDER] [--results FOLDER]

Each measurement is a process of its own with its own time limit. Its result is written as soon as it is there: one JSON
file for each GPU, ``gpu_DEVICE.json``, and a table of it, ``gpu_DEVICE.md``. A measurement whose result is there is not
run again; one that would not fit into the rest of the time is left out, and shorter ones after it still run. One that
failed is tried again the next time.

Duration: as ``--minutes`` says; about 35 minutes for everything. Needs: a GPU, and 16 GB of its memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, find_peer, make_parser, markdown_table, write_result

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent / "tests"


@dataclass(frozen=True)
class Measurement:
    """A command that writes a JSON file, ``{result}`` in its arguments.

    Args:
        usual_s: it is started only if this much time is left.
        limit_s: it is killed after this time.
    """

    name: str
    command: tuple[str, ...]
    usual_s: float
    limit_s: float


class Results:
    """The results of one GPU, written after each measurement."""

    def __init__(self, folder: Path, device: str):
        name = re.sub(r"\W+", "_", device).strip("_")
        self.file, self.table = folder / f"gpu_{name}.json", folder / f"gpu_{name}.md"
        self.content: dict[str, Any] = {"device": device, "measurements": {}}
        if self.file.is_file():
            self.content = json.loads(self.file.read_text())

    def is_done(self, name: str) -> bool:
        return self.content["measurements"].get(name, {}).get("status") == "done"

    def add(self, name: str, outcome: dict[str, Any]) -> None:
        self.content["measurements"][name] = outcome
        write_result(self.file, self.content)
        self.table.write_text(make_page(self.content))


def make_page(content: dict[str, Any]) -> str:
    """Return a table of all measurements, then the tables of those that have several rows."""
    measured = content["measurements"]
    parts = [content["device"], markdown_table([make_row(name, outcome) for name, outcome in measured.items()])]
    for name, outcome in measured.items():
        result = outcome.get("result")
        rows = result.get("rows") if isinstance(result, dict) else result
        if rows:
            parts += [f"{name}: {result['about']}" if isinstance(result, dict) else name, markdown_table(rows)]
    return "\n\n".join(parts) + "\n"


def make_row(name: str, outcome: dict[str, Any]) -> dict[str, Any]:
    result = outcome.get("result")
    numbers = result if isinstance(result, dict) else {}
    columns = {
        **{"step, ms": "step_ms", "peak, GB": "peak_gb", "ready, s": "ready_s"},
        **{"kernels": "kernels", "moved, GB": "moved_gb"},
    }
    return {
        "measurement": name,
        "status": outcome["status"],
        **{column: numbers.get(key, "") for column, key in columns.items()},
        "took, s": f"{outcome['seconds']:.0f}",
    }


def main() -> None:
    parser = make_parser(__doc__, peers=("MIS-FM",))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    import torch

    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    run_schedule(measurements(args), Results(args.results, device), args.minutes, run)


def run_schedule(
    schedule: Sequence[Measurement],
    results: Results,
    minutes: float,
    run: Callable[[Measurement, float], dict[str, Any]],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Run the measurements that are not done, in order, as long as the time allows.

    Args:
        run: gets a measurement and the seconds after which to kill it; returns its outcome.
    """
    deadline = clock() + 60 * minutes
    for measurement in schedule:
        if results.is_done(measurement.name):
            continue
        left = deadline - clock()
        if left < measurement.usual_s:
            print(f"left out: {measurement.name}: {left:.0f} s left, it takes {measurement.usual_s:g}", flush=True)
            continue
        outcome = run(measurement, min(measurement.limit_s, left))
        results.add(measurement.name, outcome)
        print(f"{outcome['status']}: {measurement.name}, {outcome['seconds']:.0f} s", flush=True)


def run(measurement: Measurement, limit_s: float) -> dict[str, Any]:
    """Run a measurement; return its status, seconds, result and, if it failed, the end of its output."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        start = time.monotonic()
        process = subprocess.Popen(
            [argument.format(result=file) for argument in measurement.command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit_s)
            status = "done" if process.returncode == 0 else f"failed with exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            output, _ = process.communicate()
            status = f"killed after {limit_s:.0f} s"
        outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        if file.is_file():
            outcome["result"] = json.loads(file.read_text())
    if status != "done" or "result" not in outcome:
        outcome["output"] = output[-2000:]
    return outcome


def measurements(args: argparse.Namespace) -> list[Measurement]:
    """Return everything to measure, the most valuable first."""
    return [
        *training_steps(args.peers),
        gpu_tests(),
        *pretraining_steps(),
        *memory_of_plans(),
        script("a fused sample", "fusion.py", "--device", "cuda", usual_s=60, limit_s=120),
    ]


def training_steps(peers: Path | None) -> list[Measurement]:
    """PCT-Net's step beside MIS-FM's, then its variants, then FMUNet's."""
    compiled, contiguous = ("--compile", "network"), ("--layout", "contiguous")
    ours = {
        "eager": (),
        "compiled": compiled,
        "compiled, contiguous": (*compiled, *contiguous),
        "compiled, torch's PReLU": (*compiled, "--prelu", "torch"),
        "compiled, torch's PReLU, contiguous": (*compiled, *contiguous, "--prelu", "torch"),
        "compiled, PReLU by where": (*compiled, "--prelu", "where"),
        "compiled, cuDNN's benchmark": (*compiled, "--cudnn-benchmark"),
        "compiled block by block": ("--compile", "blocks"),
        "eager, contiguous": contiguous,
    }
    steps = [step(f"PCT-Net, {name}", "pct_net", *options) for name, options in ours.items()]
    steps += [step(f"FMUNet, {name}", "fmunet", *ours[name]) for name in ("eager", "compiled", "compiled, contiguous")]
    if find_peer(peers, "MIS-FM") is not None:
        steps.insert(0, step("MIS-FM's PCT-Net", "misfm", "--peers", str(peers)))
    return steps


def step(name: str, network: str, *options: str) -> Measurement:
    usual_s = 60 if "--compile" in options else 15  # compiling took up to 137 s on one H100
    return script(f"step: {name}", "gpu_step.py", network, *options, usual_s=usual_s, limit_s=180)


def gpu_tests() -> Measurement:
    """Return the tests that need a GPU; pytest writes no JSON."""
    command = (sys.executable, "-m", "pytest", str(TESTS), "-m", "gpu", "-p", "no:cacheprovider")
    return Measurement("tests that need a GPU", command, usual_s=90, limit_s=240)


def pretraining_steps() -> list[Measurement]:
    options = ("--device", "cuda", "--workers", "12", "--spacing", "2", "--rounds", "2")
    variants = {
        **{network: ("--network", network) for network in ("U-Net", "PCT-Net", "ResEnc-L")},
        **{f"U-Net, {pretext}": ("--pretext", pretext) for pretext in ("masked", "fusion+masked")},
    }
    return [
        script(f"pretraining step, {name}", "pretrain_step.py", *variant, *options, usual_s=120, limit_s=240)
        for name, variant in variants.items()
    ]


def memory_of_plans() -> list[Measurement]:
    options = ("--device", "cuda", "--compile", "--largest-step", "24", "--targets", "8", "24")
    return [
        script(f"memory of plans, {network}", "network_plans.py", network, *options, usual_s=200, limit_s=400)
        for network in ("PCT-Net", "FMUNet", "U-Net")
    ]


def script(name: str, file: str, *arguments: str, usual_s: float, limit_s: float) -> Measurement:
    """Return the measurement of a benchmark of this folder."""
    command = (sys.executable, str(FOLDER / file), *arguments, "--output", "{result}")
    return Measurement(name, command, usual_s, limit_s)


if __name__ == "__main__":
    main()
