"""Bad input to ``nnUNetv2_train ... -tr VFPretrainTrainer``: one line, exit status 1, and nothing left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import edit_json, pretrain
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_vf.training.preflight import patch_warning


def refused(folder: Path, *parts: str, **kwargs) -> None:
    with pytest.raises(SystemExit) as exit_info:
        pretrain(**kwargs)
    message = exit_info.value.code
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not folder.exists(), "something half-written was left"


def test_2d_is_refused(tiny, folder):
    refused(folder, "'2d'", "3d_fullres", configuration="2d")


def test_an_unknown_configuration_is_refused(tiny, folder):
    refused(folder, "'3d_fulres'", "3d_fullres", configuration="3d_fulres")


def test_a_wrong_setting_is_refused(tiny, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pairing", "triple")
    refused(folder, "nnUNet_vf_pairing", "'triple'", "same or different")


@pytest.mark.parametrize("how", ["unset", "empty"])
def test_missing_variables_are_named(tiny, folder, monkeypatch, how):
    monkeypatch.delenv("nnUNet_results") if how == "unset" else monkeypatch.setenv("nnUNet_results", "")
    refused(folder, "nnUNet_results is not set", "export nnUNet_results=")


def test_a_tiny_patch_is_refused(own_dataset, folder):
    def shrink(plans):
        plans["configurations"]["3d_fullres"]["patch_size"] = [7, 16, 24]

    edit_json(own_dataset / "nnUNetPlans.json", shrink)
    refused(folder, "(7, 16, 24)", "at least 8 voxels")


def test_a_cascade_is_refused(own_dataset, folder):
    def add_cascade(plans):
        plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}

    edit_json(own_dataset / "nnUNetPlans.json", add_cascade)
    refused(folder, "'3d_cascade_fullres'", "3d_fullres", configuration="3d_cascade_fullres")


def test_too_few_cases_are_refused(own_dataset, folder):
    for path in (own_dataset / "nnUNetPlans_3d_fullres").iterdir():
        if int(path.name.split("_")[1][:4]) >= 3:
            path.unlink()
    (own_dataset / "splits_final.json").unlink(missing_ok=True)
    refused(folder, "3 preprocessed cases", "fold 'all'")


def test_pairing_different_needs_two_cases_on_either_side(own_dataset, folder, monkeypatch):
    cases = [f"torso_{i:04d}" for i in range(3)]
    (own_dataset / "splits_final.json").write_text(json.dumps([{"train": cases[:2], "val": cases[2:]}]))
    monkeypatch.setenv("nnUNet_vf_pairing", "different")
    refused(folder, "2 training and 1 validation", "'different'")


def test_a_split_with_cases_that_are_not_there_is_refused(own_dataset, folder):
    (own_dataset / "splits_final.json").write_text(json.dumps([{"train": ["torso_0001"], "val": ["gone"]}]))
    refused(folder, "1 cases", "gone", "not preprocessed")


def test_unpreprocessed_data_are_refused(own_dataset, folder):
    for path in (own_dataset / "nnUNetPlans_3d_fullres").iterdir():
        path.unlink()
    refused(folder, "no preprocessed cases", "nnUNetv2_preprocess")


def test_strange_files_among_the_preprocessed_are_named(own_dataset, folder):
    (own_dataset / "nnUNetPlans_3d_fullres" / "notes.txt").touch()
    refused(folder, "no preprocessed cases", "nnUNetv2_preprocess -d 7 -plans_name nnUNetPlans -c 3d_fullres")


@pytest.mark.parametrize(("median", "warned"), [([35.0, 50, 35], True), ([35, 50, 64], False), (None, False)])
def test_a_patch_that_holds_whole_images_is_warned_of(own_dataset, median, warned):
    plan = json.loads((own_dataset / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    del plan["median_image_size_in_voxels"]
    plan |= {"patch_size": [40, 56, 40], **({"median_image_size_in_voxels": median} if median else {})}
    warning = patch_warning(ConfigurationManager(plan))
    assert ("(40x56x40) holds the median image (35x50x35) whole" in warning) if warned else warning is None


def test_the_log_of_a_pretraining_warns_of_such_a_patch(own_dataset, folder):
    def shrink(plans):
        plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"] = [16, 16, 24]

    edit_json(own_dataset / "nnUNetPlans.json", shrink)
    pretrain()
    (log,) = folder.rglob("training_log*")
    assert "WARNING: the patch (16x16x24) holds the median image" in log.read_text()
