"""Everything that waits for a GPU, in order of value and within a deadline.

    python benchmarks/gpu.py --minutes 9 [--peers FOLDER] [--results FOLDER]

Each measurement is a process of its own with its own time limit, and with empty caches of the compiler. Its result is
written as soon as it is there: one JSON file for each GPU, ``gpu_DEVICE.json``, and a table of it, ``gpu_DEVICE.md``. A
measurement whose result is there is not run again: to repeat it after a change, delete its entry. One that would not
fit into the rest of the time is left out, and shorter ones after it still run. One that failed is tried again the next
time.

Where the packages are only on PYTHONPATH, so that nnU-Net's commands are not installed::

    make package_as_installed
    PYTHONPATH=build/package:$PYTHONPATH python benchmarks/gpu.py --minutes 9

Duration: as ``--minutes`` says; about two hours for everything. Needs: a GPU, and 24 GB of its memory.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from common import RESULTS, find_peer, make_parser, markdown_table, write_result

import nnunetv2_vf

FOLDER = Path(__file__).parent
TESTS = FOLDER.parent / "tests"
MISFM = "step: MIS-FM's PCT-Net"
COMPILED = ("--compile", "network")
COMPILED_S = 160  # a compiled step, from start to end; compiling took up to 137 s on one H100


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
        """Write an outcome, with its origin: the day, and a digest of the package's code."""
        origin = {"day": datetime.date.today().isoformat(), "code": digest_of_code()}
        self.content["measurements"][name] = {**outcome, **origin}
        write_result(self.file, self.content)
        self.table.write_text(make_page(self.content))


def make_page(content: dict[str, Any]) -> str:
    """Return a table of all measurements, then the tables of those that have several rows."""
    measured = content["measurements"]
    reference = measured.get(MISFM, {}).get("result", {}).get("step_ms")
    rows = [make_row(name, outcome, reference) for name, outcome in measured.items()]
    parts = [content["device"], markdown_table(rows)]
    for name, outcome in measured.items():
        result = outcome.get("result")
        rows = result.get("rows") if isinstance(result, dict) else result
        if rows:
            parts += [f"{name}: {result['about']}" if isinstance(result, dict) else name, markdown_table(rows)]
    return "\n\n".join(parts) + "\n"


def make_row(name: str, outcome: dict[str, Any], reference_ms: float | None) -> dict[str, Any]:
    """Return the numbers of a measurement; its step also as a share of the reference's."""
    result = outcome.get("result")
    numbers = result if isinstance(result, dict) else {}
    columns = {
        **{"peak, GB": "peak_gb", "ready, s": "ready_s", "kernels": "kernels", "moved, GB": "moved_gb"},
        **{"graph breaks": "graph_breaks"},
    }
    step_ms = numbers.get("step_ms", "")
    return {
        "measurement": name,
        "status": outcome["status"],
        "step, ms": step_ms,
        "of MIS-FM": f"{step_ms / reference_ms:.2f}" if step_ms and reference_ms else "",
        **{column: "" if numbers.get(key) is None else numbers[key] for column, key in columns.items()},
        "took, s": f"{outcome['seconds']:.0f}",
        "day": outcome.get("day", ""),
    }


def digest_of_code() -> str:
    """Return a digest of the package's Python files, which tells results of different versions apart."""
    digest = hashlib.sha256()
    for file in sorted(Path(nnunetv2_vf.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def main() -> None:
    parser = make_parser(__doc__, peers=("MIS-FM",))
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        parser.error("torch sees no GPU on this machine")
    if args.peers is None:
        print("MIS-FM is left out; to measure it too: --peers FOLDER")
    commands = tempfile.TemporaryDirectory()
    add_missing_commands(Path(commands.name))
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    run_schedule(measurements(args), Results(args.results, device), args.minutes, run)


def add_missing_commands(folder: Path) -> None:
    """Write scripts for the commands of nnU-Net and of this package that are not installed; put them on PATH."""
    starts = {script.name: script.value for script in entry_points(group="console_scripts") if "nnUNet" in script.name}
    starts["nnUNetv2_vf"] = "nnunetv2_vf.cli:main"
    for name, start in starts.items():
        if shutil.which(name) is None and shutil.which(name, path=str(Path(sys.executable).parent)) is None:
            module, _, function = start.partition(":")
            code = f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n"
            (folder / name).write_text(code)
            (folder / name).chmod(0o755)
    os.environ["PATH"] += f"{os.pathsep}{folder}"


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
        file, log = Path(folder) / "result.json", Path(folder) / "output.txt"
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        start = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [argument.format(result=file) for argument in measurement.command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **caches},
                start_new_session=True,
            )
        try:
            returncode = process.wait(limit_s)
            status = "done" if returncode == 0 else f"failed with exit status {returncode}"
        except subprocess.TimeoutExpired:
            status = f"killed after {limit_s:.0f} s"
        finally:  # also after Ctrl-C
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
        outcome: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        if file.is_file():
            outcome["result"] = json.loads(file.read_text())
        if status != "done" or "result" not in outcome:
            outcome["output"] = log.read_text(errors="replace")[-10_000:]
    return outcome


def measurements(args: argparse.Namespace) -> list[Measurement]:
    """Return everything to measure, the most valuable first."""
    return [
        *training_steps(args.peers),
        *gpu_tests(),
        *pretraining_steps(),
        *memory_of_plans(),
        *fmunet_steps(),
        script("a fused sample", "fusion.py", "--device", "cuda", usual_s=60, limit_s=120),
    ]


def training_steps(peers: Path | None) -> list[Measurement]:
    """PCT-Net's step beside MIS-FM's, then its variants.

    Not among them: channels padded to 32, the attention bias made once for each step, norm statistics computed in the
    convolution before. They need a change of the network, and a GPU to see what it gains.
    """
    compiled, contiguous, benchmark = COMPILED, ("--layout", "contiguous"), ("--cudnn-benchmark",)
    ours = {
        "eager": (),
        "compiled": compiled,
        "compiled, contiguous": (*compiled, *contiguous),
        "compiled, cuDNN's benchmark": (*compiled, *benchmark),
        "compiled, contiguous, cuDNN's benchmark": (*compiled, *contiguous, *benchmark),
        "compiled block by block": ("--compile", "blocks"),
        "compiled, torch's PReLU": (*compiled, "--prelu", "torch"),
        "compiled, torch's PReLU, contiguous": (*compiled, *contiguous, "--prelu", "torch"),
        "compiled, PReLU by where": (*compiled, "--prelu", "where"),
        "eager, contiguous": contiguous,
    }
    steps = [step(f"PCT-Net, {name}", "pct_net", *options) for name, options in ours.items()]
    if find_peer(peers, "MIS-FM") is not None:
        steps.insert(0, step(MISFM.removeprefix("step: "), "misfm", "--peers", str(peers)))
    return steps


def fmunet_steps() -> list[Measurement]:
    variants = {"eager": (), "compiled": COMPILED, "compiled, channels-last": (*COMPILED, "--layout", "channels_last")}
    return [step(f"FMUNet, {name}", "fmunet", *options) for name, options in variants.items()]


def step(name: str, network: str, *options: str) -> Measurement:
    usual_s = COMPILED_S if "--compile" in options else 20
    return script(f"step: {name}", "gpu_step.py", network, *options, usual_s=usual_s, limit_s=240)


def gpu_tests() -> list[Measurement]:
    """Return the tests that need a GPU, those that compile one by one; pytest writes no JSON."""
    options = ("-m", "gpu", "-p", "no:cacheprovider", "-v", "--tb=short")
    pytest = (sys.executable, "-m", "pytest", *options)
    compiling = {
        "U-Net": "stopped_and_continued and nnUNetPlans",
        "PCT-Net": "stopped_and_continued and PCTNetPlans",
        "torchrun": "torchrun",
    }
    tests = [
        Measurement("tests: no step waits for the GPU", (*pytest, str(TESTS / "training" / "test_step.py")), 60, 180)
    ]
    for name, selected in compiling.items():
        command = (*pytest, str(TESTS / "test_gpu.py"), "-k", selected)
        tests.append(Measurement(f"test: compiled training, {name}", command, usual_s=300, limit_s=500))
    return tests


def pretraining_steps() -> list[Measurement]:
    """A step of pretraining beside nnU-Net's, with the memory targets for which nnU-Net plans these networks."""
    options = ("--device", "cuda", "--workers", "12", "--spacing", "2", "--rounds", "2")
    variants = {
        **{network: ("--network", network, "--memory", "8") for network in ("U-Net", "PCT-Net")},
        "ResEnc-L": ("--network", "ResEnc-L", "--memory", "24"),
        **{f"U-Net, {pretext}": ("--pretext", pretext, "--memory", "8") for pretext in ("masked", "fusion+masked")},
    }
    return [  # both trainers compile
        script(f"pretraining step, {name}", "pretrain_step.py", *variant, *options, usual_s=330, limit_s=540)
        for name, variant in variants.items()
    ]


def memory_of_plans() -> list[Measurement]:
    """The planner's estimate beside the peak: one plan for each process, because torch keeps what it compiled."""
    options = ("--device", "cuda", "--compile", "--largest-step", "24")
    plans = [("isotropic", "8"), ("anisotropic", "8"), ("isotropic", "24"), ("large", "24"), ("tiny", "8")]
    return [
        script(
            *(f"memory of plans, {network}, {fingerprint}, {target} GB", "network_plans.py", network, *options),
            *("--fingerprints", fingerprint, "--targets", target),
            usual_s=200,
            limit_s=400,
        )
        for network in ("PCT-Net", "FMUNet", "U-Net")
        for fingerprint, target in plans
    ]


def script(name: str, file: str, *arguments: str, usual_s: float, limit_s: float) -> Measurement:
    """Return the measurement of a benchmark of this folder."""
    command = (sys.executable, str(FOLDER / file), *arguments, "--output", "{result}")
    return Measurement(name, command, usual_s, limit_s)


if __name__ == "__main__":
    main()
