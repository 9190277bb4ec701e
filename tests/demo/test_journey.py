"""The whole method, with the commands that a user types."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import DATASET_ID, fold_folder

from nnunetv2_vf.cli import main
from nnunetv2_vf.demo.phantoms import make_phantom, write_dataset, write_images
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace

DATASET = "Dataset008_Journey"
SCHEDULE = {"num_epochs": 1, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1}


def run_stock_command(command: str, *arguments: object) -> str:
    """Run a command of nnU-Net on the dataset of the tests; return what it prints."""
    path = Path(sys.executable).parent / command
    done = subprocess.run([path, *map(str, arguments)], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_pretrain_finetune_predict_with_stock_commands(two_epochs, tmp_path):
    """The artifact is passed to -pretrained_weights unchanged."""
    train = ("nnUNetv2_train", DATASET_ID, "3d_fullres", 0, "-device", "cpu", "-tr")
    run_stock_command(*train, "VFPretrainTrainer")
    artifact = fold_folder(tmp_path / "results") / "vf_pretrained.pth"
    log = run_stock_command(*train, "VFFinetuneTrainer", "-pretrained_weights", artifact)
    assert f"Loading pretrained weights from file  {artifact}" in log
    write_images(tmp_path / "in", [50], spacing=12)
    run_stock_command(
        "nnUNetv2_predict", "-d", DATASET_ID, "-c", "3d_fullres", "-tr", "VFFinetuneTrainer", "-f", 0,
        "-device", "cpu", "-i", tmp_path / "in", "-o", tmp_path / "out", "-npp", 1, "-nps", 1, "--disable_tta",
    )  # fmt: skip
    segmentation = sitk.ReadImage(str(tmp_path / "out" / "torso_0050.nii.gz"))
    assert sitk.GetArrayFromImage(segmentation).shape == make_phantom(50, 12).image.shape


@pytest.mark.slow
def test_one_artifact_serves_two_targets_whose_models_are_exported(tmp_path):
    """Import, pretrain, plan --like, adapt, fine-tune, export, install elsewhere, predict."""
    workspace = Workspace(tmp_path, processes=1)
    write_images(tmp_path / "unlabelled", range(4), spacing=10)
    write_dataset(workspace.raw / DATASET, range(50, 53), spacing=14)
    two_channels(workspace.raw / DATASET, workspace.raw / "Dataset009_TwoChannels")
    workspace.run("nnUNetv2_vf", "import", "-d", 7, "-n", "Unlabelled", tmp_path / "unlabelled", "-np", 1)
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 7, "-c", "3d_fullres", "-np", 1, "-npfp", 1)
    narrow_network(workspace.preprocessed / "Dataset007_Unlabelled" / "nnUNetPlans.json", [4, 8, 16])
    pretraining = {f"nnUNet_vf_{name}": value for name, value in SCHEDULE.items()}
    workspace.run("nnUNetv2_train", 7, "3d_fullres", "all", "-tr", "VFPretrainTrainer", "-device", "cpu", **pretraining)
    artifact = workspace.fold_folder("Dataset007_Unlabelled", "VFPretrainTrainer", "all") / "vf_pretrained.pth"
    adapted = tmp_path / "adapted.pth"
    finetuning = {f"nnUNet_vf_finetune_{name}": value for name, value in SCHEDULE.items()}
    like = ("-p", "VFPlans", "-tr", "VFFinetuneTrainer")
    for target, weights in ((8, artifact), (9, adapted)):
        workspace.run("nnUNetv2_vf", "plan", "-d", target, "--like", artifact, "--normalization", "pretrained")
        workspace.run("nnUNetv2_preprocess", "-d", target, "-plans_name", "VFPlans", "-c", "3d_fullres", "-np", 1)
        if weights == adapted:
            refused = ("-device", "cpu", "-pretrained_weights", artifact)
            with pytest.raises(
                UserError, match=r"does not fit 3d_fullres of VFPlans .*input channels 1 in the file, 2 in the plans"
            ):
                workspace.run("nnUNetv2_train", target, "3d_fullres", "all", *like, *refused, **finetuning)
            workspace.run("nnUNetv2_vf", "adapt", artifact, "-d", target, "-p", "VFPlans", "-o", adapted)
        workspace.run("nnUNetv2_vf", "doctor", "-d", target, "-p", "VFPlans", "-w", weights)
        workspace.run(
            "nnUNetv2_train", target, "3d_fullres", "all", *like, "-device", "cpu", "-pretrained_weights", weights,
            **finetuning,
        )  # fmt: skip
        workspace.run(
            "nnUNetv2_export_model_to_zip", "-d", target, "-o", tmp_path / f"{target}.zip", "-c", "3d_fullres",
            "-f", "all", *like,
        )  # fmt: skip
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for target in (8, 9):
        plain = {"nnUNet_results": elsewhere, "nnUNet_extTrainer": ""}
        workspace.run("nnUNetv2_install_pretrained_model_from_zip", tmp_path / f"{target}.zip", **plain)
        images = next(workspace.raw.glob(f"Dataset{target:03d}_*")) / "imagesTr"
        workspace.run(
            "nnUNetv2_predict", "-d", target, "-c", "3d_fullres", *like, "-f", "all", "-device", "cpu", "-i", images,
            "-o", tmp_path / f"out{target}", "-npp", 1, "-nps", 1, "--disable_tta", **plain,
        )  # fmt: skip
        assert len(list((tmp_path / f"out{target}").glob("torso_*.nii.gz"))) == 3


def two_channels(original: Path, copy: Path) -> None:
    """Copy a dataset with every image as two channels."""
    shutil.copytree(original, copy)
    for path in list((copy / "imagesTr").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("_0000.nii.gz", "_0001.nii.gz")))
    description = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**description, "channel_names": {"0": "CT", "1": "CT"}}))


def test_a_user_error_in_a_stock_command_is_one_line_and_exit_status_1(two_epochs):
    environment = {**os.environ, "nnUNet_vf_num_epochs": "zero"}
    command = ["nnUNetv2_train", "7", "3d_fullres", "0", "-tr", "VFPretrainTrainer", "-device", "cpu"]
    command[0] = str(Path(sys.executable).parent / command[0])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        "nnUNetv2_vf: error: setting nnUNet_vf_num_epochs = 'zero' is not legal; legal: a whole number of at least 1"
    )


def test_a_failing_command_is_reported_with_its_last_line(tmp_path):
    workspace = Workspace(tmp_path, processes=1)
    with pytest.raises(UserError, match=r"nnUNetv2_vf failed with exit status 2: .*'nonsense'.*commands\.log"):
        workspace.run("nnUNetv2_vf", "nonsense")


def test_the_users_variables_do_not_reach_the_commands(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/the/users")
    monkeypatch.setenv("nnUNet_vf_num_epochs", "77")
    environment = Workspace(tmp_path, processes=1).environment
    assert environment["nnUNet_raw"] == str(tmp_path / "raw")
    assert "nnUNet_vf_num_epochs" not in environment


def test_the_demo_refuses_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "something").touch()
    with pytest.raises(SystemExit, match=re.escape(f"nnUNetv2_vf: error: {tmp_path} is not an empty folder")):
        main(["demo", "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


@pytest.mark.slow
def test_the_demo_ends_within_six_minutes_with_one_table(tmp_path):
    start = time.monotonic()
    command = [sys.executable, "-m", "nnunetv2_vf", "demo", "--out", str(tmp_path / "demo"), "-device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 360
    assert "pretext Dice" in done.stdout
    for picture in (line.strip() for line in done.stdout.splitlines() if line.strip().endswith(".png")):
        assert Path(picture).is_file()


def narrow_network(plans_file: Path, features: list[int]) -> None:
    """Reduce the number of features, for a CPU."""
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = features
    plans_file.write_text(json.dumps(plans))


@pytest.mark.slow
def test_pretraining_on_real_mr_volumes_rises_well_above_an_untrained_network(tmp_path, real_data):
    """The Hippocampus task of the Medical Segmentation Decathlon, below the folder NNUNETV2_VF_TEST_DATA."""
    workspace = Workspace(tmp_path, processes=2)
    (workspace.raw / "Dataset004_Hippocampus").symlink_to(real_data / "Dataset004_Hippocampus")
    workspace.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 2)
    narrow_network(workspace.preprocessed / "Dataset004_Hippocampus" / "nnUNetPlans.json", [8, 16, 32, 64])

    def pretext_dice(**settings: float) -> float:
        workspace.run(
            "nnUNetv2_train", 4, "3d_fullres", 0, "-tr", "VFPretrainTrainer", "-device", "cpu",
            **{f"nnUNet_vf_{name}": value for name, value in settings.items()},
        )  # fmt: skip
        report = workspace.fold_folder("Dataset004_Hippocampus", "VFPretrainTrainer", 0) / "pretext_report.json"
        return json.loads(report.read_text())["mean_dice"]

    common = {"val_iterations_per_epoch": 8, "num_epochs": 4}
    untrained = pretext_dice(iterations_per_epoch=1, initial_lr=1e-12, **common)
    assert pretext_dice(iterations_per_epoch=75, **common) > untrained + 0.1


@pytest.mark.slow
def test_pct_net_predicts_real_ct_at_three_resolutions(tmp_path, real_data):
    """The torso CT volumes below NNUNETV2_VF_TEST_DATA, at 3 mm in plane; one plan for each resolution mode."""
    workspace = Workspace(tmp_path, processes=1)
    dataset = workspace.raw / "Dataset009_Torso"
    volumes = sorted((real_data / "ct").glob("*.nii.gz"))
    for folder in ("imagesTr", "labelsTr"):
        (dataset / folder).mkdir(parents=True)
    for path in volumes:
        image = sitk.ReadImage(path)
        name = path.name.removesuffix(".nii.gz")
        sitk.WriteImage(image, dataset / "imagesTr" / f"{name}_0000.nii.gz")
        sitk.WriteImage(sitk.Cast(image > -500, sitk.sitkUInt8), dataset / "labelsTr" / f"{name}.nii.gz")  # HU
    description = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "body": 1}, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps({**description, "numTraining": len(volumes)}))
    schedule = {"num_epochs": 3, "iterations_per_epoch": 20, "val_iterations_per_epoch": 1}
    variables = {f"nnUNet_vf_finetune_{name}": value for name, value in schedule.items()}

    for mode, slice_mm in enumerate((3, 8, 13)):
        plans = f"PCTNetPlans{slice_mm}mm"
        workspace.run(
            "nnUNetv2_vf", "plan", "-d", 9, "-gpu_memory_target", 2.5, "-overwrite_plans_name", plans,
            "-overwrite_target_spacing", slice_mm, 3, 3,
        )  # fmt: skip
        assert f"resolution mode {mode}" in workspace.log.read_text().rpartition("$ ")[2]
        narrow_network(workspace.preprocessed / dataset.name / f"{plans}.json", [8, 16, 32, 64, 128])
        workspace.run("nnUNetv2_preprocess", "-d", 9, "-plans_name", plans, "-c", "3d_fullres", "-np", 1)
        common = ("-p", plans, "-tr", "VFFinetuneTrainer", "-device", "cpu")
        workspace.run("nnUNetv2_train", 9, "3d_fullres", "all", *common, **variables)
        workspace.run(
            "nnUNetv2_predict", "-d", 9, "-c", "3d_fullres", *common, "-f", "all", "-i", dataset / "imagesTr",
            "-o", tmp_path / plans, "-npp", 1, "-nps", 1, "--disable_tta",
        )  # fmt: skip
        for path in volumes:
            predicted, image = sitk.ReadImage(tmp_path / plans / path.name), sitk.ReadImage(path)
            assert predicted.GetSize() == image.GetSize()
            assert predicted.GetSpacing() == pytest.approx(image.GetSpacing())
        dice = workspace.evaluate(dataset / "labelsTr", tmp_path / plans)["mean"]
        print(f"mode {mode}: Dice of the body {dice:.3f}")
        assert dice > 0.85  # all voxels marked as body: 0.78
