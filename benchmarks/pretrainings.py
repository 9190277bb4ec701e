"""The pretrainings of ``label_efficiency.py``, found again by a fingerprint."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cells import Cell, changes_of
from training_command import TrainingCommand, has_checkpoint, variables

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import VFSettings

PRETRAIN = "VFPretrainTrainer"
NNSSL = "nnssl"  # the entry "program" of a pretraining is this and a commit; without this entry it is PRETRAIN
WEIGHTS, REPORT = "vf_pretrained.pth", "pretext_report.json"


class Pretraining(NamedTuple):
    """The plans, which may have a patch of their own, and the settings of a pretraining."""

    plans: str
    settings: tuple[tuple[str, Any], ...]  # names and values, sorted

    @property
    def by_nnssl(self) -> bool:
        return str(dict(self.settings).get("program", "")).startswith(NNSSL)


class Pretrainings:
    """The pretrainings of an experiment, each in a folder named by its fingerprint.

    Args:
        workers: of a pretraining; its samples do not depend on it.
        nnssl: the Python of an environment with nnssl, for arms with a ``"program"``.
    """

    def __init__(
        self, config: Mapping[str, Any], command: TrainingCommand, workers: int = 0, nnssl: Path | None = None
    ):
        self.config, self.command, self.workers = config, command, workers
        self.workspace = command.workspace
        self.nnssl = nnssl.absolute() if nnssl else None  # commands run in another folder

    def of(self, cell: Cell) -> Pretraining:
        """Return the pretraining from which a cell starts."""
        settings = pretraining_settings(self.config, cell)
        return Pretraining(_pretrained_plans(self.config, cell), tuple(sorted(settings.items())))

    def settings_without_effect(self, cell: Cell) -> set[str]:
        """Return the names of the settings that the pretext of a cell's pretraining does not use."""
        settings = dict(self.of(cell).settings)
        of_pretext = {name: settings[name] for name in ("pretext", "fusion_map") if name in settings}
        return {*VFSettings(**of_pretext).without_effect}

    def fingerprint(self, pretraining: Pretraining) -> str:
        """Return the name of a pretraining's folder: a digest of its plans, settings and cases.

        Its weights may have been made on another machine: copy the folder, and they are found. It does not depend on
        the version of the code: after a change of the pretraining itself, take another ``--work``.
        """
        plans = json.loads(self._plans_file(pretraining).read_text())
        cases = self.config["split"]["labelled"] + self.config["split"]["validation"]
        content = json.dumps([plans, pretraining.settings, cases], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def require_program(self, pretraining: Pretraining) -> None:
        """Raise UserError if a pretraining has to be made by nnssl and nnssl is not there."""
        if not pretraining.by_nnssl or (self._folder(pretraining) / WEIGHTS).is_file():
            return
        if self.nnssl is None:
            raise UserError("an arm is pretrained by nnssl: add --nnssl PYTHON, or leave it out (--arms)")
        if shutil.which(self.nnssl) is None:
            raise UserError(f"--nnssl {self.nnssl}: there is no such program; it is the Python that has nnssl")

    def make(self, pretraining: Pretraining) -> Path:
        """Pretrain on the images of the labelled and validation cases; return the weights file."""
        folder, plans = self._folder(pretraining), pretraining.plans
        if pretraining.by_nnssl:
            return self._make_with_nnssl(pretraining, folder)
        fold = self.workspace.fold_folder(self.config["dataset"], PRETRAIN, "all", folder, plans)
        if not (fold / REPORT).is_file():
            flags = ["--c"] if has_checkpoint(fold) else []
            environment = variables("nnUNet_vf_", dict(pretraining.settings), self.workers)
            self.command.run(plans, PRETRAIN, "all", folder, *flags, **environment)
        return fold / WEIGHTS

    def _make_with_nnssl(self, pretraining: Pretraining, folder: Path) -> Path:
        weights, settings = folder / WEIGHTS, dict(pretraining.settings)
        if not weights.is_file():
            images = self.workspace.raw / self.config["dataset"] / "imagesTr"
            self.workspace.run(
                *(str(self.nnssl), Path(__file__).with_name("nnssl_pretraining.py")),
                *(images, self._plans_file(pretraining), "--folder", folder, "--device", self.command.device),
                *("--pretext", settings["pretext"], "--seed", settings.get("seed", 0)),
                *(("--mask-side", settings["mask_side"]) if "mask_side" in settings else ()),
                *("--epochs", settings["num_epochs"], "--iterations", settings["iterations_per_epoch"]),
            )
            self.workspace.run("nnUNetv2_vf", "convert", folder / "checkpoint_final.pth", "-o", weights)
        return weights

    def keep_report(self, pretraining: Pretraining, weights: Path, folder: Path) -> None:
        """Copy the report beside pretrained weights to a folder, under the fingerprint; nnssl writes none."""
        report = weights.with_name(REPORT)
        if report.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report, folder / f"{self.fingerprint(pretraining)}.json")

    def _folder(self, pretraining: Pretraining) -> Path:
        return self.workspace.folder / "pretraining" / self.fingerprint(pretraining)

    def _plans_file(self, pretraining: Pretraining) -> Path:
        return self.workspace.preprocessed / self.config["dataset"] / f"{pretraining.plans}.json"


def pretraining_settings(config: Mapping[str, Any], cell: Cell) -> dict[str, Any]:
    """Return the settings of the pretraining from which a cell of an experiment starts."""
    return {
        **config["pretraining"],
        **config["pretraining_plans"].get(_pretrained_plans(config, cell), {}).get("pretraining", {}),
        **config["arms"][cell.arm].get("pretraining", {}),
        **changes_of(config, cell.variant).get("pretraining", {}),
    }


def _pretrained_plans(config: Mapping[str, Any], cell: Cell) -> str:
    return str(config["plans"][cell.plans].get("pretrained_with", cell.plans))
