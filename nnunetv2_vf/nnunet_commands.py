"""Run stock nnU-Net commands as a user would, with all of nnU-Net's folders below one of our own. Loads no torch."""

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


class Host:
    """nnU-Net in a folder: ``raw``, ``preprocessed`` and ``results`` below it, ``commands.log`` beside them.

    Args:
        folder: made if it does not exist.
        processes: workers for preprocessing and for loading data.

    The nnUNet_* variables of the caller are neither used nor changed.
    """

    def __init__(self, folder: Path, processes: int):
        self.folder = folder.resolve()
        self.raw, self.preprocessed, self.results = (self.folder / name for name in ("raw", "preprocessed", "results"))
        for each in (self.raw, self.preprocessed, self.results):
            each.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "commands.log"
        self.environment = {k: v for k, v in os.environ.items() if not k.lower().startswith("nnunet_")} | {
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            TRAINER_VARIABLE: trainer_path(""),
            "nnUNet_n_proc_DA": str(processes),
            "nnUNet_def_n_proc": str(processes),
            "PYTHONUNBUFFERED": "1",
            # waiting threads sleep: where another process wants a core too, spinning makes a step 20 times slower
            "OMP_WAIT_POLICY": "passive",
        }

    def run(self, command: str, *arguments: object, **variables: object) -> None:
        """Print a command, run it, and keep its output in ``commands.log``.

        Args:
            variables: further environment variables for this command; ``nnUNet_results=...`` for one.

        Raises:
            UserError: it failed; with the last line it printed.
        """
        words = [command, *map(str, arguments)]
        settings = {name: str(value) for name, value in variables.items()}
        line = " ".join([*(f"{name}={value}" for name, value in settings.items()), *words])
        print(f"$ {line}", end="", flush=True)
        start = time.monotonic()
        with self.log.open("a+") as log:
            log.write(f"$ {line}\n")
            log.flush()
            done = subprocess.run(
                [_script(command), *words[1:]],
                env={**self.environment, **settings},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        print(f"  # {time.monotonic() - start:.0f} s", flush=True)
        if done.returncode:
            last = self.log.read_text(errors="replace").rstrip().rpartition("\n")[2]
            raise UserError(f"{command} failed with exit status {done.returncode}: {last} (all of it: {self.log})")

    def evaluate(self, labels: Path, predictions: Path) -> dict[str, float]:
        """Score a folder that nnUNetv2_predict wrote; returns the mean Dice per label, and ``mean`` over the labels."""
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
        """Where nnUNetv2_train leaves a fold of configuration 3d_fullres."""
        return (results or self.results) / dataset / f"{trainer}__{plans}__3d_fullres" / f"fold_{fold}"


def trainer_path(present: str) -> str:
    """Our trainers' folder in front of what the variable already holds."""
    spec = importlib.util.find_spec("nnunetv2_vf.trainers")
    source_tree = Path(__file__).parent.parent / "trainers"
    ours = str(next(iter(spec.submodule_search_locations or ())) if spec else source_tree)
    others = [path for path in present.split(os.pathsep) if path and path != ours]
    return os.pathsep.join([ours, *others])


def _script(command: str) -> str:
    """The console script beside this Python; PATH is only the second choice."""
    found = shutil.which(command, path=str(Path(sys.executable).parent)) or shutil.which(command)
    if found is None:
        raise UserError(f"the command {command} is not installed; install it: pip install nnunetv2-vf")
    return found
