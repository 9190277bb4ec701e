"""Artifacts and plans that version 0.1.0 wrote are read by this version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunetv2_vf.cli import main
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.architectures import build_network
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.network_fit import require_fit
from nnunetv2_vf.transfer.target_plans import load_target

OLD = Path(__file__).parents[1] / "data" / "version_0_1_0"
DATASET = "Dataset007_Phantoms"
PLANS = {"unet": "nnUNetPlans", "pct_net": "PCTNetPlans", "adapted": "nnUNetPlans"}


def old_artifact(name: str) -> Path:
    return OLD / "artifacts" / f"{name}.pth"


@pytest.fixture(autouse=True)
def preprocessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set nnUNet_preprocessed to a folder with the old plans."""
    for variable in ("raw", "preprocessed", "results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(f"nnUNet_{variable}", str(tmp_path / variable))
    folder = tmp_path / "preprocessed" / DATASET
    shutil.copytree(OLD / "plans", folder)
    labels = {label: number for number, label in enumerate(("background", "lungs", "heart"))}
    dataset_json = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 10, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(dataset_json))


@pytest.mark.parametrize("name", PLANS)
def test_the_metadata_are_read(name):
    metadata = read_artifact(old_artifact(name))["vf"]
    assert metadata["versions"]["nnunetv2_vf"] == "0.1.0"
    assert (metadata["dataset"], metadata["num_cases"], metadata["fold"]) == (DATASET, 8, 0)
    assert metadata["plans"]["plans_name"] == PLANS[name]
    assert (metadata["channel_names"], metadata["normalization_schemes"]) == ({"0": "CT"}, ["CTNormalization"])
    assert metadata["settings"]["num_epochs"] == 3
    assert len(metadata["pretext_dice_per_class"]) == metadata["num_classes"] == 5


@pytest.mark.parametrize(
    ("name", "network"),
    [("unet", "PlainConvUNet"), ("pct_net", "PCTNet of resolution mode 0"), ("adapted", "PlainConvUNet")],
)
def test_info_describes_an_artifact(capsys, name, network):
    main(["info", str(old_artifact(name))])
    lines = capsys.readouterr().out.splitlines()
    assert "pretrained with Volume Fusion" in lines[0]
    assert lines[1].startswith(f"network: {network}, ")
    assert f"data: {DATASET}, 8 cases, 3d_fullres of {PLANS[name]}, fold 0" in lines
    assert any(line.startswith("pretext Dice by class: 0.") for line in lines)
    assert lines[-1].startswith("use: nnUNetv2_")


@pytest.mark.parametrize("name", PLANS)
def test_stock_pretrained_weights_loads_an_artifact_into_the_network_of_the_plans(name):
    file = old_artifact(name)
    target = load_target("7", PLANS[name], "3d_fullres")
    pretrained = read_artifact(file)
    require_fit(file, pretrained, target)
    network = build_network(target.architecture, target.input_channels, target.num_classes, device="cpu")
    load_pretrained_weights(network, str(file))
    for tensor_name, tensor in network.state_dict().items():
        if HEADS not in tensor_name:
            assert torch.equal(tensor, pretrained["network_weights"][tensor_name]), tensor_name


@pytest.mark.parametrize("name", PLANS)
def test_adapt_transfers_an_artifact_to_the_plans_of_pretraining(tmp_path, capsys, name):
    output = tmp_path / "adapted.pth"
    main(["adapt", str(old_artifact(name)), "-d", "7", "-p", PLANS[name], "-o", str(output)])
    assert "channels, normalisation, spacing, axis order: as in pretraining" in capsys.readouterr().out
    before, after = (read_artifact(file) for file in (old_artifact(name), output))
    assert after["vf"]["adapted"]["transferred_share"] == 1
    for tensor_name, tensor in before["network_weights"].items():
        assert torch.equal(after["network_weights"][tensor_name], tensor), tensor_name


def test_plans_that_plan_like_wrote_take_the_weights():
    target = load_target("7", "VFPlans", "3d_fullres")
    assert target.plans_manager.plans["volume_fusion_like"]["file"] == "vf_pretrained.pth"
    require_fit(old_artifact("unet"), read_artifact(old_artifact("unet")), target)
