"""Models for others: predicted with by plain nnU-Net, and a card beside the artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from conftest import DATASET, DATASET_ID
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.run.run_training import run_training

from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.model_card import CARD_NAME, write_model_card

PREDICT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # as if it were not installed
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""


@pytest.mark.parametrize(("network", "blocked"), [("U-Net", ["nnunetv2_vf"]), ("PCT-Net", [])])
def test_a_fine_tuned_model_goes_round_and_predicts_with_plain_nnunet(
    network, blocked, tiny, own_dataset, artifacts, tmp_path, monkeypatch
):
    """Export, install elsewhere, predict: without our trainers' variable and, for a U-Net, without this package."""
    plans = {"U-Net": "nnUNetPlans", "PCT-Net": "PCTNetPlans"}[network]
    weights = str(artifacts[network])
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", weights])
    run = (str(DATASET_ID), "3d_fullres", "all", "VFFinetuneTrainer", plans, weights)
    run_training(*run, device=torch.device("cpu"))
    model = tmp_path / "model.zip"
    export_pretrained_model(
        DATASET_ID, str(model), ("3d_fullres",), "VFFinetuneTrainer", plans, folds=("all",), strict=True
    )
    results = tmp_path / "elsewhere"
    results.mkdir()
    monkeypatch.setenv("nnUNet_results", str(results))
    install_model_from_zip_file(str(model))

    image = sorted((tiny / "raw" / DATASET / "imagesTr").iterdir())[0]
    images, predicted = tmp_path / "images", tmp_path / "predicted"
    images.mkdir()
    shutil.copy(image, images)
    subprocess.run(
        [
            sys.executable, "-c", PREDICT.format(blocked=blocked), "-d", str(DATASET_ID), "-c", "3d_fullres",
            "-p", plans, "-tr", "VFFinetuneTrainer", "-f", "all", "-i", str(images), "-o", str(predicted),
            "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta",
        ],
        env={name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"},
        check=True,
    )  # fmt: skip
    segmentation = sitk.ReadImage(predicted / image.name.replace("_0000.nii.gz", ".nii.gz"))
    assert segmentation.GetSize() == sitk.ReadImage(image).GetSize()


def test_a_card_lies_beside_the_artifact(artifacts):
    for network, artifact in artifacts.items():
        card = artifact.with_name(CARD_NAME).read_text()
        vf = read_artifact(artifact)["vf"]
        name = {"U-Net": "PlainConvUNet", "ResEnc-M": "ResidualEncoderUNet", "PCT-Net": "PCTNet"}[network]
        assert card.startswith(f"# vf_pretrained.pth: {name} pretrained with Volume Fusion on {DATASET}\n")
        assert f"| images | 10 cases of {DATASET}, fold all |" in card
        assert all(f"| {setting} | {value} |" in card for setting, value in vf["settings"].items())
        assert " | ".join(f"{dice:.3f}" for dice in vf["pretext_dice_per_class"]) in card
        assert "arXiv 2306.16925" in card
        assert "Licence of the weights: TO BE FILLED IN" in card
        linked = [part.partition(")")[0] for part in card.split("](")[1:]]
        assert linked
        assert all((artifact.parent / picture).is_file() for picture in linked)


def test_what_the_author_filled_in_stays(artifacts, tmp_path):
    card, vf = tmp_path / CARD_NAME, read_artifact(artifacts["U-Net"])["vf"]
    write_model_card(card, vf)
    card.write_text(card.read_text().replace("weights: TO BE FILLED IN", "weights: CC BY 4.0"))
    write_model_card(card, {**vf, "num_cases": 11})
    text = card.read_text()
    assert "weights: CC BY 4.0" in text
    assert text.count("## Licence and data") == 1
    assert "| images | 11 cases" in text
    assert [path.name for path in Path(tmp_path).iterdir()] == [CARD_NAME]
