"""The label efficiency experiment: splits, cells, scores and tables; (slow) the whole experiment on a few phantoms."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import SimpleITK
import torch
from cells import (
    CELL,
    CURVES,
    DEFAULT_VARIANT,
    LARGEST_COMPONENT,
    SCORES,
    VARIANTS,
    Cell,
    Tables,
    belongs_to,
    read_rows,
    write_cell,
)
from common import RESULTS, describe_device
from experiment_data import MAX_SEEDS, draw_fold
from foreign_checkpoints import nnssl_checkpoint
from label_efficiency import RECORD, Experiment, main, require_same_configuration
from label_efficiency_figures import draw_lengths
from label_efficiency_report import EXPERIMENTS, PAGES, fill_page, make_tables, read_experiment, write_report
from label_efficiency_tables import (
    PRETRAININGS,
    TABLE,
    bootstrap_interval,
    curves_table,
    early_table,
    gains_of_cases,
    largest_component_table,
    lengths_table,
    pretrainings_table,
    read_table,
    scores_table,
    t_interval,
)
from largest_component import score_largest_components
from pretrainings import REPORT, Pretrainings
from segmentation_scores import score

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.artifact import read_artifact

HIPPOCAMPUS = "hippocampus"
CONFIG = read_experiment(HIPPOCAMPUS)
EXPERIMENTS_WITH_RESULTS = sorted(file.parent.name for file in RESULTS.rglob(SCORES))
ARMS = ("scratch", "encoder", "full")


@pytest.fixture
def experiment(tmp_path):
    return Experiment(CONFIG, Workspace(tmp_path / "workspace", processes=1), "cpu", jobs=1)


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("experiment", sorted(file.stem for file in EXPERIMENTS.glob("*.json")))
def test_every_case_has_one_role(experiment):
    config = read_experiment(experiment)
    roles = config["split"]
    cases = [case for role in ("labelled", "validation", "test") for case in roles[role]]
    expected = {"Dataset004_Hippocampus": (130, 90), "Dataset101_LeftAtrium": (100, 80)}[config["dataset"]]
    assert (len(cases), len(roles["labelled"] + roles["validation"])) == expected
    assert len(set(cases)) == len(cases)


def test_an_experiment_has_the_entries_of_the_one_that_it_inherits_from():
    pretexts, parent = read_experiment("left_atrium_pretexts"), read_experiment("left_atrium")
    assert pretexts["split"] == parent["split"]
    assert (pretexts["labels"], parent["labels"]) == ([4, 8], [4, 8, 16])
    assert "inherits_from" not in pretexts


def test_an_unknown_experiment_is_refused_with_the_legal_ones():
    with pytest.raises(UserError, match="there is no experiment 'liver'; legal: hippocampus, hippocampus_pretexts, "):
        read_experiment("liver")


def test_no_job_at_a_time_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    arguments = ["left_atrium", str(tmp_path), "--work", str(tmp_path / "work"), "--jobs", "0"]
    monkeypatch.setattr("sys.argv", ["label_efficiency.py", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "--jobs 0: legal are numbers from 1" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_more_labels_add_cases_and_another_seed_draws_other_cases():
    splits = {(labels, seed): set(draw_fold(CONFIG, labels, seed)["train"]) for labels in (2, 5, 40) for seed in (0, 1)}
    assert {key: len(cases) for key, cases in splits.items()} == {key: key[0] for key in splits}
    assert splits[2, 0] < splits[5, 0] < splits[40, 0]
    assert splits[5, 0] != splits[5, 1]
    assert not set().union(*splits.values()) & {*CONFIG["split"]["validation"], *CONFIG["split"]["test"]}


def test_every_number_of_labels_and_seed_has_its_own_fold(experiment):
    folds = [experiment.fold(Cell("p", "full", labels, seed)) for labels in CONFIG["labels"] for seed in (0, 7)]
    assert len(set(folds)) == len(folds)
    assert folds == [MAX_SEEDS * i + seed for i in range(len(CONFIG["labels"])) for seed in (0, 7)]
    with pytest.raises(UserError, match="3 labels"):
        experiment.fold(Cell("p", "full", 3, 0))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell("PCTNetPlans", "encoder", 5, 0, "sawtooth"), "both set schedule"),
        (Cell("PCTNetPlans", "scratch", 5, 0, "blocks"), "changes nothing"),
        (Cell("PCTNetPlans", "scratch", 5, 0, "frozen_encoder"), "changes nothing"),
        (Cell("PCTNetPlans", "scratch", 5, 0, "pretrained_norms"), "changes nothing"),
        (Cell("PCTNetPlans", "scratch", 5, 0, "fresh_last_stage"), "changes nothing"),
        (Cell("PCTNetPlans", "encoder", 5, 0, "fresh_last_stage"), "this arm's whole decoder is new already"),
        (Cell("PCTNetPlans", "full", 3, 0), "3 labels"),
        (Cell("Other", "full", 5, 0), "--plans Other is not in the experiment; legal: nnUNetPlansHalf, "),
        (Cell("PCTNetPlans", "other", 5, 0), "--arms other is not in the experiment; legal: scratch, "),
        (Cell("PCTNetPlans", "full", 5, 0, "other"), "--variants other is not in the experiment; legal: sgd, "),
    ],
)
def test_a_variant_that_does_not_apply_to_the_arm_is_refused_before_anything_runs(experiment, tmp_path, cell, message):
    with pytest.raises(UserError, match=message):
        experiment.run([cell], tmp_path, on_test_cases=False)


def test_a_variant_of_settings_that_the_pretext_does_not_use_is_refused(tmp_path):
    config = read_experiment("left_atrium_pretexts")
    experiment = Experiment(config, Workspace(tmp_path / "workspace", processes=1), "cpu", jobs=1)
    experiment.check(Cell("nnUNetPlansHalfSmall", "fusion", 4, 0, "without_gamma"))
    experiment.check(Cell("nnUNetPlansHalfSmall", "fusion_masked", 4, 0, "without_gamma"))
    with pytest.raises(UserError, match="changes nothing in the arm's pretext"):
        experiment.check(Cell("nnUNetPlansHalfSmall", "masked", 4, 0, "without_gamma"))


def test_an_arm_of_nnssl_is_refused_if_neither_nnssl_nor_its_weights_are_there(tmp_path):
    config = read_experiment("hippocampus_pretexts")
    experiment = Experiment(config, Workspace(tmp_path / "workspace", processes=1), "cpu", jobs=1)
    write_plans(experiment, "nnUNetPlansHalfSmall", 24)
    cell = Cell("nnUNetPlansHalfSamePatch", "nnssl_masked", 2, 0)
    with pytest.raises(UserError, match="is pretrained by nnssl: add --nnssl PYTHON"):
        experiment.run([cell], tmp_path, on_test_cases=True)
    experiment.pretrainings.nnssl = tmp_path / "python"
    with pytest.raises(UserError, match=r"--nnssl .*python: there is no such program"):
        experiment.run([cell], tmp_path, on_test_cases=True)
    with pytest.raises(UserError, match="changes nothing in nnssl"):
        experiment.check(dataclasses.replace(cell, variant="blocks"))
    assert not experiment.workspace.log.exists()


def test_what_nnssl_has_pretrained_is_converted_once(tmp_path):
    experiment = Experiment(read_experiment("hippocampus_pretexts"), Workspace(tmp_path, processes=1), "cpu", jobs=1)
    write_plans(experiment, "nnUNetPlansHalfSmall", 24)
    torch.save(nnssl_checkpoint("PlainConvUNet", classes=1), tmp_path / "nnssl.pth")
    program = tmp_path / "python"  # stands for nnssl: nnssl_pretraining.py itself is tested beside the real one
    program.write_text(
        f'#!/bin/sh\nwhile [ "$1" != --folder ]; do shift; done\nmkdir -p "$2"\n'
        f'cp {tmp_path / "nnssl.pth"} "$2/checkpoint_final.pth"\n'
    )
    program.chmod(0o755)
    experiment.pretrainings.nnssl = program
    masked = experiment.pretrainings.of(Cell("nnUNetPlansHalfSamePatch", "nnssl_masked", 2, 0))
    weights = [experiment.pretrainings.make(masked) for _ in range(2)]
    assert read_artifact(weights[0])["vf"]["num_classes"] == 1
    (nnssl_command, *rest) = [line for line in experiment.workspace.log.read_text().splitlines() if line[:1] == "$"]
    assert "--pretext masked --seed 0 --mask-side 8 --epochs 80 --iterations 50" in nnssl_command
    assert len(rest) == 1, "a second call makes nothing"
    experiment.pretrainings.keep_report(masked, weights[1], tmp_path / PRETRAININGS)
    assert not (tmp_path / PRETRAININGS).exists(), "nnssl writes no report"


def test_a_folder_without_the_dataset_is_refused_in_one_line(experiment, tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is not Dataset004_Hippocampus: 260 files are missing, the first is imagesTr/hippo.*_0000"
    ):
        experiment.data.prepare(tmp_path)
    assert not any(experiment.workspace.raw.iterdir())


def write_plans(experiment: Experiment, name: str, patch_size: int) -> None:
    file = experiment.workspace.preprocessed / experiment.dataset / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"patch_size": patch_size}))


def test_cells_with_the_same_plans_and_pretraining_settings_share_a_pretraining(experiment):
    def fingerprint(variant: str, plans: str = "nnUNetPlans") -> str:
        return experiment.pretrainings.fingerprint(experiment.pretrainings.of(Cell(plans, "full", 5, 0, variant)))

    write_plans(experiment, "nnUNetPlansSmall", 24)
    write_plans(experiment, "nnUNetPlansHalfSmall", 24)
    fingerprints = [fingerprint(name) for name in ("default", "sgd", "blocks", "blocks_lower_rate")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2] == fingerprints[3]
    assert fingerprint("default", "nnUNetPlansHalf") != fingerprints[0], "this network is pretrained for longer"
    write_plans(experiment, "nnUNetPlansSmall", 32)
    assert fingerprint("default") != fingerprints[0]


def test_cells_from_scratch_do_not_wait_for_a_pretraining(tmp_path):
    first_cell_is_done = threading.Event()

    class RecordedPretrainings(Pretrainings):
        def make(self, pretraining):
            assert first_cell_is_done.wait(60), "the first cell to run must be from scratch"
            (tmp_path / REPORT).write_text("{}")
            return tmp_path / pretraining.plans

    class Recorded(Experiment):
        def finetune(self, cell, on_test_cases, weights):
            weights_of[cell.arm] = weights and weights.name
            first_cell_is_done.set()
            return [{"case": "a", "class": "A", "dice": 0.5}], [{"iteration": 1, "class": "A", "dice": 0.5}]

    weights_of: dict[str, str | None] = {}
    cells = [Cell("nnUNetPlans", arm, 5, 0) for arm in ("full", "scratch", "encoder")]
    experiment = Recorded(CONFIG, Workspace(tmp_path, processes=1), "cpu", jobs=2)
    experiment.pretrainings = RecordedPretrainings(CONFIG, experiment.training)
    write_plans(experiment, "nnUNetPlansSmall", 24)
    experiment.run(cells, tmp_path, on_test_cases=True)
    assert weights_of == {"scratch": None, "full": "nnUNetPlansSmall", "encoder": "nnUNetPlansSmall"}
    fingerprints = {row["arm"]: row["pretraining"] for row in read_rows(tmp_path / SCORES)}
    assert fingerprints["full"] == fingerprints["encoder"] != "" == fingerprints["scratch"]
    assert [file.stem for file in (tmp_path / PRETRAININGS).iterdir()] == [fingerprints["full"]]


def test_a_cell_that_would_not_end_in_time_is_not_started(tmp_path, capsys):
    class Recorded(Experiment):
        def finetune(self, cell, on_test_cases, weights):
            started.append(cell)
            return [{"case": "a", "class": "A", "dice": 0.5}], [{"iteration": 1, "class": "A", "dice": 0.5}]

    started: list[Cell] = []
    first, slow, other = (
        Cell("nnUNetPlans", "scratch", 5, 0),
        Cell("nnUNetPlans", "scratch", 5, 1),
        Cell("PCTNetPlans", "scratch", 5, 0),
    )
    took = {"seconds": 90, "machine": describe_device("cpu")}
    write_cell(tmp_path / SCORES, CELL, first, [{"case": "a", "class": "A", "dice": 0.5, **took}])
    experiment = Recorded(CONFIG, Workspace(tmp_path, processes=1), "cpu", jobs=1)
    experiment.run([first, slow, other], tmp_path, on_test_cases=True, minutes=1)
    assert started == [other], "one network took longer than the time that is left; how long the other takes is unknown"
    assert f"{slow}: not started, it would not end in time" in capsys.readouterr().out


def test_a_finished_cell_of_this_run_counts_too(tmp_path, capsys):
    class Slow(Experiment):
        def finetune(self, cell, on_test_cases, weights):
            time.sleep(2)
            return [{"case": "a", "class": "A", "dice": 0.5}], [{"iteration": 1, "class": "A", "dice": 0.5}]

    cells = [Cell("nnUNetPlans", "scratch", 5, seed) for seed in (0, 1)]
    Slow(CONFIG, Workspace(tmp_path, processes=1), "cpu", jobs=1).run(cells, tmp_path, True, minutes=3 / 60)
    assert f"{cells[1]}: not started, it would not end in time" in capsys.readouterr().out


@pytest.mark.parametrize("of_test_cases", [True, False])
def test_the_longest_finished_cell_of_the_same_plans_variant_and_machine_counts(tmp_path, of_test_cases):
    tables, cell = Tables(tmp_path, of_test_cases), Cell("a", "full", 2, 0)
    assert tables.usual_seconds(cell, "CPU") == 0
    others = [
        (cell, 5, "CPU"),
        (dataclasses.replace(cell, seed=1), 70, "CPU"),
        (dataclasses.replace(cell, seed=2), "", "CPU"),  # a training that was continued
        (dataclasses.replace(cell, seed=3), 900, "GPU"),
        (dataclasses.replace(cell, plans="b"), 800, "CPU"),
    ]
    if not of_test_cases:
        others.append((dataclasses.replace(cell, variant="long"), 700, "CPU"))
    for other, seconds, machine in others:
        tables.add(other, [{"dice": 0.5, "seconds": seconds, "machine": machine}], [])
    assert tables.usual_seconds(cell, "CPU") == 70


def test_after_a_failure_no_cell_starts_and_those_that_run_are_recorded(tmp_path):
    both_run = threading.Barrier(2, timeout=60)

    class Failing(Experiment):
        def finetune(self, cell, on_test_cases, weights):
            started.append(cell)
            if cell.seed < 2:
                both_run.wait()
            if cell.seed == 0:
                raise UserError("the disk is full")
            time.sleep(0.2)  # the failure comes first
            return [{"case": "a", "class": "A", "dice": 0.5}], [{"iteration": 1, "class": "A", "dice": 0.5}]

    started: list[Cell] = []
    cells = [Cell("nnUNetPlans", "scratch", 5, seed) for seed in range(8)]
    experiment = Failing(CONFIG, Workspace(tmp_path, processes=1), "cpu", jobs=2)
    with pytest.raises(UserError, match="the disk is full"):
        experiment.run(cells, tmp_path, on_test_cases=True)
    assert len(started) == 2
    assert "1" in {row["seed"] for row in read_rows(tmp_path / SCORES)}


def test_cells_that_are_written_at_the_same_time_are_all_in_the_table(tmp_path):
    cells = [Cell("p", "full", 5, seed) for seed in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda cell: write_cell(tmp_path / SCORES, CELL, cell, [{"dice": 0.5}]), cells))
    assert {row["seed"] for row in read_rows(tmp_path / SCORES)} == {str(cell.seed) for cell in cells}


def test_every_row_names_the_machine_and_the_versions(tmp_path):
    class Recorded(Experiment):
        def finetune(self, cell, on_test_cases, weights):
            return [{"case": "a", "class": "A", "dice": 0.5}], [{"iteration": 1, "class": "A", "dice": 0.5}]

    Recorded(CONFIG, Workspace(tmp_path, processes=1), "cpu", jobs=1).run(
        [Cell("nnUNetPlans", "scratch", 5, 0)], tmp_path, on_test_cases=True
    )
    (row,) = read_rows(tmp_path / SCORES)
    assert "CPU core" in row["machine"]
    assert all(f"{name}=" in row["versions"] for name in ("nnunetv2-vf", "nnunetv2", "torch"))
    assert row["seconds"] == "0"


def test_a_folder_of_another_configuration_is_refused_and_nothing_is_written(tmp_path):
    tables, trainings = tmp_path / "tables", tmp_path / "trainings"
    require_same_configuration([trainings], CONFIG)
    require_same_configuration([trainings], {**CONFIG, "seeds": [0]})
    with pytest.raises(UserError, match=r"trainings.* has other finetuning; move it and the files beside"):
        require_same_configuration([tables, trainings], {**CONFIG, "finetuning": {}})
    assert not tables.exists()


@pytest.mark.parametrize("what", ["plans", "pretraining_plans", "variants"])
def test_entries_may_be_added_to_a_configuration_but_not_changed(tmp_path, what):
    name, *_ = CONFIG[what]
    require_same_configuration([tmp_path], {**CONFIG, what: {name: CONFIG[what][name]}})
    require_same_configuration([tmp_path], CONFIG)
    require_same_configuration([tmp_path], {**CONFIG, what: {}})
    with pytest.raises(UserError, match=f"has other {what}; move it"):
        require_same_configuration([tmp_path], {**CONFIG, what: {name: {}}})


# ---------------------------------------------------------------- the whole experiment with nnU-Net's commands

TINY = {"of": "nnUNetPlans", "features": [4, 8, 16], "batch_size": 2}
SHORT = {"num_epochs": 2, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "save_every": 1}


def logged_trainings(experiment: Experiment) -> list[str]:
    """Return the nnUNetv2_train commands that the experiment has run."""
    lines = experiment.workspace.log.read_text().splitlines()
    return [line for line in lines if line.startswith("$") and "nnUNetv2_train" in line]


@pytest.mark.slow
def test_the_experiment_scores_every_arm_and_repeats_no_finished_step(tmp_path):
    write_dataset(tmp_path / "data", range(8), spacing=12.0)
    cases = [f"torso_{number:04d}" for number in range(8)]
    config = {
        **CONFIG,
        "plans": {
            "Tiny": {**TINY, "pretrained_with": "TinySmall", "finetuning": {"optimizer": "adam"}},
            "nnUNetPlans": {"pretrained_with": "TinySmall"},  # unchanged plans
        },
        "pretraining_plans": {
            "TinySmall": {**TINY, "patch_size": [16, 16, 16], "pretraining": {"val_iterations_per_epoch": 2}}
        },
        "pretraining": SHORT,
        "finetuning": SHORT,
        "variants": {"blocks": {"pretraining": {"fusion_map": "blocks"}}},
        "labels": [2, 4],
        "split": {"labelled": cases[:4], "validation": cases[4:6], "test": cases[6:]},
    }
    tables, arms = tmp_path / "tables", ("scratch", "encoder", "full")
    experiment = Experiment(config, Workspace(tmp_path / "out", processes=1), "cpu", jobs=1)
    experiment.data.prepare(tmp_path / "data")
    cells = [Cell("Tiny", arm, 2, 1) for arm in arms]
    experiment.run(cells[:1], tables, on_test_cases=True)
    experiment.run(cells, tables, on_test_cases=True)
    experiment.run([Cell("Tiny", "full", 2, 1, "blocks")], tables, on_test_cases=False)

    scores, variants = read_rows(tables / SCORES), read_rows(tables / VARIANTS)
    assert {row["arm"] for row in scores} == set(arms)
    assert [{row["case"] for row in rows} for rows in (scores, variants)] == [set(cases[6:]), set(cases[4:6])]
    assert {row["iteration"] for row in read_rows(tables / CURVES)} == {"1", "2"}
    ran = [
        line for line in experiment.workspace.log.read_text().splitlines() if line.startswith("$") and "_train" in line
    ]
    pretrainings, finetunings = (
        [line for line in ran if f"-tr {trainer} " in line] for trainer in ("VFPretrainTrainer", "VFFinetuneTrainer")
    )
    assert len(finetunings) == 4, "a finished training must not run again"
    assert all("-p TinySmall" in line and "vf_val_iterations_per_epoch=2" in line for line in pretrainings)
    small = json.loads((experiment.workspace.preprocessed / config["dataset"] / "TinySmall.json").read_text())
    assert small["configurations"]["3d_fullres"]["patch_size"] == [16, 16, 16]
    assert ["fusion_map=blocks" in line for line in pretrainings] == [False, True]
    assert ["-pretrained_weights" in line for line in finetunings] == [False, True, True, True]

    results = experiment.workspace.folder / "finetuning" / "default" / "full"
    fold = experiment.workspace.fold_folder(
        config["dataset"], "VFFinetuneTrainer", experiment.fold(cells[2]), results, "Tiny"
    )
    for missing, flag in (("checkpoint_final.pth", "--c"), ("validation/summary.json", "--val")):
        (fold / missing).unlink()  # as if the cell had been interrupted before
        experiment.run(cells[2:], tmp_path / flag, on_test_cases=True)
        (last,) = [line for line in logged_trainings(experiment) if f" {flag}" in line]
        assert "-pretrained_weights" not in last
        again = [{**row, "seconds": None} for row in read_rows(tmp_path / flag / SCORES)]
        assert again == [{**row, "seconds": None} for row in scores if row["arm"] == "full"]


# ---------------------------------------------------------------- scores


def write_box(folder, name: str, start: int, size: int = 10, speck: int = 0):
    """Write an image with a box of label 2, and a cube of ``speck`` voxels a side in a corner."""
    array = np.zeros((20, 20, 30), np.uint8)
    array[5:15, 5:15, start : start + size] = 2
    array[:speck, :speck, 30 - speck :] = 2
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((2.0, 1.0, 1.0))  # the last axis of the array: 2 mm
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.nii.gz"
    SimpleITK.WriteImage(image, str(file))
    return file


@pytest.mark.parametrize("shift", [0, 3])
def test_dice_and_surface_distance_of_a_shifted_box(tmp_path, shift):
    result = score(write_box(tmp_path, "truth", 5), write_box(tmp_path, "prediction", 5 + shift), 2)
    assert result["dice"] == pytest.approx((10 - shift) / 10)
    assert result["jaccard"] == pytest.approx((10 - shift) / (10 + shift))
    assert result["sd95"] == pytest.approx(2.0 * shift)
    # 100 of the 488 surface voxels are on each of the two faces that lie 6 mm apart.
    assert result["asd"] == (0 if shift == 0 else pytest.approx(1.6, abs=0.4))


def test_an_empty_prediction_has_dice_0_and_no_surface_distance(tmp_path):
    result = score(write_box(tmp_path, "truth", 5), write_box(tmp_path, "empty", 5, size=0), 2)
    assert result["dice"] == 0
    assert result["jaccard"] == 0
    assert np.isnan(result["sd95"])
    assert np.isnan(result["asd"])


@pytest.mark.parametrize("size", [10, 0])
def test_only_the_largest_component_is_scored_if_asked(tmp_path, size):
    truth, prediction = write_box(tmp_path, "truth", 5), write_box(tmp_path, "prediction", 5, size, speck=3)
    everything, largest = (score(truth, prediction, 2, largest_component) for largest_component in (False, True))
    assert everything["dice"] == pytest.approx(2000 / 2027 if size else 0)
    assert largest["dice"] == (1 if size else 0)  # without the box, the cube is the largest component
    assert everything["asd"] > 0.2
    assert largest["asd"] == 0 if size else largest["asd"] == everything["asd"]


def test_an_empty_prediction_has_no_largest_component(tmp_path):
    assert score(write_box(tmp_path, "truth", 5), write_box(tmp_path, "empty", 5, size=0), 2, True)["dice"] == 0


def test_the_predictions_that_are_there_are_scored_once_more_with_their_largest_component(tmp_path, capsys):
    config = {**CONFIG, "split": {**CONFIG["split"], "test": ["a"]}}
    experiment = Experiment(config, Workspace(tmp_path / "workspace", processes=1), "cpu", jobs=1)
    raw = experiment.workspace.raw / experiment.dataset
    write_box(raw / "labelsTs", "a", 5)
    (raw / "dataset.json").write_text('{"labels": {"background": 0, "Box": 2}}')
    there, missing = (Cell("nnUNetPlansHalf", "full", 5, seed) for seed in (0, 1))
    write_box(experiment.predictions(there), "a", 5, speck=3)
    for cell in (there, missing):
        write_cell(tmp_path / SCORES, CELL, cell, [{"case": "a", "class": "Box", "dice": 0.5}])
    score_largest_components(experiment, tmp_path)
    (row,) = read_rows(tmp_path / LARGEST_COMPONENT)
    assert (row["seed"], row["case"], row["class"], row["dice"], row["asd"]) == ("0", "a", "Box", "1.0000", "0.0000")
    assert f"{missing}: left out, there is no {experiment.predictions(missing)}" in capsys.readouterr().out
    score_largest_components(experiment, tmp_path)
    assert f"{there}" not in capsys.readouterr().out


def test_a_class_that_is_in_neither_image_has_no_dice(tmp_path):
    assert np.isnan(score(write_box(tmp_path, "truth", 5), write_box(tmp_path, "prediction", 5), 1)["dice"])


# ---------------------------------------------------------------- cells and tables


def test_a_finished_cell_is_recognized_by_its_rows_in_the_table(tmp_path):
    file, cell = tmp_path / SCORES, Cell("p", "full", 5, 1)
    assert read_rows(file) == []
    write_cell(file, CELL, cell, [{"case": "a", "class": "Anterior", "dice": 0.5, "sd95": float("nan")}])
    write_cell(file, CELL, Cell("p", "full", 5, 2), [{"case": "a", "class": "Anterior", "dice": 1 / 3, "sd95": 2.0}])
    assert file.read_text().splitlines() == [
        "plans,arm,labels,seed,case,class,dice,sd95",
        "p,full,5,1,a,Anterior,0.5000,nan",
        "p,full,5,2,a,Anterior,0.3333,2.0000",
    ]
    assert [belongs_to(row, cell, CELL) for row in read_rows(file)] == [True, False]
    assert not any(belongs_to(row, Cell("p", "scratch", 5, 1), CELL) for row in read_rows(file))


def test_rows_with_more_columns_join_older_rows(tmp_path):
    file = tmp_path / SCORES
    write_cell(file, CELL, Cell("p", "full", 5, 1), [{"case": "a", "class": "A", "dice": 0.5}])
    write_cell(file, CELL, Cell("p", "full", 5, 2), [{"case": "a", "class": "A", "dice": 0.5, "asd": 1.0}])
    assert [row["asd"] for row in read_rows(file)] == ["", "1.0000"]


def test_the_rows_of_a_repeated_cell_replace_its_old_rows(tmp_path):
    file = tmp_path / SCORES
    for case, seed in (("a", 1), ("a", 2), ("b", 1)):
        write_cell(file, CELL, Cell("p", "full", 5, seed), [{"case": case, "class": "Anterior", "dice": 0.7}])
    assert [(row["case"], row["seed"]) for row in read_rows(file)] == [("a", "2"), ("b", "1")]


def write_results(tables, dice: dict[str, float], curves: dict[str, list[float]]) -> None:
    """Write made-up scores and curves with two seeds, cases and classes; seed 1 scores 0.1 more than seed 0."""
    for arm in ARMS:
        for seed in (0, 1):
            cell = Cell("p", arm, 5, seed)
            rows = [
                {"case": case, "class": name, "dice": dice[arm] + 0.1 * seed, "sd95": 1.0}
                for case in "ab"
                for name in ("Anterior", "Posterior")
            ]
            write_cell(tables / SCORES, CELL, cell, rows)
            curve = [
                {"iteration": 10 * (i + 1), "class": name, "dice": value}
                for i, value in enumerate(curves[arm])
                for name in ("Anterior", "Posterior")
            ]
            write_cell(tables / CURVES, CELL, cell, curve)


def test_the_interval_over_seeds_is_students_t():
    low, high = t_interval([9.1, 5.1, 9.8])
    assert (low, high) == pytest.approx((1.71, 14.29), abs=0.01)
    assert np.isnan(t_interval([3.0])).all()


@pytest.mark.pictures
def test_the_table_shows_gains_speed_and_collapsed_trainings(tmp_path):
    curves = {"scratch": [0, 0, 0.5, 0.5, 0.5, 0.5], "encoder": [0.0] * 6, "full": [0.5] * 6}
    write_results(tmp_path, {"scratch": 0.5, "encoder": 0.0, "full": 0.6}, curves)
    table = scores_table(read_table(tmp_path / SCORES), read_table(tmp_path / CURVES), ARMS)
    rows = {row["pretraining"]: row for row in table}
    assert rows["full"]["Dice"] == "0.650 ± 0.071"
    assert rows["full"]["gain"] == "+10.0"
    assert rows["full"]["gain of each seed"] == "+10.0, +10.0"
    for column in ("95 % over cases", "95 % over cases and seeds", "95 % over seeds"):
        assert rows["full"][column] == "+10.0 to +10.0"  # all cases and seeds gain the same
    assert rows["scratch"]["gain"] == "-"
    assert rows["full"]["iterations to scratch's end"] == "10"
    assert rows["scratch"]["iterations to scratch's end"] == "50"
    assert rows["full"]["share of scratch's iterations"] == "0.20, 0.20"
    assert rows["encoder"]["share of scratch's iterations"] == "not, not"
    assert (rows["encoder"]["iterations to scratch's end"], rows["encoder"]["collapsed"]) == ("not", "1")
    write_report(tmp_path, HIPPOCAMPUS, {**CONFIG, "plans": {"p": {}}})
    assert (tmp_path / "few_labels_hippocampus.png").stat().st_size > 10_000
    assert "| p | 5 | full |" in (tmp_path / TABLE).read_text()


def test_the_table_of_largest_components_has_the_scores_of_papers_on_the_left_atrium(tmp_path):
    for arm, dice in (("scratch", 0.5), ("full", 0.6)):
        rows = [{"case": case, "class": "LA", "dice": dice, "jaccard": 0.4, "sd95": 3.0, "asd": 1.25} for case in "ab"]
        write_cell(tmp_path / LARGEST_COMPONENT, CELL, Cell("p", arm, 4, 0), rows)
    scratch, full = largest_component_table(read_table(tmp_path / LARGEST_COMPONENT), ARMS)
    assert (scratch["gain"], full["gain"]) == ("-", "+10.0")
    assert full["95 % over seeds"] == "-", "there is one seed only"
    scores = {name: full[name] for name in ("Dice", "Jaccard", "sd95, mm", "asd, mm", "not found")}
    assert [*scores.values()] == ["0.600", "0.400", "3.00", "1.25", "0 of 2"]


@pytest.mark.parametrize("name", EXPERIMENTS_WITH_RESULTS)
def test_the_committed_tables_are_those_of_the_committed_results(tmp_path, name):
    copy = shutil.copytree(RESULTS / name, tmp_path / name)
    (copy / TABLE).unlink()
    write_report(copy, name, read_experiment(name))
    assert (copy / TABLE).read_text() == (RESULTS / name / TABLE).read_text()


@pytest.mark.parametrize("name", EXPERIMENTS_WITH_RESULTS)
def test_the_committed_results_are_of_the_recorded_configuration(name):
    record = json.loads((RESULTS / name / RECORD).read_text())
    for file in (SCORES, VARIANTS):
        for row in read_rows(RESULTS / name / file):
            assert row["plans"] in record["plans"]
            assert row["arm"] in record["arms"]
            assert row.get("variant", DEFAULT_VARIANT) in [DEFAULT_VARIANT, *record["variants"]]
            assert int(row["labels"]) in record["labels"]


@pytest.mark.parametrize("name", EXPERIMENTS_WITH_RESULTS)
def test_the_pages_show_the_tables_of_the_committed_results(name):
    tables = make_tables(RESULTS / name, read_experiment(name))
    pages = [page.read_text() for page in PAGES.glob("*.md")]
    assert {*re.findall(rf"<!-- {name}: (.*) -->", "".join(pages))} == {*tables}
    for page in pages:
        assert fill_page(page, name, tables) == page


def test_a_table_replaces_the_older_one_below_its_comment():
    old = "Text.\n\n<!-- e: Test cases -->\n\n| a |\n| --- |\n| 1 |\n| 2 |\n\n<!-- e: Curves -->\n\n| b |\n"
    new = "Text.\n\n<!-- e: Test cases -->\n\n| a |\n| --- |\n| \\3 |\n\n<!-- e: Curves -->\n\n| b |\n"
    tables = {"Test cases": [{"a": "\\3"}], "Not there": [{"a": "4"}]}
    assert fill_page(old, "e", tables) == fill_page(new, "e", tables) == new
    assert fill_page("<!-- e: Test cases -->\nText.\n", "e", tables) == (
        "<!-- e: Test cases -->\n\n| a |\n| --- |\n| \\3 |\n\nText.\n"
    )


def test_curves_are_tabulated_without_scores_of_test_cases(tmp_path):
    curve = [0.1, 0.2, 0.5, 0.5]
    write_results(tmp_path, dict.fromkeys(ARMS, 0.5), dict.fromkeys(ARMS, curve))
    rows = curves_table(read_table(tmp_path / CURVES), ARMS)
    assert [row["pretraining"] for row in rows] == [*ARMS]
    assert {(row["at the end"], row["of each seed"], row["iterations to scratch's end"]) for row in rows} == {
        ("0.400 ± 0.000", "0.400, 0.400", "40")
    }


def test_the_early_columns_are_means_over_classes_and_seeds():
    dice = {(seed, name): 0.1 * seed + 0.2 * (name == "b") for seed in (0, 1) for name in "ab"}
    common = {"plans": "p", "arm": "full", "labels": 2}
    curves = pd.DataFrame(
        [
            {**common, "seed": seed, "class": name, "iteration": iteration, "dice": value * iteration / 50}
            for (seed, name), value in dice.items()
            for iteration in (50, 100)
        ]
    )
    (row,) = curves_table(curves, ["full"])
    assert [row[f"after {iteration}"] for iteration in (25, 50, 100, 200)] == ["-", "0.15", "0.30", "-"]


def test_what_the_pretrainings_have_learnt_is_tabulated(tmp_path):
    settings = {"pretext": "fusion+masked", "num_epochs": 3, "iterations_per_epoch": 50}
    report = {"samples": 8, "dice_per_class": {"a": 0.2, "b": 0.6}, "restored_share": {"channel_0": 0.5}}
    (tmp_path / "5481ff4a8bda.json").write_text(json.dumps({**report, "settings": settings}))
    (row,) = pretrainings_table(tmp_path)
    assert [*row.values()] == ["fusion+masked", "-", "150", "8", "0.40", "0.20, 0.60", "0.50"]


def test_the_settings_of_a_pretraining_that_are_not_the_default_are_tabulated(tmp_path):
    settings = VFSettings(pretext="fusion+masked", mask_fraction=0.3, mask_side=8, gamma=(1, 1), num_epochs=3).as_dict()
    report = {"samples": 8, "dice_per_class": {}, "restored_share": {}, "settings": settings}
    (tmp_path / "5481ff4a8bda.json").write_text(json.dumps(report))
    (row,) = pretrainings_table(tmp_path)
    assert row["changed settings"] == "gamma=1.0,1.0, mask_side=8"


def test_arms_that_differ_in_the_length_of_their_pretraining_are_compared(tmp_path):
    config = read_experiment("hippocampus_pretexts")
    dice = {"scratch": 0.5, "masked": 0.6, "fusion_masked": 0.52, "fusion_masked_1000": 0.51}
    plans = "nnUNetPlansHalfSamePatch"
    rows = [
        {"plans": plans, "labels": 2, "arm": arm, "seed": seed, "case": case, "class": "A", "dice": value + 0.1 * seed}
        for arm, value in dice.items()
        for seed in (0, 1)
        for case in ("a", "b")
    ]
    table = lengths_table(pd.DataFrame(rows), config)
    assert [(row["pretraining"], row["iterations of the pretraining"], row["gain of each seed"]) for row in table] == [
        ("fusion_masked_1000", "1000", "+1.0, +1.0"),
        ("fusion_masked", "4000", "+2.0, +2.0"),
    ]
    longer = {"pretraining_plans": {"nnUNetPlansHalfSmall": {"pretraining": {"iterations_per_epoch": 500}}}}
    lengths = [row["iterations of the pretraining"] for row in lengths_table(pd.DataFrame(rows), {**config, **longer})]
    assert lengths == ["10000", "40000"]
    draw_lengths(pd.DataFrame(rows), config, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").is_file()


def test_the_gain_of_a_case_uses_the_seeds_that_both_arms_have():
    def rows(dice: dict[tuple[int, str], float]) -> pd.DataFrame:
        return pd.DataFrame([{"seed": seed, "case": case, "dice": value} for (seed, case), value in dice.items()])

    full = rows({(0, "a"): 0.5, (0, "b"): 0.9, (1, "a"): 0.1, (1, "b"): 0.1})
    scratch = rows({(0, "b"): 0.6, (0, "a"): 0.4})
    assert gains_of_cases(full, scratch, [0]) == pytest.approx(np.array([[0.1, 0.3]]))


def test_the_start_of_a_curve_is_tabulated_for_each_seed():
    rows = [
        {"plans": "p", "arm": "full", "labels": 2, "seed": seed, "variant": "v", "iteration": iteration, "dice": dice}
        for seed in (0, 1)
        for iteration, dice in ((25, 0.1 + 0.2 * seed), (50, 0.5), (75, 0.9))
    ]
    (row,) = early_table(pd.DataFrame(rows))
    assert row["after 25"] == "0.200 (0.100, 0.300)"
    assert (row["after 50"], row["after 100"]) == ("0.500 (0.500, 0.500)", "-")
    assert row["at the end"] == "0.533 (0.500, 0.567)"


def test_the_interval_contains_the_mean_gain_and_narrows_with_more_cases():
    gains = np.random.default_rng(3).normal(1.0, 2.0, (1, 400))
    low, high = bootstrap_interval(gains, draw_seeds=False)
    low_of_few, high_of_few = bootstrap_interval(gains[:, :25], draw_seeds=False)
    assert low < 1.0 < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.2)  # the interval of a normal distribution
    assert high_of_few - low_of_few > 2 * (high - low)


def test_seeds_that_differ_widen_the_interval_over_cases_and_seeds():
    seeds = np.array([[0.0], [1.0], [5.0]])
    gains = seeds + np.random.default_rng(3).normal(0.0, 0.1, (3, 400))
    assert bootstrap_interval(gains, draw_seeds=False) == pytest.approx((2, 2), abs=0.1)
    # 1 of 27 draws has only the first seed: 3.7 %, more than the 2.5 % below the interval. So has the last seed.
    assert bootstrap_interval(gains, draw_seeds=True) == pytest.approx((0, 5), abs=0.1)
    assert bootstrap_interval(gains - seeds, draw_seeds=True) == pytest.approx((0, 0), abs=0.1)
