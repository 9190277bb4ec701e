"""Bad input to ``nnUNetv2_train ... -tr VFPretrainTrainer``: one line, exit status 1, no files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import DATASET_ID, edit_json, pretrain
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager
from trainings import make_trainer

from nnunetv2_vf import nnunet_folders
from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import FinetuneSettings, VFSettings
from nnunetv2_vf.training.preflight import (
    blocks_warning,
    check_fold,
    check_patch,
    patch_warning,
    preprocessed_cases,
)


def assert_refused(folder: Path, *parts: str, **kwargs) -> None:
    with pytest.raises(SystemExit) as exit_info:
        pretrain(**kwargs)
    message = exit_info.value.code
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not folder.exists(), "files were left"


def test_2d_is_refused(two_epochs, folder):
    assert_refused(folder, "'2d'", "3d_fullres", configuration="2d")


def test_an_unknown_configuration_is_refused(two_epochs, folder):
    assert_refused(folder, "'3d_fulres'", "3d_fullres", configuration="3d_fulres")


def test_a_wrong_setting_is_refused(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pairing", "triple")
    assert_refused(folder, "nnUNet_vf_pairing", "'triple'", "same or different")


@pytest.mark.parametrize("state", ["unset", "empty"])
def test_missing_variables_are_named(two_epochs, folder, monkeypatch, state):
    monkeypatch.delenv("nnUNet_results") if state == "unset" else monkeypatch.setenv("nnUNet_results", "")
    assert_refused(folder, "nnUNet_results is not set", "export nnUNet_results=")


def test_a_tiny_patch_is_refused(copied_dataset, folder):
    def shrink(plans):
        plans["configurations"]["3d_fullres"]["patch_size"] = [7, 16, 24]

    edit_json(copied_dataset / "nnUNetPlans.json", shrink)
    assert_refused(folder, "(7, 16, 24)", "at least 8 voxels")


def test_a_cascade_is_refused(copied_dataset, folder):
    def add_cascade(plans):
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    edit_json(copied_dataset / "nnUNetPlans.json", add_cascade)
    assert_refused(folder, "'3d_cascade_fullres'", "3d_fullres", configuration="3d_cascade_fullres")


@pytest.mark.parametrize("trainer", ["VFPretrainTrainer", "VFFinetuneTrainer"])
def test_too_few_cases_are_refused(copied_dataset, tmp_path, trainer):
    for path in (copied_dataset / "nnUNetPlans_3d_fullres").iterdir():
        if int(path.name.split("_")[1][:4]) >= 3:
            path.unlink()
    (copied_dataset / "splits_final.json").unlink(missing_ok=True)
    with pytest.raises(
        SystemExit, match="the dataset has 3 preprocessed cases; 5 folds need at least 5; use fold 'all'"
    ):
        make_trainer(trainer)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("fold", [0, 4, 5])
def test_the_cases_of_a_fold_are_known_before_nnunet_makes_the_split(copied_dataset, two_epochs, fold):
    (copied_dataset / "splits_final.json").unlink(missing_ok=True)
    for file in (copied_dataset / "nnUNetPlans_3d_fullres").glob("torso_0009*"):
        file.unlink()  # of nine cases, nnU-Net puts two into the first four folds and one into the last
    trainer = make_trainer(fold=fold)
    trainer.initialize()
    cases = preprocessed_cases(trainer.plans_manager, "3d_fullres")
    assert len(cases) == 9
    expected = check_fold(trainer.plans_manager, cases, fold)
    assert not (copied_dataset / "splits_final.json").exists()
    split = trainer.do_split()
    if fold < 5:
        assert expected == split
    assert [len(part) for part in expected] == [len(part) for part in split]


def test_pairing_different_needs_two_training_and_two_validation_cases(copied_dataset, folder, monkeypatch):
    cases = [f"torso_{i:04d}" for i in range(3)]
    (copied_dataset / "splits_final.json").write_text(json.dumps([{"train": cases[:2], "val": cases[2:]}]))
    monkeypatch.setenv("nnUNet_vf_pairing", "different")
    assert_refused(folder, "2 training and 1 validation", "'different'")


def test_a_split_with_missing_cases_is_refused(copied_dataset, folder):
    (copied_dataset / "splits_final.json").write_text(json.dumps([{"train": ["torso_0001"], "val": ["gone"]}]))
    assert_refused(folder, "1 cases", "gone", "not preprocessed")


@pytest.mark.parametrize("content", ["{bad", "[1]", '[{"train": []}]'])
@pytest.mark.parametrize("trainer", ["VFPretrainTrainer", "VFFinetuneTrainer"])
def test_a_split_that_cannot_be_read_is_refused(copied_dataset, tmp_path, trainer, content):
    splits_file = copied_dataset / "splits_final.json"
    splits_file.write_text(content)
    with pytest.raises(SystemExit, match=rf"^nnUNetv2_vf: error: {splits_file} cannot be read: .*: rm {splits_file}$"):
        make_trainer(trainer)
    assert not (tmp_path / "results").exists()


def test_a_dataset_that_is_not_preprocessed_is_refused(copied_dataset, folder):
    for path in (copied_dataset / "nnUNetPlans_3d_fullres").iterdir():
        path.unlink()
    assert_refused(folder, "no preprocessed cases", "nnUNetv2_preprocess")


def test_foreign_files_among_the_preprocessed_cases_are_refused(copied_dataset, folder):
    (copied_dataset / "nnUNetPlans_3d_fullres" / "notes.txt").touch()
    assert_refused(
        folder,
        "files that are not preprocessed cases",
        "nnUNetv2_preprocess -d 7 -plans_name nnUNetPlans -c 3d_fullres",
    )


@pytest.mark.parametrize(("median", "is_reported"), [([35.0, 50, 35], True), ([35, 50, 64], False), (None, False)])
def test_a_patch_as_large_as_the_median_image_is_reported(copied_dataset, median, is_reported):
    plan = json.loads((copied_dataset / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    del plan["median_image_size_in_voxels"]
    plan |= {"patch_size": [40, 56, 40], **({"median_image_size_in_voxels": median} if median else {})}
    warning = patch_warning(ConfigurationManager(plan), VFSettings())
    assert ("(40x56x40) is as large as the median image (35x50x35)" in warning) if is_reported else warning is None


@pytest.mark.parametrize(
    ("patch", "values", "warning"),
    [
        ([24, 32, 24], {}, "patch [24, 32, 24] has only 8 blocks"),
        ([24, 32, 24], {"mask_side": 8}, None),
        ([40, 56, 40], {}, None),
        ([24, 32, 24], {"pretext": "fusion"}, None),
    ],
)
def test_a_patch_of_few_blocks_is_reported_with_a_better_side(copied_dataset, patch, values, warning):
    plan = json.loads((copied_dataset / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    message = blocks_warning(
        ConfigurationManager({**plan, "patch_size": patch}), VFSettings(**{"pretext": "masked", **values})
    )
    assert warning in message and message.endswith("nnUNet_vf_mask_side=8") if warning else message is None


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"mask_side": 4}, "mask_side = 4: without effect with pretext = fusion and fusion_map = boxes"),
        (
            {"pretext": "masked", "gamma": (1, 1), "block_side": (4, 8)},
            "gamma = 1.0,1.0, block_side = 4,8: .* = masked$",
        ),
        ({"pretext": "fusion+masked", "mask_side": 4, "box_count": (3, 5), "reconstruction_weight": 2}, None),
        ({"fusion_map": "blocks", "box_count": (3, 5)}, "box_count = 3,5: .* fusion_map = blocks$"),
    ],
)
def test_changed_settings_without_effect_are_reported(values, warning):
    message = VFSettings(**values).without_effect_warning()
    assert message is None if warning is None else re.search(f"WARNING: {warning}", message)


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"decoder_fraction": 0.5}, "WARNING: decoder_fraction = 0.5: without effect with schedule = full"),
        ({"decoder_fraction": 0.5, "schedule": "sawtooth"}, None),
        (
            {"fresh_decoder_stages": 1, "schedule": "encoder_only"},
            "WARNING: fresh_decoder_stages = 1: without effect with schedule = encoder_only",
        ),
        ({}, None),
    ],
)
def test_changed_settings_of_a_fine_tuning_without_effect_are_reported(values, warning):
    assert FinetuneSettings(**values).without_effect_warning() == warning


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"box_min_side": 200}, "box_min_side = 200 is not legal for the patch .*: each sample would have one class"),
        ({"fusion_map": "blocks", "block_side": (64, 100)}, "block_side = 64,100 is not legal"),
    ],
)
def test_boxes_and_blocks_that_always_cover_the_patch_are_refused(copied_dataset, values, message):
    plan = json.loads((copied_dataset / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    with pytest.raises(UserError, match=message):
        check_patch(ConfigurationManager(plan), VFSettings(**values))
    check_patch(ConfigurationManager(plan), VFSettings(**values, pretext="masked", mask_side=4))


def test_log_and_preview_warn_of_settings_without_effect(two_epochs, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_vf_mask_fraction", "0.6")
    main(["preview", "-d", str(DATASET_ID), "-o", str(tmp_path / "preview.png")])
    assert "WARNING: mask_fraction = 0.6: without effect" in capsys.readouterr().out
    pretrain()
    log = next(folder.glob("training_log*")).read_text()
    assert "WARNING: mask_fraction = 0.6: without effect" in log
    assert "\n  without effect: block_side, block_foreground, mask_side, mask_fraction, reconstruction_weight" in log


@pytest.mark.parametrize(
    ("values", "are_alike"), [({}, True), ({"pairing": "different"}, False), ({"pretext": "masked"}, False)]
)
def test_only_two_sub_volumes_of_one_case_can_be_alike(copied_dataset, values, are_alike):
    plan = json.loads((copied_dataset / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    plan |= {"median_image_size_in_voxels": plan["patch_size"]}
    assert ("nearly the same" in patch_warning(ConfigurationManager(plan), VFSettings(**values))) == are_alike


def test_the_training_log_warns_of_a_patch_as_large_as_the_median_image(copied_dataset, folder):
    def shrink(plans):
        plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [16, 16, 24]

    edit_json(copied_dataset / "nnUNetPlans.json", shrink)
    pretrain()
    (log,) = folder.rglob("training_log*")
    assert "WARNING: the patch (16x16x24) is as large as the median image" in log.read_text()


def split_first_cases(dataset: Path, number: int) -> None:
    """Write the split that nnU-Net made when the dataset had fewer cases."""
    cases = [f"torso_{i:04d}" for i in range(number)]
    folds = [{"train": [*cases[:i], *cases[i + 1 :]], "val": [cases[i]]} for i in range(number)]
    (dataset / "splits_final.json").write_text(json.dumps(folds))


def log_of_training(trainer: str, tmp_path: Path, fold: int | str) -> str:
    make_trainer(trainer, fold=fold).run_training()
    (log,) = (tmp_path / "results").rglob("training_log*")
    return log.read_text()


def test_the_log_of_pretraining_warns_of_cases_that_are_in_no_fold(copied_dataset, tmp_path):
    split_first_cases(copied_dataset, 4)
    log = log_of_training("VFPretrainTrainer", tmp_path, 0).partition("Epoch 0")[0]
    file = copied_dataset / "splits_final.json"
    assert (
        f"WARNING: 6 of 10 cases are in no fold of {file}, for example torso_0004: folds 0 to 3 leave them out" in log
    )
    assert "fold 'all'" in log
    assert f"rm {file}" in log


@pytest.mark.parametrize(
    ("trainer", "fold", "split_cases"),
    [
        ("VFPretrainTrainer", "all", 4),
        ("VFPretrainTrainer", 4, 4),  # not in the file: nnU-Net splits all cases
        ("VFPretrainTrainer", 0, 10),
        ("VFFinetuneTrainer", 0, 4),  # a user's split may leave out cases
    ],
)
def test_there_is_no_warning_if_no_case_is_left_out_or_labels_are_used(
    copied_dataset, tmp_path, monkeypatch, trainer, fold, split_cases
):
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train"])
    split_first_cases(copied_dataset, split_cases)
    assert "in no fold" not in log_of_training(trainer, tmp_path, fold)


def test_folds_that_another_training_is_writing_are_waited_for(copied_dataset, monkeypatch):
    file = copied_dataset / "splits_final.json"
    whole = json.dumps([{"train": ["torso_0000"], "val": ["torso_0001"]}])
    file.write_text(whole[:20])
    monkeypatch.setattr(nnunet_folders.time, "sleep", lambda _: file.write_text(whole))
    assert nnunet_folders.read_splits(copied_dataset.name) == json.loads(whole)
