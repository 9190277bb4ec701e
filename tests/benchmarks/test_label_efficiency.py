"""The experiment: splits, scores, cells that are done, tables; and (slow) all of it on a few phantoms."""

from __future__ import annotations

import json
import re
import threading

import label_efficiency
import numpy as np
import pytest
import SimpleITK
from label_efficiency import RECORD, Cell, Experiment, append_rows, keep_to_one_configuration, score
from label_efficiency_report import (
    CELL,
    CURVES,
    PAGE,
    SCORES,
    VARIANTS,
    _gain_of_cases,
    _interval,
    curves_table,
    distinct,
    is_done,
    read_rows,
    table,
    write_report,
)
from side_by_side import DOCS

from nnunetv2_vf.demo.phantoms import write_dataset
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace

CONFIG = json.loads(label_efficiency.CONFIG.read_text())
ARMS = ("scratch", "encoder", "full")


@pytest.fixture
def experiment(tmp_path):
    return Experiment(CONFIG, Workspace(tmp_path / "host", processes=1), "cpu", jobs=1)


# ---------------------------------------------------------------- splits


def test_no_case_has_two_roles():
    roles = CONFIG["split"]
    cases = [case for role in ("labelled", "validation", "test") for case in roles[role]]
    assert len(cases) == len(set(cases)) == 130
    assert len(roles["labelled"] + roles["validation"]) == 90


def test_more_labels_are_further_cases_and_another_seed_means_others(experiment):
    splits = {(labels, seed): set(experiment._split(labels, seed)["train"]) for labels in (2, 5, 40) for seed in (0, 1)}
    assert {key: len(cases) for key, cases in splits.items()} == {key: key[0] for key in splits}
    assert splits[2, 0] < splits[5, 0] < splits[40, 0]
    assert splits[5, 0] != splits[5, 1]
    assert not set().union(*splits.values()) & {*CONFIG["split"]["validation"], *CONFIG["split"]["test"]}


def test_a_fold_is_a_number_of_labels_and_a_seed(experiment):
    folds = [experiment.fold(Cell("p", "full", labels, seed)) for labels in CONFIG["labels"] for seed in (0, 7)]
    assert len(set(folds)) == len(folds)
    assert [experiment._of_fold(fold) for fold in folds] == [(n, s) for n in CONFIG["labels"] for s in (0, 7)]
    with pytest.raises(UserError, match="3 labels"):
        experiment.fold(Cell("p", "full", 3, 0))


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (Cell("p", "encoder", 5, 0, "sawtooth"), "both set schedule"),
        (Cell("p", "scratch", 5, 0, "blocks"), "means nothing"),
        (Cell("p", "scratch", 5, 0, "sawtooth"), "means nothing"),
        (Cell("p", "scratch", 5, 0, "pretrained_norms"), "means nothing"),
        (Cell("p", "scratch", 5, 0, "fresh_last_stage"), "means nothing"),
        (Cell("p", "encoder", 5, 0, "fresh_last_stage"), "all of this arm's decoder begins anew"),
        (Cell("p", "full", 3, 0), "3 labels"),
    ],
)
def test_cells_without_meaning_are_refused_before_anything_runs(experiment, tmp_path, cell, message):
    with pytest.raises(UserError, match=message):
        experiment.run([cell], tmp_path, on_test_cases=False)


def test_data_that_are_not_the_datasets_are_refused_in_one_line(experiment, tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not Dataset004_Hippocampus: 260 files are missing, imagesTr/hippo.*_0000"):
        experiment.prepare(tmp_path)
    assert not any(experiment.host.raw.iterdir())


def test_variants_that_pretrain_alike_share_a_pretraining(experiment):
    assert [experiment._pretraining(name) for name in ("default", "sawtooth", "blocks", "blocks_lower_rate")] == [
        "default", "default", "blocks", "blocks"
    ]  # fmt: skip


def test_from_scratch_nothing_waits_for_a_pretraining(tmp_path):
    one_is_done = threading.Event()

    class Recorded(Experiment):
        def pretrain(self, plans, variant):
            assert one_is_done.wait(60), "the first cell to run has to be one from scratch"
            return tmp_path / f"{plans}, {variant}"

        def finetune(self, cell, on_test_cases, pretrained):
            begins_with[cell.arm] = pretrained and pretrained.result().name
            one_is_done.set()
            return [{"case": "a", "class": "A", "dice": 0.5}], [{"iteration": 1, "class": "A", "dice": 0.5}]

    begins_with: dict[str, str | None] = {}
    cells = [Cell("nnUNetPlans", arm, 5, 0) for arm in ("full", "scratch", "encoder")]
    Recorded(CONFIG, Workspace(tmp_path, processes=1), "cpu", jobs=2).run(cells, tmp_path, on_test_cases=True)
    source = "nnUNetPlansSmall, default"
    assert begins_with == {"scratch": None, "full": source, "encoder": source}


def test_a_table_is_of_one_configuration(tmp_path):
    record = tmp_path / "docs" / RECORD
    keep_to_one_configuration(record, CONFIG)
    keep_to_one_configuration(record, {**CONFIG, "seeds": [0]})
    with pytest.raises(UserError, match="has other finetuning; move it and what lies beside"):
        keep_to_one_configuration(record, {**CONFIG, "finetuning": {}})


@pytest.mark.parametrize("what", ["plans", "pretraining_plans", "variants"])
def test_further_ones_may_join_a_table_but_none_may_change(tmp_path, what):
    record, (name, *_) = tmp_path / RECORD, CONFIG[what]
    keep_to_one_configuration(record, {**CONFIG, what: {name: CONFIG[what][name]}})
    keep_to_one_configuration(record, CONFIG)
    keep_to_one_configuration(record, {**CONFIG, what: {}})
    with pytest.raises(UserError, match=f"has other {what}; move it"):
        keep_to_one_configuration(record, {**CONFIG, what: {name: {}}})


# ---------------------------------------------------------------- all of it, with nnU-Net's own commands

TINY = {"of": "nnUNetPlans", "features": [4, 8, 16], "batch_size": 2}
SHORT = {"num_epochs": 2, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "save_every": 1}


@pytest.mark.slow
def test_pretrains_fine_tunes_and_scores_every_arm_and_does_nothing_twice(tmp_path):
    write_dataset(tmp_path / "data", range(8), spacing=12.0)
    cases = [f"torso_{number:04d}" for number in range(8)]
    config = {
        **CONFIG,
        "plans": {
            "Tiny": {**TINY, "pretrained_with": "TinySmall", "finetuning": {"optimizer": "adam"}},
            "nnUNetPlans": {"pretrained_with": "TinySmall"},  # as it was planned
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
    docs, arms = tmp_path / "docs", ("scratch", "encoder", "full")
    experiment = Experiment(config, Workspace(tmp_path / "out", processes=1), "cpu", jobs=1)
    experiment.prepare(tmp_path / "data")
    cells = [Cell("Tiny", arm, 2, 1) for arm in arms]
    experiment.run(cells[:1], docs, on_test_cases=True)
    experiment.run(cells, docs, on_test_cases=True)
    experiment.run([Cell("Tiny", "full", 2, 1, "blocks")], docs, on_test_cases=False)

    scores, variants = read_rows(docs / SCORES), read_rows(docs / VARIANTS)
    assert distinct(scores, "arm") == sorted(arms)
    assert (distinct(scores, "case"), distinct(variants, "case")) == (cases[6:], cases[4:6])
    assert {row["iteration"] for row in read_rows(docs / CURVES)} == {"1", "2"}
    ran = [line for line in experiment.host.log.read_text().splitlines() if line.startswith("$") and "_train" in line]
    pretrainings, finetunings = (
        [line for line in ran if f"-tr {trainer} " in line] for trainer in ("VFPretrainTrainer", "VFFinetuneTrainer")
    )
    assert len(finetunings) == 4, "what was done is not done again"
    assert all("-p TinySmall" in line and "vf_val_iterations_per_epoch=2" in line for line in pretrainings)
    small = json.loads((experiment.host.preprocessed / config["dataset"] / "TinySmall.json").read_text())
    assert small["configurations"]["3d_fullres"]["patch_size"] == [16, 16, 16]
    assert ["fusion_map=blocks" in line for line in pretrainings] == [False, True]
    assert ["-pretrained_weights" in line for line in finetunings] == [False, True, True, True]

    results = experiment.host.folder / "finetuning" / "default" / "full"
    fold = experiment.host.fold_folder(
        config["dataset"], "VFFinetuneTrainer", experiment.fold(cells[2]), results, "Tiny"
    )
    for missing, flag in (("checkpoint_final.pth", "--c"), ("validation/summary.json", "--val")):
        (fold / missing).unlink()  # as where it was interrupted before
        experiment.run(cells[2:], tmp_path / flag, on_test_cases=True)
        (last,) = [
            line for line in experiment.host.log.read_text().splitlines() if f" {flag}" in line and "_train" in line
        ]
        assert "-pretrained_weights" not in last
        assert read_rows(tmp_path / flag / SCORES) == [row for row in scores if row["arm"] == "full"]


# ---------------------------------------------------------------- scores


def box(tmp_path, name: str, start: int, size: int = 10):
    array = np.zeros((20, 20, 30), np.uint8)
    array[5:15, 5:15, start : start + size] = 2
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing((2.0, 1.0, 1.0))  # the last axis of the array: 2 mm
    file = tmp_path / f"{name}.nii.gz"
    SimpleITK.WriteImage(image, str(file))
    return file


@pytest.mark.parametrize("shift", [0, 3])
def test_dice_and_distance_of_a_shifted_box(tmp_path, shift):
    found = score(box(tmp_path, "truth", 5), box(tmp_path, "predicted", 5 + shift), 2)
    assert found["dice"] == pytest.approx((10 - shift) / 10)
    assert found["sd95"] == pytest.approx(2.0 * shift)


def test_what_is_not_found_has_no_distance(tmp_path):
    found = score(box(tmp_path, "truth", 5), box(tmp_path, "empty", 5, size=0), 2)
    assert found["dice"] == 0
    assert np.isnan(found["sd95"])
    assert np.isnan(score(box(tmp_path, "truth", 5), box(tmp_path, "predicted", 5), 1)["dice"])


# ---------------------------------------------------------------- cells and tables


def test_a_cell_that_is_done_is_known_from_the_table_alone(tmp_path):
    file, cell = tmp_path / SCORES, Cell("p", "full", 5, 1)
    assert not is_done(read_rows(file), vars(cell))
    append_rows(file, CELL, cell, [{"case": "a", "class": "Anterior", "dice": 0.5, "sd95": float("nan")}])
    append_rows(file, CELL, Cell("p", "full", 5, 2), [{"case": "a", "class": "Anterior", "dice": 1 / 3, "sd95": 2.0}])
    assert file.read_text().splitlines() == [
        "plans,arm,labels,seed,case,class,dice,sd95",
        "p,full,5,1,a,Anterior,0.5000,nan",
        "p,full,5,2,a,Anterior,0.3333,2.0000",
    ]
    assert is_done(read_rows(file), vars(cell))
    assert not is_done(read_rows(file), vars(Cell("p", "scratch", 5, 1)))
    append_rows(file, CELL, cell, [{"case": "b", "class": "Anterior", "dice": 0.7, "sd95": 1.0}])
    assert [row["case"] for row in read_rows(file)] == ["a", "b"], "done again it takes its own place"


def write_made_up_results(docs, dice: dict[str, float], iterations: dict[str, list[float]]) -> None:
    for arm in ARMS:
        for seed in (0, 1):
            cell = Cell("p", arm, 5, seed)
            rows = [
                {"case": case, "class": name, "dice": dice[arm] + 0.1 * seed, "sd95": 1.0}
                for case in "ab"
                for name in ("Anterior", "Posterior")
            ]
            append_rows(docs / SCORES, CELL, cell, rows)
            curve = [
                {"iteration": 10 * (i + 1), "class": name, "dice": value}
                for i, value in enumerate(iterations[arm])
                for name in ("Anterior", "Posterior")
            ]
            append_rows(docs / CURVES, CELL, cell, curve)


def test_the_table_tells_gains_speed_and_collapses(tmp_path):
    curves = {"scratch": [0, 0, 0.5, 0.5, 0.5, 0.5], "encoder": [0.0] * 6, "full": [0.5] * 6}
    write_made_up_results(tmp_path, {"scratch": 0.5, "encoder": 0.0, "full": 0.6}, curves)
    rows = {row["arm"]: row for row in table(read_rows(tmp_path / SCORES), read_rows(tmp_path / CURVES), ARMS)}
    assert rows["full"]["Dice"] == "0.650 ± 0.071"
    assert rows["full"]["points against scratch"] == "+10.0"
    assert rows["full"]["of each seed"] == "+10.0, +10.0"
    assert rows["full"]["95 % over cases"] == "+10.0 to +10.0"  # all cases gain the same
    assert rows["scratch"]["points against scratch"] == "-"
    assert rows["full"]["reaches scratch's"] == "10"
    assert rows["scratch"]["reaches scratch's"] == "50"
    assert rows["full"]["part of scratch's iterations"] == "0.20, 0.20"
    assert rows["encoder"]["part of scratch's iterations"] == "not, not"
    assert (rows["encoder"]["reaches scratch's"], rows["encoder"]["collapsed"]) == ("not", "2")
    write_report(tmp_path, CONFIG)
    assert (tmp_path / "label_efficiency.png").stat().st_size > 10_000
    assert "| p | 5 | full |" in (tmp_path / "label_efficiency_table.md").read_text()


def test_the_committed_page_has_the_tables_of_the_committed_results(tmp_path):
    page = (DOCS / PAGE).read_text()
    for name in (SCORES, CURVES, VARIANTS, PAGE):
        (tmp_path / name).write_text((DOCS / name).read_text())
    (tmp_path / PAGE).write_text(re.sub(r"0\.8\d\d ±", "0.000 ±", page))
    write_report(tmp_path, CONFIG)
    text, tables = (tmp_path / PAGE).read_text(), (tmp_path / "label_efficiency_table.md").read_text()
    rows = [line for line in tables.splitlines() if line.startswith("| PCTNet") or line.startswith("| nnUNet")]
    assert len(rows) > 20
    assert all(row in page.splitlines() and row in text.splitlines() for row in rows)


def test_a_curve_counts_though_its_test_cases_were_not_predicted(tmp_path):
    curve = [0.1, 0.2, 0.5, 0.5]
    write_made_up_results(tmp_path, dict.fromkeys(ARMS, 0.5), dict.fromkeys(ARMS, curve))
    rows = curves_table(read_rows(tmp_path / CURVES), ARMS)
    assert [row["arm"] for row in rows] == [*ARMS]
    assert {(row["pseudo Dice"], row["of each seed"], row["reaches scratch's"]) for row in rows} == {
        ("0.400 ± 0.000", "0.400, 0.400", "40")
    }


def test_gains_are_of_the_same_case_and_of_seeds_that_both_have():
    def rows(dice: dict[tuple[str, str], float]) -> list[dict[str, str]]:
        return [{"seed": seed, "case": case, "dice": str(value)} for (seed, case), value in dice.items()]

    full = rows({("0", "a"): 0.5, ("0", "b"): 0.9, ("1", "a"): 0.1, ("1", "b"): 0.1})
    scratch = rows({("0", "b"): 0.6, ("0", "a"): 0.4})
    assert _gain_of_cases(full, scratch, ["0"]) == pytest.approx([0.1, 0.3])


def test_the_interval_over_cases_covers_the_gain_and_narrows_with_more_of_them():
    gains = np.random.default_rng(3).normal(1.0, 2.0, 400)
    (low, high), (low_of_few, high_of_few) = _interval(gains), _interval(gains[:25])
    assert low < 1.0 < high
    assert high - low == pytest.approx(2 * 1.96 * 2.0 / 20, rel=0.2)  # of a normal distribution
    assert high_of_few - low_of_few > 2 * (high - low)
