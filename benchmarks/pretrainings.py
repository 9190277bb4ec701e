"""The pretrainings of ``label_efficiency.py``, found again by a fingerprint, and the command that runs a training."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cells import DEFAULT_VARIANT, Cell

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace

PRETRAIN = "VFPretrainTrainer"
NNSSL = "nnssl"  # the entry "program" of a pretraining; without this entry it is PRETRAIN
WEIGHTS, REPORT = "vf_pretrained.pth", "pretext_report.json"


def train(
    workspace: Workspace,
    dataset: str,
    device: str,
    plans: str,
    trainer: str,
    fold: int | str,
    results: Path,
    *flags: object,
    **environment: object,
) -> None:
    """Run nnUNetv2_train; ``environment`` holds variables in addition to those of the workspace."""
    common = ("-p", plans, "-tr", trainer, "-device", device)
    command = ("nnUNetv2_train", dataset, "3d_fullres", fold, *common, *flags)
    workspace.run(*map(str, command), nnUNet_results=results, **environment)


def variables(prefix: str, settings: Mapping[str, Any], workers: int = 0) -> dict[str, Any]:
    """Return the environment variables of a training.

    Without workers a fine-tuning draws its samples itself: the same samples in the same order on any machine.
    torch.compile is off: such a short training would not win back the time for compiling.
    """
    return {
        "nnUNet_n_proc_DA": workers,
        "nnUNet_compile": "f",
        **{f"{prefix}{name}": value for name, value in settings.items()},
    }


def has_checkpoint(fold: Path) -> bool:
    """True if ``--c`` can continue the training of this folder."""
    return any((fold / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best"))


def changes_of(config: Mapping[str, Any], variant: str) -> Mapping[str, Any]:
    """Return what a variant of an experiment changes, by kind of training."""
    return {} if variant == DEFAULT_VARIANT else config["variants"][variant]


class Source(NamedTuple):
    """A pretraining: its plans, which may have a patch of their own, and its settings."""

    plans: str
    settings: tuple[tuple[str, Any], ...]  # names and values, sorted


class Pretrainings:
    """The pretrainings of an experiment, each in a folder named by its fingerprint.

    Args:
        workers: of a pretraining; its samples do not depend on it.
        nnssl: the Python of an environment with nnssl, for arms with ``"program": "nnssl"``.
    """

    def __init__(
        self, config: Mapping[str, Any], workspace: Workspace, device: str, workers: int = 0, nnssl: Path | None = None
    ):
        self.config, self.workspace, self.device, self.workers = config, workspace, device, workers
        self.nnssl = nnssl.absolute() if nnssl else None  # commands run in another folder

    def of(self, cell: Cell) -> Source:
        """Return the pretraining from which a cell starts."""
        plans = str(self.config["plans"][cell.plans].get("pretrained_with", cell.plans))
        settings = {
            **self.config["pretraining"],
            **self.config["pretraining_plans"].get(plans, {}).get("pretraining", {}),
            **self.config["arms"][cell.arm].get("pretraining", {}),
            **changes_of(self.config, cell.variant).get("pretraining", {}),
        }
        return Source(plans, tuple(sorted(settings.items())))

    def fingerprint(self, source: Source) -> str:
        """Return the name of a pretraining's folder: a digest of its plans, settings and cases.

        Its weights may have been made on another machine: copy the folder, and they are found.
        """
        plans = json.loads(self._plans_file(source).read_text())
        cases = self.config["split"]["labelled"] + self.config["split"]["validation"]
        content = json.dumps([plans, source.settings, cases], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def require_program(self, source: Source) -> None:
        """Raise UserError if a pretraining has to be made by nnssl and nnssl is not there."""
        if dict(source.settings).get("program") != NNSSL or self.nnssl is not None:
            return
        weights = self._folder(source) / WEIGHTS
        if not weights.is_file():
            raise UserError(f"no {weights}; nnssl makes it: add --nnssl PYTHON, or leave its arms out (--arms)")

    def make(self, source: Source) -> Path:
        """Pretrain on the images of the labelled and validation cases; return the weights file."""
        settings, folder, dataset = dict(source.settings), self._folder(source), self.config["dataset"]
        if settings.get("program") == NNSSL:
            return self._make_with_nnssl(source, folder)
        fold = self.workspace.fold_folder(dataset, PRETRAIN, "all", folder, source.plans)
        if not (fold / REPORT).is_file():
            flags = ["--c"] if has_checkpoint(fold) else []
            environment = variables("nnUNet_vf_", settings, self.workers)
            train(self.workspace, dataset, self.device, source.plans, PRETRAIN, "all", folder, *flags, **environment)
        return fold / WEIGHTS

    def _make_with_nnssl(self, source: Source, folder: Path) -> Path:
        weights, settings = folder / WEIGHTS, dict(source.settings)
        if not weights.is_file():
            images = self.workspace.raw / self.config["dataset"] / "imagesTr"
            self.workspace.run(
                *(str(self.nnssl), Path(__file__).with_name("nnssl_pretraining.py")),
                *(images, self._plans_file(source), "--folder", folder, "--device", self.device),
                *("--pretext", settings["pretext"], "--mask-side", settings.get("mask_side", 16)),
                *("--epochs", settings["num_epochs"], "--iterations", settings["iterations_per_epoch"]),
            )
            self.workspace.run("nnUNetv2_vf", "convert", folder / "checkpoint_final.pth", "-o", weights)
        return weights

    def keep_report(self, source: Source, weights: Path, folder: Path) -> None:
        """Copy the report beside pretrained weights to a folder, under the fingerprint; nnssl writes none."""
        report = weights.with_name(REPORT)
        if report.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report, folder / f"{self.fingerprint(source)}.json")

    def _folder(self, source: Source) -> Path:
        return self.workspace.folder / "pretraining" / self.fingerprint(source)

    def _plans_file(self, source: Source) -> Path:
        return self.workspace.preprocessed / self.config["dataset"] / f"{source.plans}.json"
