"""The dataset of a few-labels experiment in nnU-Net's folders: cases, folds, plans and true labels."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import segmentation_scores
from common import NETWORK_PLANS

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace

MAX_SEEDS = 100  # folds in nnU-Net's split file for each number of labels
FOLDERS = {  # of images and labels, by the role of a case
    "labelled": ("imagesTr", "labelsTr"),
    "validation": ("imagesTr", "labelsTr"),
    "test": ("imagesTs", "labelsTs"),
}


class ExperimentData:
    """The dataset of an experiment, below the folder of a workspace.

    Args:
        config: of the experiment; its ``"split"`` has the cases of each role: labelled, validation and test.
    """

    def __init__(self, config: Mapping[str, Any], workspace: Workspace):
        self.config, self.workspace, self.name = config, workspace, config["dataset"]
        self.raw, self.preprocessed = workspace.raw / self.name, workspace.preprocessed / self.name

    @property
    def test_images(self) -> Path:
        """The folder with the images of the test cases."""
        return self.raw / FOLDERS["test"][0]

    @property
    def _id(self) -> int:
        return int(self.name.removeprefix("Dataset")[:3])

    def prepare(self, source: Path) -> None:
        """Copy the cases, the test cases apart from the others; plan, preprocess, and derive the smaller plans.

        What is there is not done again.

        Args:
            source: the folder of the dataset in nnU-Net's raw format.

        Raises:
            UserError: files of the dataset are missing in ``source``.
        """
        finished = self.workspace.folder / "prepared"
        bases = {change.get("of", name) for name, change in self.config["plans"].items()}
        if not finished.exists():
            self._copy_cases(source)
            self._fingerprint_and_split()
            self._plan_and_preprocess(bases)
            finished.touch()
        planned = {file.stem for file in self.preprocessed.glob("*.json")}
        self._plan_and_preprocess(bases - planned)  # of networks that were added to the experiment
        for name, change in {**self.config["plans"], **self.config["pretraining_plans"]}.items():
            if "of" in change:
                self._derive_plans(name, **change)

    def classes(self) -> dict[str, int]:
        """Return the label values by class name, without the background, in the order of nnU-Net's pseudo Dice."""
        labels = json.loads((self.raw / "dataset.json").read_text())["labels"]
        return {name: labels[name] for name in sorted(labels, key=labels.get) if labels[name] > 0}

    def score(self, role: str, predictions: Path, largest_component: bool = False) -> list[dict[str, Any]]:
        """Return the scores of a folder of predictions, one row for each case and class.

        Args:
            role: of the cases: labelled, validation or test.
            largest_component: score only the largest connected component of each class.
        """
        rows, truth = [], self.raw / FOLDERS[role][1]
        for case in self.config["split"][role]:
            files = (truth / f"{case}.nii.gz", predictions / f"{case}.nii.gz")
            for name, value in self.classes().items():
                rows.append(
                    {"case": case, "class": name, **segmentation_scores.score(*files, value, largest_component)}
                )
        return rows

    def _copy_cases(self, source: Path) -> None:
        split = self.config["split"]
        self._require_files(source, [case for role in FOLDERS for case in split[role]])
        for role, (images, labels) in FOLDERS.items():
            for folder in (images, labels):
                (self.raw / folder).mkdir(parents=True, exist_ok=True)
            for case in split[role]:
                shutil.copyfile(source / "imagesTr" / f"{case}_0000.nii.gz", self.raw / images / f"{case}_0000.nii.gz")
                shutil.copyfile(source / "labelsTr" / f"{case}.nii.gz", self.raw / labels / f"{case}.nii.gz")
        description = json.loads((source / "dataset.json").read_text())
        training_cases = len(split["labelled"] + split["validation"])
        (self.raw / "dataset.json").write_text(json.dumps({**description, "numTraining": training_cases}))

    def _require_files(self, source: Path, cases: Sequence[str]) -> None:
        """Raise UserError unless a folder holds dataset.json, and image and labels of all cases."""
        files = [f"imagesTr/{case}_0000.nii.gz" for case in cases] + [f"labelsTr/{case}.nii.gz" for case in cases]
        missing = [file for file in ("dataset.json", *files) if not (source / file).is_file()]
        if missing:
            raise UserError(
                f"{source} is not {self.name}: {len(missing)} files are missing, the first is {missing[0]}; where it "
                f"comes from: {self.config['source']}"
            )

    def _fingerprint_and_split(self) -> None:
        """Make the fingerprint, and one fold for every number of labels and seed."""
        self.workspace.run("nnUNetv2_extract_fingerprint", "-d", self._id, "-np", 2)
        folds = [draw_fold(self.config, labels, seed) for labels in self.config["labels"] for seed in range(MAX_SEEDS)]
        (self.preprocessed / "splits_final.json").write_text(json.dumps(folds))

    def _plan_and_preprocess(self, bases: Collection[str]) -> None:
        """Run nnU-Net's planning and preprocessing for these plans."""
        run, spacing = self.workspace.run, self.config.get("spacing", ())
        for command, plans in NETWORK_PLANS.values():
            if plans in bases:
                run(*command, "-d", self._id, *(("-overwrite_target_spacing", *spacing) if spacing else ()))
                run("nnUNetv2_preprocess", "-d", self._id, "-plans_name", plans, "-c", "3d_fullres", "-np", 2)

    def _derive_plans(
        self,
        name: str,
        of: str,
        features: Sequence[int] = (),
        batch_size: int | None = None,
        patch_size: Sequence[int] = (),
        **_: Any,
    ) -> None:
        """Write plans with other features, batch or patch; they use the preprocessed data of the original plans."""
        plans = json.loads((self.preprocessed / f"{of}.json").read_text())
        plans["plans_name"] = name
        configuration = plans["configurations"]["3d_fullres"]
        configuration["batch_size"] = batch_size or configuration["batch_size"]
        configuration["patch_size"] = patch_size or configuration["patch_size"]
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = features or network["features_per_stage"]
        file, content = self.preprocessed / f"{name}.json", json.dumps(plans, indent=2)
        if not file.is_file() or file.read_text() != content:  # another run on this folder may be reading the file
            file.write_text(content)


def draw_fold(config: Mapping[str, Any], labels: int, seed: int) -> dict[str, list[str]]:
    """Return the training and validation cases of a number of labels; more labels of the same seed only add cases."""
    labelled = random.Random(seed).sample(config["split"]["labelled"], k=max(config["labels"]))
    return {"train": labelled[:labels], "val": config["split"]["validation"]}


def fold_number(config: Mapping[str, Any], labels: int, seed: int) -> int:
    """Return the number of the fold of some labels and a seed in nnU-Net's splits_final.json.

    Raises:
        UserError: the experiment has no such fold.
    """
    if labels not in config["labels"] or not 0 <= seed < MAX_SEEDS:
        raise UserError(
            f"{labels} labels, seed {seed}: legal are {config['labels']} labels and seeds below {MAX_SEEDS}"
        )
    return int(config["labels"].index(labels)) * MAX_SEEDS + seed
