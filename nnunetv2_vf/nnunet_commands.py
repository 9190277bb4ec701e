"""Run nnU-Net's commands as a user does, in a folder of their own. Does not import torch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from nnunetv2_vf.errors import UserError

TRAINER_VARIABLE = "nnUNet_extTrainer"


class Workspace:
    """A folder with its own ``raw``, ``preprocessed`` and ``results``, in which nnU-Net's commands run.

    The commands write their output to ``commands.log``. The caller's nnUNet_* variables are neither used nor changed.

    Args:
        folder: created if it does not exist.
        processes: number of workers for preprocessing and for data loading.
    """

    def __init__(self, folder: Path, processes: int):
        self.folder = folder.resolve()
        self.raw, self.preprocessed, self.results = (self.folder / name for name in ("raw", "preprocessed", "results"))
        for subfolder in (self.raw, self.preprocessed, self.results):
            subfolder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "commands.log"
        self.environment = {k: v for k, v in os.environ.items() if not k.lower().startswith("nnunet_")} | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            TRAINER_VARIABLE: trainer_path(""),
            "nnUNet_n_proc_DA": str(processes),
            "nnUNet_def_n_proc": str(processes),
            "PYTHONUNBUFFERED": "1",
            # Waiting OpenMP threads sleep: if they spin while another process needs the core, a step takes 20 times
            # as long.
            "OMP_WAIT_POLICY": "passive",
        }

    def run(self, command: str, *arguments: object, **variables: object) -> None:
        """Print a command, run it, and append its output to ``commands.log``.

        Args:
            variables: additional environment variables for this command, for example ``nnUNet_results=...``.

        Raises:
            UserError: the command failed; the message holds the last line of its output.
        """
        words = [command, *map(str, arguments)]
        assignments = {name: str(value) for name, value in variables.items()}
        line = " ".join([*(f"{name}={value}" for name, value in assignments.items()), *words])
        print(f"$ {line}", end="", flush=True)
        start = time.monotonic()
        with self.log.open("a") as log:
            log.write(f"$ {line}\n")
            log.flush()
            done = subprocess.run(
                [_find_script(command), *words[1:]],
                env={**self.environment, **assignments},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        print(f"  # {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            last_line = self.log.read_text(errors="replace").rstrip().rpartition("\n")[2]
            raise UserError(
                f"{command} failed with exit status {done.returncode}: {last_line} (all of its output: {self.log})"
            )

    def evaluate(self, labels: Path, predictions: Path) -> dict[str, float]:
        """Return the mean Dice of each label in a folder written by nnUNetv2_predict, and their ``mean``."""
        summary_file = predictions / "summary.json"
        if not summary_file.is_file():
            self.run(
                "nnUNetv2_evaluate_folder", labels, predictions, "-np", 2,
                "-djfile", predictions / "dataset.json", "-pfile", predictions / "plans.json",
            )  # fmt: skip
        summary = json.loads(summary_file.read_text())
        per_label = {label: float(metrics["Dice"]) for label, metrics in summary["mean"].items()}
        return {**per_label, "mean": float(summary["foreground_mean"]["Dice"])}

    def fold_folder(
        self, dataset: str, trainer: str, fold: int | str, results: Path | None = None, plans: str = "nnUNetPlans"
    ) -> Path:
        """Return the folder in which nnUNetv2_train keeps a fold of the configuration 3d_fullres."""
        return (results or self.results) / dataset / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"


def trainer_path(current: str) -> str:
    """Return the value for nnUNet_extTrainer: the folder of our trainers, then the folders of its current value."""
    spec = importlib.util.find_spec("nnunetv2_vf.trainers")
    source_tree = Path(__file__).parent.parent / "trainers"
    trainers = str(next(iter(spec.submodule_search_locations or ())) if spec else source_tree)
    others = [path for path in current.split(os.pathsep) if path and path != trainers]
    return os.pathsep.join([trainers, *others])


def _find_script(command: str) -> str:
    """Return the path of a console script: the one beside this Python, else the first one on PATH."""
    script = shutil.which(command, path=str(Path(sys.executable).parent)) or shutil.which(command)
    if script is None:
        raise UserError(f"the command {command} is not installed; install it: pip install nnunetv2-vf")
    return script
