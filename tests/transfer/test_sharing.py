"""Sharing: plain nnU-Net predicts with a fine-tuned model; a model card lies beside each artifact."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from conftest import DATASET, DATASET_ID, PLANS_OF_NETWORKS
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.model_card import CARD_NAME, write_model_card

PREDICT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # as if it were not installed
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
predict_entry_point()
"""


def export_fine_tuned_model(plans: str, weights: Path, zip_file: Path, monkeypatch) -> None:
    """Fine-tune without nnU-Net's final validation, and export the model as nnUNetv2_export_model_to_zip does."""
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(weights)])
    run = (str(DATASET_ID), "3d_fullres", "all", "VFFinetuneTrainer", plans)
    trainer = get_trainer_from_args(*run, device=torch.device("cpu"))
    trainer.run_training()
    summary = Path(trainer.output_folder) / "validation" / "summary.json"  # the export copies it
    summary.parent.mkdir(exist_ok=True)
    summary.write_text("{}")
    export_pretrained_model(
        DATASET_ID, str(zip_file), ("3d_fullres",), "VFFinetuneTrainer", plans, folds=("all",), strict=True
    )


@pytest.mark.parametrize(
    ("network", "blocked"), [("U-Net", ["nnunetv2_vf"]), pytest.param("PCT-Net", [], marks=pytest.mark.slow)]
)
def test_plain_nnunet_installs_a_fine_tuned_model_and_predicts_with_it(
    network, blocked, two_epochs, copied_dataset, artifacts, tmp_path, monkeypatch
):
    """Predict without the trainers' variable and, for a U-Net, without this package."""
    plans = PLANS_OF_NETWORKS[network]
    zip_file, results = tmp_path / "model.zip", tmp_path / "elsewhere"
    export_fine_tuned_model(plans, artifacts[network], zip_file, monkeypatch)
    results.mkdir()
    monkeypatch.setenv("nnUNet_results", str(results))
    install_model_from_zip_file(str(zip_file))

    image = min((two_epochs / "raw" / DATASET / "imagesTr").iterdir())
    images, predicted = tmp_path / "images", tmp_path / "predicted"
    images.mkdir()
    shutil.copy(image, images)
    subprocess.run(
        [
            sys.executable, "-c", PREDICT.format(blocked=blocked), "-d", str(DATASET_ID), "-c", "3d_fullres",
            "-p", plans, "-tr", "VFFinetuneTrainer", "-f", "all", "-i", str(images), "-o", str(predicted),
            "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta",
        ],
        env={name: value for name, value in os.environ.items() if name != "nnUNet_extTrainer"},
        check=True,
    )  # fmt: skip
    segmentation = sitk.ReadImage(predicted / image.name.replace("_0000.nii.gz", ".nii.gz"))
    assert segmentation.GetSize() == sitk.ReadImage(image).GetSize()


def test_a_model_card_describes_each_artifact(artifacts):
    for network, artifact in artifacts.items():
        card = artifact.with_name(CARD_NAME).read_text()
        vf = read_artifact(artifact)["vf"]
        names = {"U-Net": "PlainConvUNet", "ResEnc-M": "ResidualEncoderUNet", "PCT-Net": "PCTNet", "FMUNet": "FMUNet"}
        name = names[network]
        assert card.startswith(f"# {name} pretrained with Volume Fusion on {DATASET}\n")
        assert f"| images | 10 cases of {DATASET}, fold all |" in card
        unused = {"block_side", "block_foreground", "mask_side", "mask_fraction", "reconstruction_weight"}
        for setting, value in vf["settings"].items():
            assert (f"| {setting} | {value} |" in card) == (setting not in unused)
        assert " | ".join(f"{dice:.3f}" for dice in vf["pretext_dice_per_class"]) in card
        assert "arXiv 2306.16925" in card
        assert "Licence of the weights: TO BE FILLED IN" in card
        linked = [part.partition(")")[0] for part in card.split("](")[1:]]
        assert linked
        assert all((artifact.parent / picture).is_file() for picture in linked)


def test_a_model_card_cites_the_papers_of_its_pretext_and_network(artifacts, tmp_path):
    papers = ("2306.16925", "2410.23132", "Isensee")  # Volume Fusion and its networks, masked autoencoding, nnU-Net
    for network, pretext, expected in (
        ("U-Net", "fusion", (True, False, True)),
        ("U-Net", "masked", (False, True, True)),
        ("PCT-Net", "masked", (True, True, True)),
    ):
        vf = read_artifact(artifacts[network])["vf"]
        write_model_card(tmp_path / CARD_NAME, {**vf, "settings": {**vf["settings"], "pretext": pretext}})
        card = (tmp_path / CARD_NAME).read_text()
        assert tuple(paper in card for paper in papers) == expected


def test_a_card_that_the_author_saved_in_another_encoding_is_rewritten(artifacts, tmp_path):
    vf = read_artifact(artifacts["U-Net"])["vf"]
    card = tmp_path / CARD_NAME
    write_model_card(card, vf)
    card.write_bytes(card.read_bytes().replace(b"TO BE FILLED IN", "Müller".encode("latin-1")))
    write_model_card(card, vf)
    assert card.read_bytes().count("Müller".encode("latin-1")) == 3


def test_a_rewritten_card_keeps_what_the_author_filled_in(artifacts, tmp_path):
    card, vf = tmp_path / CARD_NAME, read_artifact(artifacts["U-Net"])["vf"]
    write_model_card(card, vf)
    card.write_text(card.read_text().replace("weights: TO BE FILLED IN", "weights: CC BY 4.0"))
    write_model_card(card, {**vf, "num_cases": 11})
    text = card.read_text()
    assert "weights: CC BY 4.0" in text
    assert text.count("## Licence and data") == 1
    assert "| images | 11 cases" in text
    assert [path.name for path in Path(tmp_path).iterdir()] == [CARD_NAME]


def test_a_subclass_with_a_network_of_its_own_keeps_its_name_in_checkpoints(two_epochs, copied_dataset, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    run = (str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer")
    trainer = get_trainer_from_args(*run, device=torch.device("cpu"))

    class OwnTrainer(type(trainer)):
        @staticmethod
        def build_network_architecture(plans_manager, configuration_manager, channels, classes, deep_supervision=True):
            raise NotImplementedError

    trainer.initialize()
    trainer.__class__ = OwnTrainer
    path = Path(trainer.output_folder) / "checkpoint_best.pth"
    trainer.save_checkpoint(str(path))
    assert torch.load(path, weights_only=False)["trainer_name"] == "OwnTrainer"
    assert [file.name for file in path.parent.iterdir() if file.name.endswith(".part")] == []
