"""(slow) Weights that nnssl pretrains become our weights."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import label_efficiency
import pytest
import SimpleITK
import torch

from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.artifact import read_artifact

SCRIPT = Path(label_efficiency.__file__).with_name("nnssl_pretraining.py")


@pytest.mark.slow
@pytest.mark.parametrize(("pretext", "classes"), [("masked", 1), ("fusion", 5)])
def test_nnssl_pretrains_the_network_of_plans(tmp_path, artifacts, pretext, classes):
    python = os.environ.get("NNUNETV2_VF_NNSSL")
    if not python:
        pytest.skip("NNUNETV2_VF_NNSSL is not set to the Python of an environment with nnssl")
    images = tmp_path / "images"
    images.mkdir()
    for case in range(3):
        image = SimpleITK.GetImageFromArray(torch.randn(40, 40, 40).numpy())
        SimpleITK.WriteImage(image, images / f"case{case}_0000.nii.gz")
    architecture = read_artifact(artifacts["U-Net"])["vf"]["architecture"]
    configuration = {
        "architecture": architecture,
        "patch_size": [32, 32, 32],
        "batch_size": 2,
        "spacing": [0.8, 1.0, 1.25],
        "normalization_schemes": ["ZScoreNormalization"],
    }
    (tmp_path / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": configuration}}))
    weights = []
    for run in ("first", "second"):
        folder, budget = tmp_path / run, ("--epochs", "1", "--iterations", "2", "--mask-side", "8")
        command = [python, SCRIPT, images, tmp_path / "plans.json", "--pretext", pretext, "--folder", folder, *budget]
        subprocess.run(command, check=True)
        split = json.loads((folder / "preprocessed" / "Dataset001_Images" / "splits_final.json").read_text())
        assert len(split["train"]) == 3
        plan = json.loads((folder / "preprocessed" / "Dataset001_Images" / "nnsslPlans.json").read_text())
        assert plan["configurations"]["median"]["spacing"] == [0.8, 1.0, 1.25], "that of the plans"
        main(["convert", str(folder / "checkpoint_final.pth"), "-o", str(folder / "out.pth")])
        artifact = read_artifact(folder / "out.pth")
        weights.append(artifact["network_weights"])
        metadata = artifact["vf"]
        assert metadata["architecture"]["arch_kwargs"] == architecture["arch_kwargs"]
        assert (metadata["num_classes"], metadata["patch_size"]) == (classes, [32, 32, 32])
        assert metadata["spacing"] == [0.8, 1.0, 1.25]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]), "the seed decides"
