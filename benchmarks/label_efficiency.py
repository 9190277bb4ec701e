"""Few labels with and without pretraining: from scratch, pretrained encoder only, pretrained encoder and decoder.

    python benchmarks/label_efficiency.py DATA --out FOLDER [--labels 2 5 10] [--seeds 0 1 2] [--jobs 2] [--device cpu]
    python benchmarks/label_efficiency.py DATA --out FOLDER --variants VARIANT ... [--labels 5] [--seeds 0 1 2]

DATA is the dataset that ``label_efficiency.json`` names, in nnU-Net's raw format (``nnUNetv2_convert_MSD_dataset -i
Task04_Hippocampus`` makes it of what medicaldecathlon.com has); that file has the budgets, the arms
and the split by case name. Pretrains on the images of the pool (labelled and validation cases), then fine-tunes a cell
for every network, arm, number of labels and seed with VFFinetuneTrainer: the same cases, the same budget, and the same
samples in the same order in all arms. nnUNetv2_predict predicts the test cases, which neither training nor planning
have seen.

Every cell that is done is a part of ``docs/label_efficiency.csv`` (and its curve of ``_curves.csv``) and is not run
again (``--docs ELSEWHERE`` begins new tables); one that was interrupted goes on. With ``--variants``, which are for
choosing, nothing is predicted: their scores are those of the validation cases, in ``label_efficiency_variants.csv``.
Draws and tabulates at the end: ``label_efficiency_report.py``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from label_efficiency_report import CELL, CURVES, SCORES, VARIANTS, is_done, read_rows, write_report
from side_by_side import DOCS

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

CONFIG = Path(__file__).with_suffix(".json")
PRETRAIN, FINETUNE = "VFPretrainTrainer", "VFFinetuneTrainer"
BASE_VARIANT = "default"
RECORD = "label_efficiency_config.json"  # what the tables beside it were made with
# A GPU's epochs last seconds: saving each took half of the time (one H100, 15 at a time). --c takes the best.
SAVING = {"cpu": {"save_every": 1}, "cuda": {"save_every": 100}}
MAX_SEEDS = 100  # folds of nnU-Net's split file for each number of labels


@dataclasses.dataclass(frozen=True)
class Cell:
    """One fine-tuning."""

    plans: str
    arm: str
    labels: int
    seed: int
    variant: str = BASE_VARIANT

    def __str__(self) -> str:
        return f"{self.plans}, {self.arm}, {self.labels} labels, seed {self.seed}, {self.variant}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    config = json.loads(CONFIG.read_text())
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out", type=Path, required=True, help="for data, trainings and predictions")
    parser.add_argument("--plans", nargs="+", default=[*config["plans"]], choices=[*config["plans"]])
    parser.add_argument("--arms", nargs="+", default=[*config["arms"]], choices=[*config["arms"]])
    parser.add_argument("--labels", nargs="+", type=int, default=config["labels"], help="labelled cases")
    parser.add_argument("--seeds", nargs="+", type=int, default=config["seeds"])
    parser.add_argument("--variants", nargs="+", default=[], choices=[BASE_VARIANT, *config["variants"]])
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; each may use all CPU cores")
    parser.add_argument("--workers", type=int, default=0, help="of a pretraining; its samples do not depend on it")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--docs", type=Path, default=DOCS, help="tables; what is in them is not run again")
    args = parser.parse_args()
    with one_line_errors():
        experiment = Experiment(config, Workspace(args.out, processes=2), args.device, args.jobs, args.workers)
        cells = [
            Cell(plans, arm, labels, seed, variant)
            for plans, labels, seed, arm, variant in itertools.product(  # one comparison after the other
                args.plans, args.labels, args.seeds, args.arms, args.variants or [BASE_VARIANT]
            )
        ]
        for cell in cells:
            experiment.check(cell)
        for folder in (args.docs, args.out):  # trainings are used again, too
            keep_to_one_configuration(folder / RECORD, config)
        experiment.prepare(args.data)
        experiment.run(cells, args.docs, on_test_cases=not args.variants)
        write_report(args.docs, config)


class Experiment:
    """Everything below one folder, so that what is there need not be done again."""

    def __init__(self, config: Mapping[str, Any], host: Workspace, device: str, jobs: int, workers: int = 0):
        self.config, self.host, self.device, self.jobs, self.workers = config, host, device, jobs, workers
        self.dataset = config["dataset"]
        self.dataset_id = int(self.dataset[7:10])

    # ------------------------------------------------------------------ data and plans

    def prepare(self, data: Path) -> None:
        """The pool as a training set, the test cases apart; nnU-Net's plans, and smaller ones derived from them."""
        finished = self.host.folder / "prepared"
        if not finished.exists():
            self._plan_and_preprocess(data)
            finished.touch()
        for name, change in {**self.config["plans"], **self.config["pretraining_plans"]}.items():
            if "of" in change:  # the others are as they were planned
                self._derive_plans(name, **change)

    def _plan_and_preprocess(self, data: Path) -> None:
        split, raw = self.config["split"], self.host.raw / self.dataset
        self._require(data, [case for cases in split.values() for case in cases])
        for cases, images, labels in (
            (split["labelled"] + split["validation"], "imagesTr", "labelsTr"),
            (split["test"], "imagesTs", "labelsTs"),
        ):
            for folder in (images, labels):
                (raw / folder).mkdir(parents=True, exist_ok=True)
            for case in cases:
                shutil.copyfile(data / "imagesTr" / f"{case}_0000.nii.gz", raw / images / f"{case}_0000.nii.gz")
                shutil.copyfile(data / "labelsTr" / f"{case}.nii.gz", raw / labels / f"{case}.nii.gz")
        content = json.loads((data / "dataset.json").read_text())
        content["numTraining"] = len(split["labelled"] + split["validation"])
        (raw / "dataset.json").write_text(json.dumps(content))
        self.host.run("nnUNetv2_extract_fingerprint", "-d", self.dataset_id, "-np", 2)
        self.host.run("nnUNetv2_plan_experiment", "-d", self.dataset_id)
        self.host.run("nnUNetv2_vf", "plan", "-d", self.dataset_id)
        for plans in {change.get("of", name) for name, change in self.config["plans"].items()}:
            self.host.run(
                "nnUNetv2_preprocess", "-d", self.dataset_id, "-plans_name", plans, "-c", "3d_fullres", "-np", 2
            )
        splits = [self._split(*self._of_fold(fold)) for fold in range(MAX_SEEDS * len(self.config["labels"]))]
        (self.host.preprocessed / self.dataset / "splits_final.json").write_text(json.dumps(splits))

    def _require(self, data: Path, cases: Sequence[str]) -> None:
        """Raise UserError unless a folder holds the dataset's description and these cases."""
        files = [f"imagesTr/{case}_0000.nii.gz" for case in cases] + [f"labelsTr/{case}.nii.gz" for case in cases]
        missing = [file for file in ("dataset.json", *files) if not (data / file).is_file()]
        if missing:
            raise UserError(
                f"{data} is not {self.dataset}: {len(missing)} files are missing, {missing[0]} for one; make it: "
                "nnUNetv2_convert_MSD_dataset -i Task04_Hippocampus"
            )

    def _derive_plans(
        self,
        name: str,
        of: str,
        features: Sequence[int] = (),
        batch_size: int | None = None,
        patch_size: Sequence[int] = (),
        **_: Any,
    ) -> None:
        """Plans with other features, batch or patch; they use the preprocessed data of those they come from."""
        folder = self.host.preprocessed / self.dataset
        plans = json.loads((folder / f"{of}.json").read_text())
        plans["plans_name"] = name
        configuration = plans["configurations"]["3d_fullres"]
        configuration["batch_size"] = batch_size or configuration["batch_size"]
        configuration["patch_size"] = patch_size or configuration["patch_size"]
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = features or network["features_per_stage"]
        file, content = folder / f"{name}.json", json.dumps(plans, indent=2)
        if not file.is_file() or file.read_text() != content:  # another experiment may be reading it
            file.write_text(content)

    def fold(self, cell: Cell) -> int:
        """The number of a cell's split in nnU-Net's splits_final.json."""
        if cell.labels not in self.config["labels"] or not 0 <= cell.seed < MAX_SEEDS:
            raise UserError(f"{cell}: legal are {self.config['labels']} labels and seeds below {MAX_SEEDS}")
        return int(self.config["labels"].index(cell.labels)) * MAX_SEEDS + cell.seed

    def _of_fold(self, fold: int) -> tuple[int, int]:
        return self.config["labels"][fold // MAX_SEEDS], fold % MAX_SEEDS

    def _split(self, labels: int, seed: int) -> dict[str, list[str]]:
        """With more labels come further cases, none is exchanged."""
        labelled = random.Random(seed).sample(self.config["split"]["labelled"], k=max(self.config["labels"]))
        return {"train": labelled[:labels], "val": self.config["split"]["validation"]}

    # ------------------------------------------------------------------ trainings

    def run(self, cells: Sequence[Cell], docs: Path, on_test_cases: bool) -> None:
        """Those that are not done yet; pretrainings begin first, and from scratch nothing waits for them."""
        for cell in cells:
            self.check(cell)
        file = docs / (SCORES if on_test_cases else VARIANTS)
        done = read_rows(file)
        todo = [cell for cell in cells if not is_done(done, dataclasses.asdict(cell))]
        todo.sort(key=lambda cell: cell.arm != "scratch")
        print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done before", flush=True)
        with ThreadPoolExecutor(self.jobs) as jobs:  # takes them in this order: what a cell waits for is under way
            sources = {cell: self._source(cell) for cell in todo if cell.arm != "scratch"}
            pretrained = {each: jobs.submit(self.pretrain, *each) for each in sorted({*sources.values()})}
            waits_for = {cell: pretrained[source] for cell, source in sources.items()}
            running = {jobs.submit(self.finetune, cell, on_test_cases, waits_for.get(cell)): cell for cell in todo}
            for number, future in enumerate(as_completed(running), 1):
                if future.exception() is not None:
                    jobs.shutdown(cancel_futures=True)
                scores, its_curve = future.result()
                cell = running[future]
                if on_test_cases:  # before the scores, which tell that the cell is done
                    append_rows(docs / CURVES, CELL, cell, its_curve)
                append_rows(file, CELL if on_test_cases else [*CELL, "variant"], cell, scores)
                mean = np.mean([row["dice"] for row in scores])
                print(f"{number} of {len(todo)}: {cell}: Dice {mean:.3f}", flush=True)

    def check(self, cell: Cell) -> None:
        """Raise UserError if there is no such cell, or a variant does not change it."""
        self.fold(cell)
        changes, arm = self._changes(cell.variant), self.config["arms"][cell.arm]
        common = changes.get("finetuning", {}).keys() & arm.keys()
        if common:
            raise UserError(f"{cell}: variant and arm both set {', '.join(common)}; leave the arm out (--arms)")
        of_pretrained = {"schedule", "kernel_norms", "fresh_decoder_stages"} & changes.get("finetuning", {}).keys()
        if arm.get("schedule") == "encoder_only" and "fresh_decoder_stages" in changes.get("finetuning", {}):
            raise UserError(f"{cell}: all of this arm's decoder begins anew; leave the arm out (--arms)")
        if cell.arm == "scratch" and ("pretraining" in changes or of_pretrained):
            raise UserError(f"{cell}: from scratch this variant means nothing; leave the arm out (--arms)")

    def pretrain(self, plans: str, variant: str) -> Path:
        """Pretrain on the pool's images; returns the artifact, which fits all plans with the same network."""
        settings = {
            **self.config["pretraining"],
            **self.config["pretraining_plans"].get(plans, {}).get("pretraining", {}),
            **self._changes(variant).get("pretraining", {}),
        }
        results = self.host.folder / "pretraining" / self._pretraining(variant)
        fold = self.host.fold_folder(self.dataset, PRETRAIN, "all", results, plans)
        if not (fold / "pretext_report.json").is_file():
            go_on = ["--c"] if has_checkpoint(fold) else []
            self.host.run(
                "nnUNetv2_train", self.dataset_id, "3d_fullres", "all", "-p", plans, "-tr", PRETRAIN,
                "-device", self.device, *go_on, nnUNet_results=results,
                **variables("nnUNet_vf_", settings, self.workers),
            )  # fmt: skip
        return fold / "vf_pretrained.pth"

    def _source(self, cell: Cell) -> tuple[str, str]:
        """The plans that a cell is pretrained with, which have a patch of their own, and the pretraining's variant."""
        return str(self.config["plans"][cell.plans].get("pretrained_with", cell.plans)), self._pretraining(cell.variant)

    def _changes(self, variant: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = {} if variant == BASE_VARIANT else self.config["variants"][variant]
        return found

    def _pretraining(self, variant: str) -> str:
        """The first variant that pretrains as this one does."""
        mine = self._changes(variant).get("pretraining")
        alike = (name for name, each in self.config["variants"].items() if each.get("pretraining") == mine)
        return next(alike) if mine else BASE_VARIANT

    def finetune(
        self, cell: Cell, on_test_cases: bool, pretrained: Future[Path] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Train and score a cell; returns the rows of its scores and of its curve."""
        results = self.host.folder / "finetuning" / cell.variant / cell.arm
        fold = self.host.fold_folder(self.dataset, FINETUNE, self.fold(cell), results, cell.plans)
        settings = {
            "save_every_minutes": 1e6,
            **SAVING[self.device],
            **self.config["finetuning"],
            **self.config["plans"][cell.plans].get("finetuning", {}),
            **self._changes(cell.variant).get("finetuning", {}),
            **self.config["arms"][cell.arm],
            "seed": cell.seed,
        }
        final = fold / "checkpoint_final.pth"
        if not final.is_file():
            begin: list[object] = []
            if has_checkpoint(fold):
                begin = ["--c"]
            elif pretrained:
                begin = ["-pretrained_weights", pretrained.result()]
            self._train(cell, results, *begin, **variables("nnUNet_vf_finetune_", settings))
        elif not (fold / "validation" / "summary.json").is_file():
            self._train(cell, results, "--val")
        if on_test_cases:
            scores = self._score("test", self._predict(cell, results, fold / "predicted"), "labelsTs")
        else:
            scores = self._score("validation", fold / "validation", "labelsTr")
        return scores, curve(final, settings["iterations_per_epoch"], [*self._classes()])

    def _train(self, cell: Cell, results: Path, *flags: object, **environment: object) -> None:
        common = ("-p", cell.plans, "-tr", FINETUNE, "-device", self.device)
        self.host.run(
            *("nnUNetv2_train", self.dataset_id, "3d_fullres", self.fold(cell), *common, *flags),
            nnUNet_results=results,
            **environment,
        )

    def _predict(self, cell: Cell, results: Path, predictions: Path) -> Path:
        common = ("-p", cell.plans, "-tr", FINETUNE, "-device", self.device, "-f", self.fold(cell))
        self.host.run(
            *("nnUNetv2_predict", "-d", self.dataset_id, "-c", "3d_fullres", *common, "-npp", 1, "-nps", 1),
            *("-i", self.host.raw / self.dataset / "imagesTs", "-o", predictions),
            nnUNet_results=results,
        )
        return predictions

    def _score(self, cases: str, predictions: Path, labels: str) -> list[dict[str, Any]]:
        truth = self.host.raw / self.dataset / labels
        return [
            {"case": case, "class": name, **score(truth / f"{case}.nii.gz", predictions / f"{case}.nii.gz", value)}
            for case in self.config["split"][cases]
            for name, value in self._classes().items()
        ]

    def _classes(self) -> dict[str, int]:
        """Their values in the segmentations, without the background."""
        labels = json.loads((self.host.raw / self.dataset / "dataset.json").read_text())["labels"]
        return {name: value for name, value in labels.items() if value > 0}


def variables(prefix: str, settings: Mapping[str, Any], workers: int = 0) -> dict[str, Any]:
    """Without workers a fine-tuning draws its samples itself: the same in the same order, whatever the machine does.

    Not compiled, which nnU-Net does on GPUs: so short a training would not earn back the time.
    """
    return {
        "nnUNet_n_proc_DA": workers,
        "nnUNet_compile": "f",
        **{f"{prefix}{name}": value for name, value in settings.items()},
    }


def has_checkpoint(fold: Path) -> bool:
    """Whether there is something to go on from."""
    return any((fold / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best"))


def keep_to_one_configuration(record: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError if what lies there has another configuration; further variants and networks may be added."""
    mine = {name: value for name, value in config.items() if name != "seeds"}
    if record.is_file():
        theirs = json.loads(record.read_text())
        for name in ("plans", "pretraining_plans", "variants"):
            theirs[name] = {**mine.get(name, {}), **theirs.get(name, {})}
            mine[name] = {**theirs[name], **mine.get(name, {})}
        different = [name for name in mine if theirs.get(name) != mine[name]]
        if different:
            raise UserError(f"{record} has other {', '.join(different)}; move it and what lies beside it away")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(mine, indent=2) + "\n")


# ---------------------------------------------------------------- scores


def score(truth_file: Path, predicted_file: Path, label: int) -> dict[str, float]:
    """Dice, and the 95th percentile of the distances between both surfaces in mm: NaN where one of them is empty."""
    truth, predicted = (SimpleITK.ReadImage(str(file)) == label for file in (truth_file, predicted_file))
    true, found = (SimpleITK.GetArrayFromImage(image) > 0 for image in (truth, predicted))
    voxels = int(true.sum() + found.sum())
    dice = 2 * int((true & found).sum()) / voxels if voxels else float("nan")
    if not (true.any() and found.any()):
        return {"dice": dice, "sd95": float("nan")}
    distances = np.concatenate([_to_surface(truth, predicted), _to_surface(predicted, truth)])
    return {"dice": dice, "sd95": float(np.percentile(distances, 95))}


def _to_surface(image: SimpleITK.Image, other: SimpleITK.Image) -> np.ndarray:
    """Distances in mm of one image's surface voxels to the other's surface."""
    surface, target = (SimpleITK.LabelContour(each) for each in (image, other))
    distance = SimpleITK.SignedMaurerDistanceMap(target, squaredDistance=False, useImageSpacing=True)
    return np.abs(SimpleITK.GetArrayFromImage(distance)[SimpleITK.GetArrayFromImage(surface) > 0])


def curve(checkpoint: Path, iterations_per_epoch: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """nnU-Net's pseudo Dice of the validation cases after every epoch, by class."""
    logged = torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]["dice_per_class_or_region"]
    return [
        {"iteration": (epoch + 1) * iterations_per_epoch, "class": name, "dice": float(dice[i])}
        for epoch, dice in enumerate(logged)
        for i, name in enumerate(classes)
    ]


def append_rows(file: Path, key: Sequence[str], cell: Cell, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put a cell's rows into a file, all of them or none, in the place of those that it had."""
    mine = {name: dataclasses.asdict(cell)[name] for name in key}
    others = [row for row in read_rows(file) if any(row[name] != str(value) for name, value in mine.items())]
    complete = [*others, *({**mine, **row} for row in rows)]
    part = file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", newline="") as output:
        writer = csv.DictWriter(output, complete[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in complete)
    part.replace(file)


if __name__ == "__main__":
    main()
