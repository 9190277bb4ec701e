from __future__ import annotations

import json

import pytest
import torch
from conftest import DATASET, edit_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_vf import doctor
from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.safetensors_files import write_safetensors


def examined(capsys, *arguments: str) -> tuple[int, list[str]]:
    """Return exit code and output lines; check that each line starts with a state."""
    capsys.readouterr()
    try:
        main(["doctor", *arguments])
        code = 0
    except SystemExit as error:
        code = int(error.code)
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith(("ok   ", "note ", "FAIL ")) for line in lines)
    assert code == any(line.startswith("FAIL") for line in lines)
    return code, lines


@pytest.fixture
def healthy(two_epochs, copied_dataset, tmp_path):
    (tmp_path / "results").mkdir()
    return copied_dataset


def test_a_healthy_installation_has_only_ok_lines(healthy, artifacts, capsys):
    code, lines = examined(capsys, "-d", "7", "-w", str(artifacts["U-Net"]))
    text = "\n".join(lines)
    assert code == 0
    assert "ok   nnunetv2 2.8" in text
    assert "ok   nnU-Net finds VFPretrainTrainer" in text
    assert "ok   nnU-Net finds VFFinetuneTrainer" in text
    assert f"ok   3d_fullres of nnUNetPlans of {DATASET}: PlainConvUNet, patch 16 x 16 x 24, batch 2" in text
    assert "ok   10 of 10 cases preprocessed" in text
    assert f"ok   {artifacts['U-Net']} fits 3d_fullres of nnUNetPlans" in text


def test_differences_to_pretraining_are_notes(healthy, artifacts, capsys):
    edit_json(healthy / "dataset.json", lambda description: description.update(channel_names={"0": "T1"}))
    code, lines = examined(capsys, "-d", "7", "-w", str(artifacts["U-Net"]))
    assert code == 0
    assert any(line.startswith("note channels: CT in pretraining, T1 here") for line in lines)


def test_more_processes_than_cores_are_a_note(healthy, capsys, monkeypatch):
    monkeypatch.setattr("nnunetv2_vf.doctor.default_num_processes", 8)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    _, lines = examined(capsys)
    assert any(line.startswith("note nnU-Net starts 8 processes") and "nnUNet_def_n_proc=2" in line for line in lines)


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"])
def test_missing_variables_and_folders_are_failures(healthy, capsys, monkeypatch, variable):
    monkeypatch.setenv(variable, "/no such/folder")
    code, lines = examined(capsys)
    assert code == 1
    assert f"FAIL {variable} = /no such/folder, which does not exist; make it: mkdir -p '/no such/folder'" in lines
    monkeypatch.delenv(variable)
    code, lines = examined(capsys)
    assert code == 1
    assert f"FAIL {variable} is not set; set it: export {variable}=/path/to/{variable}" in lines


def test_settings_that_do_not_suit_the_patch_are_found(healthy, artifacts, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    _, lines = examined(capsys, "-d", "7")
    assert any("FAIL setting mask_side = 16 is not legal for the patch [16, 16, 24]" in line for line in lines)
    monkeypatch.setenv("nnUNet_vf_mask_side", "8")
    code, lines = examined(capsys, "-d", "7")
    assert code == 0
    assert any("note for a pretraining with these plans: with mask_side = 8, the patch" in line for line in lines)
    _, lines = examined(capsys, "-d", "7", "-w", str(artifacts["U-Net"]))
    assert not any("mask_side =" in line for line in lines), "weights are for fine-tuning"


def test_trainers_that_nnunet_does_not_find_are_failures(healthy, capsys, monkeypatch):
    monkeypatch.delenv("nnUNet_extTrainer")
    code, lines = examined(capsys)
    assert code == 1
    assert any('nnUNet_extTrainer is not set); in every shell: eval "$(nnUNetv2_vf env)"' in line for line in lines)


def test_an_illegal_setting_is_a_failure(healthy, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_num_epochs", "many")
    code, lines = examined(capsys)
    assert code == 1
    assert any(line.startswith("FAIL setting nnUNet_vf_num_epochs = 'many'") for line in lines)


@pytest.mark.parametrize("section", ["volume_fusion", "volume_fusion_finetune"])
def test_settings_in_the_plans_are_checked(healthy, capsys, section):
    edit_json(healthy / "nnUNetPlans.json", lambda plans: plans.update({section: {"num_epochs": 5}}))
    code, lines = examined(capsys, "-d", "7")
    assert code == 0
    assert f"ok   settings in the plans: {section}: num_epochs" in lines
    edit_json(healthy / "nnUNetPlans.json", lambda plans: plans.update({section: {"epochs": 5}}))
    code, lines = examined(capsys, "-d", "7")
    assert code == 1
    assert any(line.startswith("FAIL ") and "'epochs'" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-d", "99"], "no dataset 99"),
        (["-d", "DatasetLiver"], "'DatasetLiver' is not a dataset; legal: an id such as 7, or a full name"),
        (["-d", "7", "-p", "NoPlans"], "no plans"),
        (["-d", "7", "-c", "2d"], "configuration '2d' of .*; legal: 3d_fullres"),
        (["-w", "/nowhere.pth"], "no file /nowhere.pth"),
    ],
)
def test_missing_datasets_plans_and_files_are_failures(healthy, capsys, arguments, message):
    code, lines = examined(capsys, *arguments)
    assert code == 1
    assert any(message.split(".*")[0] in line and line.startswith("FAIL") for line in lines)


def test_weights_that_do_not_fit_are_a_failure(healthy, artifacts, capsys):
    code, lines = examined(capsys, "-d", "7", "-w", str(artifacts["PCT-Net"]))
    assert code == 1
    (line,) = [line for line in lines if line.startswith("FAIL")]
    assert "does not fit" in line
    assert "nnUNetv2_vf plan -d 7 --like" in line


def test_cases_preprocessed_with_other_plans_are_a_failure(healthy, artifacts, capsys):
    def replan(plans):
        plans["configurations"]["3d_fullres"]["spacing"] = [4.0, 4.0, 4.0]

    edit_json(healthy / "nnUNetPlans.json", replan)
    code, lines = examined(capsys, "-d", "7", "-w", str(artifacts["U-Net"]))
    assert code == 1
    assert any(line.startswith("FAIL") and "preprocess again: nnUNetv2_preprocess -d 7" in line for line in lines)


def test_weights_without_a_dataset_are_only_read(healthy, artifacts, capsys):
    code, lines = examined(capsys, "-w", str(artifacts["PCT-Net"]))
    assert code == 0
    assert lines[-1] == "note no plans to compare the weights with; name them: -d ID -p PLANS"


def test_weights_that_nnunet_does_not_read_are_a_note(healthy, artifacts, tmp_path, capsys):
    pytest.importorskip("safetensors")
    file = tmp_path / "model.safetensors"
    write_safetensors(file, read_artifact(artifacts["U-Net"]))
    _, lines = examined(capsys, "-d", "7", "-w", str(file))
    command = f"nnUNetv2_vf convert {file} -o model.pth"
    assert f"note nnU-Net reads no safetensors; convert the file first: {command}" in lines


def test_missing_preprocessed_cases_are_a_note(healthy, capsys):
    edit_json(healthy / "dataset.json", lambda description: description.update(numTraining=12))
    _, lines = examined(capsys, "-d", "7")
    assert (
        "note 10 of 12 cases preprocessed; preprocess again: nnUNetv2_preprocess -d 7 -plans_name nnUNetPlans"
        in (lines[-1])
    )


def test_cases_in_no_fold_are_a_note(healthy, capsys):
    splits_file = healthy / "splits_final.json"
    folds = [{"train": ["torso_0000", "torso_0001"], "val": ["torso_0002"]}]
    splits_file.write_text(json.dumps(folds))
    code, lines = examined(capsys, "-d", "7")
    assert code == 0
    assert "ok   10 of 10 cases preprocessed" in lines
    assert lines[-1].startswith(f"note 7 of 10 cases are in no fold of {splits_file}, for example torso_0003: fold 0 ")
    assert f"rm {splits_file}" in lines[-1]
    folds[0]["train"] += [f"torso_{number:04d}" for number in range(3, 10)]
    splits_file.write_text(json.dumps(folds))
    assert not any("in no fold" in line for line in examined(capsys, "-d", "7")[1])


def test_a_split_that_cannot_be_read_is_a_failure(healthy, capsys):
    (healthy / "splits_final.json").write_text("{bad")
    code, lines = examined(capsys, "-d", "7")
    assert code == 1
    assert any(line.startswith("FAIL") and "splits_final.json cannot be read" in line for line in lines)


def test_weights_of_a_two_dimensional_network_are_refused(healthy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train"])
    preprocess([7], "nnUNetPlans", configurations=["2d"], num_processes=[1])
    trainer = get_trainer_from_args("7", "2d", 0, "nnUNetTrainer", device=torch.device("cpu"))
    trainer.initialize()
    path = tmp_path / "flat.pth"
    trainer.save_checkpoint(str(path))
    code, lines = examined(capsys, "-d", "7", "-w", str(path))
    assert code == 1
    assert any(line.startswith("FAIL") and "does not fit" in line for line in lines)
    for command in (["plan", "--like", str(path)], ["adapt", str(path), "-o", str(tmp_path / "out.pth")]):
        with pytest.raises(SystemExit, match=r"Conv2d; legal: 3D networks"):
            main([*command, "-d", "7"])
    main(["info", str(path)])
    out = capsys.readouterr().out
    assert "1 input channels, 6 output channels" in out
    assert "nnUNetv2_vf plan" not in out


def test_a_dataset_without_numtraining_is_accepted(healthy, capsys):
    edit_json(healthy / "dataset.json", lambda description: description.pop("numTraining") and None)
    code, lines = examined(capsys, "-d", "7")
    assert code == 0
    assert "ok   10 of 10 cases preprocessed" in lines


def test_an_unsupported_version_is_a_failure(healthy, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda package: {"nnunetv2": "2.5", "torch": "2.9.1"}[package])
    code, lines = examined(capsys)
    assert code == 1
    start = "FAIL nnunetv2 2.5 is not supported; install a supported version: pip install 'nnunetv2"
    assert any(line.startswith(start) for line in lines)
