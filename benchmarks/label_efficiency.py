"""Few labelled cases with and without pretraining, and after other pretexts.

    python benchmarks/label_efficiency.py EXPERIMENT DATA --work FOLDER [--labels 2 5] [--seeds 0 1 2] [--minutes 60]
    python benchmarks/label_efficiency.py EXPERIMENT DATA --work FOLDER --variants VARIANT ... [--labels 5]

EXPERIMENT is the name of a file in ``benchmarks/experiments``: it names the dataset and has the split by case name, the
networks ("plans"), the arms, the budgets and the variants. The arms are scratch, encoder (only the encoder is
pretrained) and full (encoder and decoder); in the experiments ``*_pretexts`` they are scratch, fusion, masked and
fusion_masked. DATA is this dataset in nnU-Net's raw format.

One training, a "cell", is a network, arm, number of labels and seed. The script pretrains each network once for each
pretext, on the images of the labelled and validation cases. Then it fine-tunes every cell with VFFinetuneTrainer: with
the same cases, budget and samples in the same order in all arms. nnUNetv2_predict predicts the test cases, which
neither planning nor training has seen.

The folder ``pretraining`` below ``--work`` has a folder for each pretraining, named by a fingerprint of its plans,
settings and cases, which is also in the rows of the cells that start from it. Its ``pretext_report.json`` is copied to
the tables. Weights from another machine are used if their folder is copied there. Arms with ``"program": "nnssl"`` are
pretrained by DKFZ's nnssl (see ``nnssl_pretraining.py``) and need ``--nnssl``.

Finished cells are rows of ``scores.csv`` and ``curves.csv`` in the folder ``--tables`` and are not run again; an
interrupted cell continues. ``--minutes`` starts no cell that would not end in time, judged by the finished cells of the
same network; it does not limit pretrainings. ``--variants`` are for choosing settings: they are scored on the
validation cases, in ``variants.csv`` and ``variant_curves.csv``. At the end ``label_efficiency_report.py`` draws and
tabulates.

Duration: on 2 CPU cores with ``--jobs 2``, hippocampus with 2, 5 and 10 labels: 3 hours for nnUNetPlansHalf, 4 hours
for PCTNetPlansHalf; hippocampus_pretexts with 2 labels, and one thread for each training (PYTHON_CPU_COUNT=1, Python
3.13 or newer): 1 hour. Needs: the dataset.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import CELL, DEFAULT_VARIANT, Cell, belongs_to, read_rows, usual_seconds, write_cell
from common import NETWORK_PLANS, RESULTS, describe_device, make_parser, write_result
from label_efficiency_report import (
    CURVES,
    PRETRAININGS,
    SCORES,
    VARIANT_CURVES,
    VARIANTS,
    add_experiment,
    read_experiment,
    write_report,
)
from segmentation_scores import score

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

PRETRAIN, FINETUNE = "VFPretrainTrainer", "VFFinetuneTrainer"
NNSSL = "nnssl"  # the entry "program" of a pretraining; without this entry it is PRETRAIN
NEED_PRETRAINED = {"schedule", "kernel_norms", "fresh_decoder_stages"}  # without effect from scratch
RECORD = "config.json"  # the configuration of the tables beside it
# On a GPU an epoch lasts seconds: saving after each took half of the time (one H100, 15 trainings at a time). ``--c``
# then continues from the best checkpoint.
SAVING = {"cpu": {"save_every": 1}, "cuda": {"save_every": 100}}
Settings = tuple[tuple[str, Any], ...]  # names and values, sorted
MAX_SEEDS = 100  # folds in nnU-Net's split file for each number of labels


def main() -> None:
    parser = make_parser(__doc__, device=True, work=True)
    add_experiment(parser)
    parser.add_argument("data", type=Path, metavar="DATA")
    for name in ("plans", "arms", "variants"):
        parser.add_argument(f"--{name}", nargs="+", metavar="NAME")
    parser.add_argument("--labels", nargs="+", type=int, help="numbers of labelled cases")
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell that would not end in time")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; each may use all CPU cores")
    parser.add_argument("--workers", type=int, default=0, help="of a pretraining; its samples do not depend on it")
    parser.add_argument("--nnssl", type=Path, metavar="PYTHON", help="of an environment with nnssl")
    args = parser.parse_args()
    with one_line_errors():
        config = read_experiment(args.experiment)
        tables = args.tables or RESULTS / args.experiment
        workspace = Workspace(args.work, processes=2)
        experiment = Experiment(config, workspace, args.device, args.jobs, args.workers, args.nnssl)
        cells = [  # a comparison of arms is complete before the next seed, number of labels or network starts
            Cell(plans, arm, labels, seed, variant)
            for plans, labels, seed, arm, variant in itertools.product(
                args.plans or config["plans"],
                args.labels or config["labels"],
                args.seeds or config["seeds"],
                args.arms or config["arms"],
                args.variants or [DEFAULT_VARIANT],
            )
        ]
        for cell in cells:
            experiment.check(cell)
        for folder in (tables, args.work):  # finished trainings in the work folder are used again
            require_same_configuration(folder / RECORD, config)
        experiment.prepare(args.data)
        experiment.run(cells, tables, on_test_cases=not args.variants, minutes=args.minutes)
        write_report(tables, args.experiment, config)


class Experiment:
    """Data, trainings and predictions below one folder. A step whose result is there is not done again."""

    def __init__(
        self,
        config: Mapping[str, Any],
        workspace: Workspace,
        device: str,
        jobs: int,
        workers: int = 0,
        nnssl: Path | None = None,
    ):
        self.config, self.workspace = config, workspace
        self.device, self.jobs, self.workers = device, jobs, workers
        self.nnssl = nnssl.absolute() if nnssl else None  # commands run in another folder
        self.dataset = config["dataset"]
        self.dataset_id = int(self.dataset[7:10])

    # ------------------------------------------------------------------ data and plans

    def prepare(self, data: Path) -> None:
        """Copy the cases, the test cases apart from the others; plan, preprocess, and derive the smaller plans."""
        finished = self.workspace.folder / "prepared"
        if not finished.exists():
            self._copy_cases(data)
            self._plan_and_preprocess()
            finished.touch()
        for name, change in {**self.config["plans"], **self.config["pretraining_plans"]}.items():
            if "of" in change:
                self._derive_plans(name, **change)

    def _copy_cases(self, data: Path) -> None:
        split, raw = self.config["split"], self.workspace.raw / self.dataset
        self._require_files(data, [case for cases in split.values() for case in cases])
        pool = split["labelled"] + split["validation"]
        for cases, images, labels in ((pool, "imagesTr", "labelsTr"), (split["test"], "imagesTs", "labelsTs")):
            for folder in (images, labels):
                (raw / folder).mkdir(parents=True, exist_ok=True)
            for case in cases:
                shutil.copyfile(data / "imagesTr" / f"{case}_0000.nii.gz", raw / images / f"{case}_0000.nii.gz")
                shutil.copyfile(data / "labelsTr" / f"{case}.nii.gz", raw / labels / f"{case}.nii.gz")
        description = json.loads((data / "dataset.json").read_text())
        (raw / "dataset.json").write_text(json.dumps({**description, "numTraining": len(pool)}))

    def _require_files(self, data: Path, cases: Sequence[str]) -> None:
        """Raise UserError unless a folder holds dataset.json, and image and labels of all cases."""
        files = [f"imagesTr/{case}_0000.nii.gz" for case in cases] + [f"labelsTr/{case}.nii.gz" for case in cases]
        missing = [file for file in ("dataset.json", *files) if not (data / file).is_file()]
        if missing:
            raise UserError(
                f"{data} is not {self.dataset}: {len(missing)} files are missing, the first is {missing[0]}; where it "
                f"comes from: {self.config['source']}"
            )

    def _plan_and_preprocess(self) -> None:
        """Run nnU-Net's planning and preprocessing; write one fold for every number of labels and seed."""
        run = self.workspace.run
        run("nnUNetv2_extract_fingerprint", "-d", self.dataset_id, "-np", 2)
        needed = {change.get("of", name) for name, change in self.config["plans"].items()}
        spacing = self.config.get("spacing", ())
        for command, plans in NETWORK_PLANS.values():
            if plans in needed:
                run(*command, "-d", self.dataset_id, *(("-overwrite_target_spacing", *spacing) if spacing else ()))
                run("nnUNetv2_preprocess", "-d", self.dataset_id, "-plans_name", plans, "-c", "3d_fullres", "-np", 2)
        folds = [self._split(labels, seed) for labels in self.config["labels"] for seed in range(MAX_SEEDS)]
        (self.workspace.preprocessed / self.dataset / "splits_final.json").write_text(json.dumps(folds))

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
        folder = self.workspace.preprocessed / self.dataset
        plans = json.loads((folder / f"{of}.json").read_text())
        plans["plans_name"] = name
        configuration = plans["configurations"]["3d_fullres"]
        configuration["batch_size"] = batch_size or configuration["batch_size"]
        configuration["patch_size"] = patch_size or configuration["patch_size"]
        network = configuration["architecture"]["arch_kwargs"]
        network["features_per_stage"] = features or network["features_per_stage"]
        file, content = folder / f"{name}.json", json.dumps(plans, indent=2)
        if not file.is_file() or file.read_text() != content:  # another run on this folder may be reading the file
            file.write_text(content)

    def fold(self, cell: Cell) -> int:
        """Return the number of a cell's fold in nnU-Net's splits_final.json."""
        if cell.labels not in self.config["labels"] or not 0 <= cell.seed < MAX_SEEDS:
            raise UserError(f"{cell}: legal are {self.config['labels']} labels and seeds below {MAX_SEEDS}")
        return int(self.config["labels"].index(cell.labels)) * MAX_SEEDS + cell.seed

    def _split(self, labels: int, seed: int) -> dict[str, list[str]]:
        """Return the fold of a number of labels; more labels of the same seed only add cases."""
        labelled = random.Random(seed).sample(self.config["split"]["labelled"], k=max(self.config["labels"]))
        return {"train": labelled[:labels], "val": self.config["split"]["validation"]}

    # ------------------------------------------------------------------ trainings

    def run(self, cells: Sequence[Cell], tables: Path, on_test_cases: bool, minutes: float = math.inf) -> None:
        """Run the cells that are not in the tables yet.

        Pretrainings start first; cells from scratch, which do not need one, come next.

        Args:
            minutes: no cell starts that would not end within this time, judged by the finished cells of its plans.
        """
        deadline = time.monotonic() + 60 * minutes
        for cell in cells:
            self.check(cell)
        file, curve_file = (
            tables / name for name in ((SCORES, CURVES) if on_test_cases else (VARIANTS, VARIANT_CURVES))
        )
        key = CELL if on_test_cases else [*CELL, "variant"]
        rows = read_rows(file)
        remaining = [cell for cell in cells if not any(belongs_to(row, cell, key) for row in rows)]
        remaining.sort(key=lambda cell: cell.arm != "scratch")
        sources = {cell: self.pretraining_of(cell) for cell in remaining if cell.arm != "scratch"}
        for source in sources.values():
            self._require_program(*source)
        print(f"{len(cells)} cells, {len(cells) - len(remaining)} of them are finished", flush=True)
        with ThreadPoolExecutor(self.jobs) as jobs:  # starts jobs in this order, so no cell waits for a later job
            pretrainings = {source: jobs.submit(self.pretrain, *source) for source in sorted({*sources.values()})}
            running = {}
            for cell in remaining:
                weights = pretrainings[sources[cell]] if cell in sources else None
                usual_s = usual_seconds(rows, cell)
                running[jobs.submit(self._finetune_in_time, cell, on_test_cases, weights, deadline - usual_s)] = cell
            for number, future in enumerate(as_completed(running), 1):
                if future.exception() is not None:
                    jobs.shutdown(cancel_futures=True)
                cell = running[future]
                if future.result() is None:
                    print(f"{number} of {len(remaining)}: {cell}: not started, it would not end in time", flush=True)
                    continue
                scores, curve = future.result()
                if cell in sources:
                    self._keep_report(sources[cell], pretrainings[sources[cell]].result(), tables / PRETRAININGS)
                write_cell(curve_file, key, cell, curve)  # first: a cell with scores counts as finished
                write_cell(file, key, cell, scores)
                mean = np.mean([row["dice"] for row in scores])
                print(f"{number} of {len(remaining)}: {cell}: Dice {mean:.3f}", flush=True)

    def check(self, cell: Cell) -> None:
        """Raise UserError if a cell is not in the configuration, or its variant does not apply to its arm."""
        self.fold(cell)
        for name, value in (("plans", cell.plans), ("arms", cell.arm), ("variants", cell.variant)):
            legal = [*self.config[name], *([DEFAULT_VARIANT] if name == "variants" else [])]
            if value not in legal:
                raise UserError(f"--{name} {value} is not in the experiment; legal: {', '.join(legal)}")
        variant, arm = self._changes(cell.variant), self.config["arms"][cell.arm]
        finetuning = variant.get("finetuning", {}).keys()
        in_both = {
            name
            for kind in ("pretraining", "finetuning")
            for name in variant.get(kind, {})
            if name in arm.get(kind, {})
        }
        if in_both:
            raise UserError(f"{cell}: variant and arm both set {', '.join(in_both)}; leave the arm out (--arms)")
        if arm.get("finetuning", {}).get("schedule") == "encoder_only" and "fresh_decoder_stages" in finetuning:
            raise UserError(f"{cell}: this arm's whole decoder is new already; leave the arm out (--arms)")
        if cell.arm == "scratch" and ("pretraining" in variant or finetuning & NEED_PRETRAINED):
            raise UserError(f"{cell}: this variant changes nothing from scratch; leave the arm out (--arms)")

    def pretrain(self, plans: str, settings: Settings) -> Path:
        """Pretrain on the images of the labelled and validation cases; return the weights file."""
        results = self._pretraining_folder(plans, settings)
        if dict(settings).get("program") == NNSSL:
            return self._pretrain_with_nnssl(plans, dict(settings), results)
        fold = self.workspace.fold_folder(self.dataset, PRETRAIN, "all", results, plans)
        if not (fold / "pretext_report.json").is_file():
            flags = ["--c"] if has_checkpoint(fold) else []
            environment = variables("nnUNet_vf_", dict(settings), self.workers)
            self._train("all", plans, PRETRAIN, results, *flags, **environment)
        return fold / "vf_pretrained.pth"

    def _pretrain_with_nnssl(self, plans: str, settings: Mapping[str, Any], folder: Path) -> Path:
        weights = folder / "vf_pretrained.pth"
        if not weights.is_file():
            plans_file = self.workspace.preprocessed / self.dataset / f"{plans}.json"
            self.workspace.run(
                *(str(self.nnssl), Path(__file__).with_name("nnssl_pretraining.py")),
                *(self.workspace.raw / self.dataset / "imagesTr", plans_file, "--folder", folder),
                *("--pretext", settings["pretext"], "--mask-side", settings.get("mask_side", 16)),
                *("--epochs", settings["num_epochs"], "--iterations", settings["iterations_per_epoch"]),
                *("--device", self.device),
            )
            self.workspace.run("nnUNetv2_vf", "convert", folder / "checkpoint_final.pth", "-o", weights)
        return weights

    def _require_program(self, plans: str, settings: Settings) -> None:
        """Raise UserError if a pretraining has to be made by nnssl and nnssl is not there."""
        if dict(settings).get("program") != NNSSL or self.nnssl is not None:
            return
        weights = self._pretraining_folder(plans, settings) / "vf_pretrained.pth"
        if not weights.is_file():
            raise UserError(f"no {weights}; nnssl makes it: add --nnssl PYTHON, or leave its arms out (--arms)")

    def _pretraining_folder(self, plans: str, settings: Settings) -> Path:
        return self.workspace.folder / "pretraining" / self.fingerprint(plans, settings)

    def _keep_report(self, source: tuple[str, Settings], weights: Path, folder: Path) -> None:
        """Copy the report beside pretrained weights to a folder, under the fingerprint; nnssl writes none."""
        report = weights.with_name("pretext_report.json")
        if report.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(report, folder / f"{self.fingerprint(*source)}.json")

    def pretraining_of(self, cell: Cell) -> tuple[str, Settings]:
        """Return the plans, which may have a patch of their own, and the settings of a cell's pretraining."""
        plans = str(self.config["plans"][cell.plans].get("pretrained_with", cell.plans))
        settings = {
            **self.config["pretraining"],
            **self.config["pretraining_plans"].get(plans, {}).get("pretraining", {}),
            **self.config["arms"][cell.arm].get("pretraining", {}),
            **self._changes(cell.variant).get("pretraining", {}),
        }
        return plans, tuple(sorted(settings.items()))

    def fingerprint(self, plans: str, settings: Settings) -> str:
        """Return the name of a pretraining's folder: a digest of its plans, settings and cases.

        Its weights may have been made on another machine: copy the folder, and they are found.
        """
        file = self.workspace.preprocessed / self.dataset / f"{plans}.json"
        cases = self.config["split"]["labelled"] + self.config["split"]["validation"]
        content = json.dumps([json.loads(file.read_text()), settings, cases], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def _changes(self, variant: str) -> Mapping[str, Any]:
        return {} if variant == DEFAULT_VARIANT else self.config["variants"][variant]

    def _finetune_in_time(
        self, cell: Cell, on_test_cases: bool, pretrained: Future[Path] | None, latest_start: float
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]] | None:
        """Train and score a cell, unless it is too late; return its scores, with machine and time, and its curve."""
        if pretrained is not None:
            pretrained.result()
        start = time.monotonic()
        if start > latest_start:
            return None
        scores, curve = self.finetune(cell, on_test_cases, pretrained)
        run = {
            "pretraining": self.fingerprint(*self.pretraining_of(cell)) if pretrained else "",
            "seconds": round(time.monotonic() - start),
            "machine": describe_device(self.device),
            **versions(),
        }
        return [{**row, **run} for row in scores], curve

    def finetune(
        self, cell: Cell, on_test_cases: bool, pretrained: Future[Path] | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Train and score a cell; return the rows of its scores and of its curve."""
        results = self.workspace.folder / "finetuning" / cell.variant / cell.arm
        fold = self.workspace.fold_folder(self.dataset, FINETUNE, self.fold(cell), results, cell.plans)
        settings = {
            "save_every_minutes": 1e6,
            **SAVING[self.device],
            **self.config["finetuning"],
            **self.config["plans"][cell.plans].get("finetuning", {}),
            **self._changes(cell.variant).get("finetuning", {}),
            **self.config["arms"][cell.arm].get("finetuning", {}),
            "seed": cell.seed,
        }
        train = functools.partial(self._train, self.fold(cell), cell.plans, FINETUNE, results)
        final = fold / "checkpoint_final.pth"
        if not final.is_file():
            flags: list[object] = ["-pretrained_weights", pretrained.result()] if pretrained else []
            train(*(["--c"] if has_checkpoint(fold) else flags), **variables("nnUNet_vf_finetune_", settings))
        elif not (fold / "validation" / "summary.json").is_file():
            train("--val")
        if on_test_cases:
            scores = self._score("test", self._predict(cell, results, fold / "predicted"), "labelsTs")
        else:
            scores = self._score("validation", fold / "validation", "labelsTr")
        return scores, read_curve(final, settings["iterations_per_epoch"], [*self._classes()])

    def _train(self, fold: int | str, plans: str, trainer: str, results: Path, *flags: object, **env: object) -> None:
        common = ("-p", plans, "-tr", trainer, "-device", self.device)
        command = ("nnUNetv2_train", self.dataset_id, "3d_fullres", fold, *common, *flags)
        self.workspace.run(*command, nnUNet_results=results, **env)

    def _predict(self, cell: Cell, results: Path, predictions: Path) -> Path:
        common = ("-p", cell.plans, "-tr", FINETUNE, "-device", self.device, "-f", self.fold(cell))
        self.workspace.run(
            *("nnUNetv2_predict", "-d", self.dataset_id, "-c", "3d_fullres", *common, "-npp", 1, "-nps", 1),
            *("-i", self.workspace.raw / self.dataset / "imagesTs", "-o", predictions),
            nnUNet_results=results,
        )
        return predictions

    def _score(self, role: str, predictions: Path, labels: str) -> list[dict[str, Any]]:
        truth = self.workspace.raw / self.dataset / labels
        return [
            {"case": case, "class": name, **score(truth / f"{case}.nii.gz", predictions / f"{case}.nii.gz", value)}
            for case in self.config["split"][role]
            for name, value in self._classes().items()
        ]

    def _classes(self) -> dict[str, int]:
        """Return the label values by class name, without the background."""
        labels = json.loads((self.workspace.raw / self.dataset / "dataset.json").read_text())["labels"]
        return {name: value for name, value in labels.items() if value > 0}


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


def require_same_configuration(record: Path, config: Mapping[str, Any]) -> None:
    """Raise UserError if the tables or trainings beside a record have another configuration; else write the record.

    Networks, arms and variants may be added; seeds and the source of the data may change.
    """
    current = {name: value for name, value in config.items() if name not in ("seeds", "source")}
    if record.is_file():
        recorded = json.loads(record.read_text())
        for name in ("plans", "pretraining_plans", "arms", "variants"):
            recorded[name] = {**current.get(name, {}), **recorded.get(name, {})}
            current[name] = {**recorded[name], **current.get(name, {})}
        different = [name for name in current if recorded.get(name) != current[name]]
        if different:
            raise UserError(f"{record} has other {', '.join(different)}; move it and the files beside it away")
    write_result(record, current)


def read_curve(checkpoint: Path, iterations_per_epoch: int, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return nnU-Net's pseudo Dice of the validation cases after every epoch, by class."""
    logged = torch.load(checkpoint, map_location="cpu", weights_only=False)["logging"]["dice_per_class_or_region"]
    return [
        {"iteration": (epoch + 1) * iterations_per_epoch, "class": name, "dice": float(dice[i])}
        for epoch, dice in enumerate(logged)
        for i, name in enumerate(classes)
    ]


def versions() -> dict[str, str]:
    packages = ("nnunetv2-vf", "nnunetv2", "torch")
    return {"versions": " ".join(f"{name}={importlib.metadata.version(name)}" for name in packages)}


if __name__ == "__main__":
    main()
