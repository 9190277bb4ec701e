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
    for case in range(6):
        image = SimpleITK.GetImageFromArray(torch.randn(40, 40, 40).numpy())
        SimpleITK.WriteImage(image, images / f"case{case}_0000.nii.gz")
    architecture = read_artifact(artifacts["U-Net"])["vf"]["architecture"]
    configuration = {"architecture": architecture, "patch_size": [32, 32, 32], "batch_size": 2}
    (tmp_path / "plans.json").write_text(json.dumps({"configurations": {"3d_fullres": configuration}}))
    subprocess.run(
        [
            *(python, SCRIPT, images, tmp_path / "plans.json", "--pretext", pretext, "--folder", tmp_path / "nnssl"),
            *("--epochs", "1", "--iterations", "2"),
        ],
        check=True,
    )
    main(["convert", str(tmp_path / "nnssl" / "checkpoint_final.pth"), "-o", str(tmp_path / "out.pth")])
    metadata = read_artifact(tmp_path / "out.pth")["vf"]
    assert metadata["architecture"]["arch_kwargs"] == architecture["arch_kwargs"]
    assert (metadata["num_classes"], metadata["patch_size"]) == (classes, [32, 32, 32])
