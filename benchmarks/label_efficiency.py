"""Few labelled cases with and without pretraining, and after other pretexts.

    python benchmarks/label_efficiency.py EXPERIMENT DATA --work FOLDER [--labels 2 5] [--seeds 0 1 2] [--minutes 60]
    python benchmarks/label_efficiency.py EXPERIMENT DATA --work FOLDER --variants VARIANT ... [--labels 5]

Without ``--plans``, ``--arms``, ``--labels`` and ``--seeds``, all of the experiment is run. One cell again:

    python benchmarks/label_efficiency.py left_atrium DATA --work FOLDER --tables NEW_FOLDER \
        --plans nnUNetPlansHalf --arms full --labels 4 --seeds 0

EXPERIMENT is the name of a file in ``benchmarks/experiments``: it names the dataset and has the split by case name, the
networks ("plans"), the arms, the budgets and the variants. The arms are scratch, encoder (only the encoder is
pretrained) and full (encoder and decoder); in the experiments ``*_pretexts`` they are named by their pretext. DATA is
this dataset in nnU-Net's raw format.

One training, a "cell", is a network, arm, number of labels and seed. The script pretrains each network once for each
pretext, on the images of the labelled and validation cases. Then it fine-tunes every cell with VFFinetuneTrainer: with
the same cases, budget and samples in the same order in all arms. nnUNetv2_predict predicts the test cases, which
neither planning nor training has seen.

The folder ``pretraining`` below ``--work`` has a folder for each pretraining, named by a fingerprint of its plans,
settings and cases, which is also in the rows of the cells that start from it. Its ``pretext_report.json`` is copied to
the tables. Weights from another machine are used if their folder is copied there. Arms with a ``"program"`` are
pretrained by DKFZ's nnssl (see ``nnssl_pretraining.py``) and need ``--nnssl``.

Finished cells are rows of ``scores.csv`` and ``curves.csv`` in the folder ``--tables`` and are not run again; an
interrupted cell continues. ``--minutes`` starts no cell that would not end in time, judged by the finished cells of the
same network, variant and machine; it does not limit pretrainings. ``--variants`` are for choosing settings: they are
scored on the validation cases, in ``variants.csv`` and ``variant_curves.csv``. At the end
``label_efficiency_report.py`` draws and tabulates.

Duration: on 2 CPU cores with ``--jobs 2``, hippocampus with 2, 5 and 10 labels: 3 hours for nnUNetPlansHalf, 4 hours
for PCTNetPlansHalf; hippocampus_pretexts with 2 labels, and one thread for each training (PYTHON_CPU_COUNT=1, Python
3.13 or newer): 1 hour; left_atrium with 4 and 8 labels, nnUNetPlansHalf, in the same way: 6 hours. Needs: the dataset.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import DEFAULT_VARIANT, Cell, Tables, changes_of
from common import RESULTS, describe_device, make_parser, write_result
from experiment_data import ExperimentData, fold_number
from label_efficiency_report import add_experiment, read_experiment, write_report
from label_efficiency_tables import PRETRAININGS
from pretrainings import Pretrainings
from training_command import TrainingCommand, has_checkpoint, variables

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

FINETUNE = "VFFinetuneTrainer"
NEED_PRETRAINED = {"kernel_norms", "fresh_decoder_stages"}  # without effect from scratch
ENCODER_SCHEDULES = ("encoder_only", "frozen_encoder")  # for a pretrained encoder
RECORD = "config.json"  # the configuration of the tables beside it
# On a GPU an epoch lasts seconds: saving after each took half of the time (one H100, 15 trainings at a time). ``--c``
# then continues from the best checkpoint.
SAVING = {"cpu": {"save_every": 1}, "cuda": {"save_every": 100}}


def main() -> None:
    parser = make_parser(__doc__, device=True, work=True)
    add_experiment(parser)
    parser.add_argument("data", type=Path, metavar="DATA", help="the dataset in nnU-Net's raw format")
    parser.add_argument("--plans", nargs="+", metavar="NAME", help="networks; default: all of the experiment")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="default: all of the experiment")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="other settings; default: none")
    parser.add_argument("--labels", nargs="+", type=int, help="numbers of labelled cases; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no cell that would not end in time")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time; each may use all CPU cores")
    parser.add_argument("--workers", type=int, default=0, help="of a pretraining; its samples do not depend on it")
    parser.add_argument("--nnssl", type=Path, metavar="PYTHON", help="of an environment with nnssl")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: legal are numbers from 1")
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
        require_same_configuration((tables, args.work), config)  # finished trainings in the work folder are used again
        experiment.data.prepare(args.data)
        experiment.run(cells, tables, on_test_cases=not args.variants, minutes=args.minutes)
        write_report(tables, args.experiment, config)


class Experiment:
    """Trainings and predictions below one folder. A step whose result is there is not done again."""

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
        self.device, self.jobs, self.dataset = device, jobs, config["dataset"]
        self.data = ExperimentData(config, workspace)
        self.training = TrainingCommand(workspace, self.dataset, device)
        self.pretrainings = Pretrainings(config, self.training, workers, nnssl)

    def fold(self, cell: Cell) -> int:
        """Return the number of a cell's fold in nnU-Net's splits_final.json."""
        return fold_number(self.config, cell.labels, cell.seed)

    def run(self, cells: Sequence[Cell], folder: Path, on_test_cases: bool, minutes: float = math.inf) -> None:
        """Run the cells that are not in the tables yet.

        Pretrainings start first; cells from scratch, which do not need one, come next.

        Args:
            folder: of the tables.
            minutes: no cell starts that would not end within this time, judged by finished cells like it.

        Raises:
            UserError: a training failed. No further one was started; the cells that still ran are in the tables.
        """
        deadline = time.monotonic() + 60 * minutes
        for cell in cells:
            self.check(cell)
        tables = Tables(folder, on_test_cases)
        remaining = tables.without_finished(cells)
        remaining.sort(key=lambda cell: cell.arm != "scratch")
        sources = {cell: self.pretrainings.of(cell) for cell in remaining if cell.arm != "scratch"}
        for source in sources.values():
            self.pretrainings.require_program(source)
        print(f"{len(cells)} cells, {len(cells) - len(remaining)} of them are finished", flush=True)
        self._is_stopped = threading.Event()
        with ThreadPoolExecutor(self.jobs) as jobs:  # starts jobs in this order, so no cell waits for a later job
            pretrained = {source: jobs.submit(self.pretrainings.make, source) for source in sorted({*sources.values()})}
            running = [
                jobs.submit(
                    self._run_cell, cell, tables, pretrained[sources[cell]] if cell in sources else None, deadline
                )
                for cell in remaining
            ]
            try:
                for number, future in enumerate(as_completed(running), 1):
                    print(f"{number} of {len(remaining)}: {future.result()}", flush=True)
            finally:  # after an error or Ctrl-C: start nothing more, wait for what runs
                self._is_stopped.set()
                for future in (*pretrained.values(), *running):
                    future.cancel()

    def check(self, cell: Cell) -> None:
        """Raise UserError if a cell is not in the configuration, or its variant does not apply to its arm."""
        self.fold(cell)
        for name, value in (("plans", cell.plans), ("arms", cell.arm), ("variants", cell.variant)):
            legal = [*self.config[name], *([DEFAULT_VARIANT] if name == "variants" else [])]
            if value not in legal:
                raise UserError(f"--{name} {value} is not in the experiment; legal: {', '.join(legal)}")
        variant, arm = changes_of(self.config, cell.variant), self.config["arms"][cell.arm]
        finetuning = variant.get("finetuning", {})
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
        if "program" in arm.get("pretraining", {}) and "pretraining" in variant:
            raise UserError(f"{cell}: this variant changes nothing in nnssl; leave the arm out (--arms)")
        unused = self.pretrainings.settings_without_effect(cell)
        if "pretraining" in variant and variant["pretraining"].keys() <= unused:
            raise UserError(f"{cell}: this variant changes nothing in the arm's pretext; leave the arm out (--arms)")
        needs_pretrained = finetuning.keys() & NEED_PRETRAINED or finetuning.get("schedule") in ENCODER_SCHEDULES
        if cell.arm == "scratch" and ("pretraining" in variant or needs_pretrained):
            raise UserError(f"{cell}: this variant changes nothing from scratch; leave the arm out (--arms)")

    def _run_cell(self, cell: Cell, tables: Tables, pretrained: Future[Path] | None, deadline: float) -> str:
        """Train and score a cell and add it to the tables; return what happened.

        A cell that would not end in time, or follows a failure, is not started.
        """
        if self._is_stopped.is_set():
            return f"{cell}: not started"
        try:
            return self._train_and_record(cell, tables, pretrained, deadline)
        except BaseException:
            self._is_stopped.set()  # here, because this thread may take the next cell before others notice the failure
            raise

    def _train_and_record(self, cell: Cell, tables: Tables, pretrained: Future[Path] | None, deadline: float) -> str:
        weights = pretrained.result() if pretrained else None
        start, machine = time.monotonic(), describe_device(self.device)
        if start + tables.usual_seconds(cell, machine) > deadline:
            return f"{cell}: not started, it would not end in time"
        is_new = not has_checkpoint(self._fold_folder(cell))
        scores, curve = self.finetune(cell, tables.of_test_cases, weights)
        run = {
            "pretraining": self.pretrainings.fingerprint(self.pretrainings.of(cell)) if weights else "",
            "seconds": round(time.monotonic() - start) if is_new else "",
            "machine": machine,
            **versions(),
        }
        if weights:
            self.pretrainings.keep_report(self.pretrainings.of(cell), weights, tables.folder / PRETRAININGS)
        tables.add(cell, [{**row, **run} for row in scores], curve)
        return f"{cell}: Dice {np.mean([row['dice'] for row in scores]):.3f}"

    def finetune(
        self, cell: Cell, on_test_cases: bool, weights: Path | None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Train and score a cell; return the rows of its scores and of its curve."""
        results, fold = self._results(cell), self._fold_folder(cell)
        settings = {
            "save_every_minutes": 1e6,
            **SAVING[self.device],
            **self.config["finetuning"],
            **self.config["plans"][cell.plans].get("finetuning", {}),
            **changes_of(self.config, cell.variant).get("finetuning", {}),
            **self.config["arms"][cell.arm].get("finetuning", {}),
            "seed": cell.seed,
        }
        where = (cell.plans, FINETUNE, self.fold(cell), results)
        final = fold / "checkpoint_final.pth"
        if not final.is_file():
            flags: list[object] = ["-pretrained_weights", weights] if weights else []
            flags = ["--c"] if has_checkpoint(fold) else flags
            self.training.run(*where, *flags, **variables("nnUNet_vf_finetune_", settings))
        elif not (fold / "validation" / "summary.json").is_file():
            self.training.run(*where, "--val")
        if on_test_cases:
            self._predict(cell)
            scores = self.score_test_cases(cell)
        else:
            scores = self.data.score("validation", fold / "validation")
        return scores, read_curve(final, settings["iterations_per_epoch"], [*self.data.classes()])

    def _results(self, cell: Cell) -> Path:
        return self.workspace.folder / "finetuning" / cell.variant / cell.arm

    def _fold_folder(self, cell: Cell) -> Path:
        return self.workspace.fold_folder(self.dataset, FINETUNE, self.fold(cell), self._results(cell), cell.plans)

    def predictions(self, cell: Cell) -> Path:
        """Return the folder with the predictions of a cell's test cases."""
        return self._fold_folder(cell) / "predicted"

    def score_test_cases(self, cell: Cell, largest_component: bool = False) -> list[dict[str, Any]]:
        """Return the scores of a cell's predictions of the test cases, one row for each case and class.

        Args:
            largest_component: score only the largest connected component of each class.
        """
        return self.data.score("test", self.predictions(cell), largest_component)

    def _predict(self, cell: Cell) -> None:
        common = ("-p", cell.plans, "-tr", FINETUNE, "-device", self.device, "-f", self.fold(cell))
        self.workspace.run(
            *("nnUNetv2_predict", "-d", self.dataset, "-c", "3d_fullres", *common, "-npp", 1, "-nps", 1),
            *("-i", self.data.test_images, "-o", self.predictions(cell)),
            nnUNet_results=self._results(cell),
        )


def require_same_configuration(folders: Iterable[Path], config: Mapping[str, Any]) -> None:
    """Check that folders have this configuration, then write its record into all of them.

    Networks, arms and variants may be added; seeds and the source of the data may change.

    Raises:
        UserError: a folder has another configuration. Nothing was written.
    """
    records = {folder / RECORD: _updated_record(folder / RECORD, config) for folder in folders}
    for file, content in records.items():
        write_result(file, content)


def _updated_record(record: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a record after networks, arms and variants were added to it.

    Raises:
        UserError: the record is that of another configuration.
    """
    current = {name: value for name, value in config.items() if name not in ("seeds", "source")}
    if not record.is_file():
        return current
    recorded = json.loads(record.read_text())
    for name in ("plans", "pretraining_plans", "arms", "variants"):
        recorded[name] = {**current.get(name, {}), **recorded.get(name, {})}
        current[name] = {**recorded[name], **current.get(name, {})}
    different = [name for name in current if recorded.get(name) != current[name]]
    if different:
        raise UserError(f"{record} has other {', '.join(different)}; move it and the files beside it away")
    return current


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
