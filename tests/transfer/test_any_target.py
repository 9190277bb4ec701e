"""One artifact of each network is fine-tuned on targets with other channels, spacings and sizes."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import torch
from conftest import edit_json
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunetv2_vf.cli import main
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.target_plans import TargetPlans, load_target
from nnunetv2_vf.transfer.tensor_rules import fit_channels

CPU = torch.device("cpu")
SHAPES = {  # by spacing (mm, slices first): a volume that is smaller than any patch, and a larger one
    (1.0, 1.0, 1.0): {"tiny": (11, 14, 12), "large": (40, 56, 48)},
    (5.0, 1.0, 1.0): {"tiny": (5, 20, 22), "large": (20, 64, 56)},
}
TARGETS = [
    (channels, spacing, shape)
    for channels, spacing in itertools.product((1, 4), SHAPES)
    for shape in SHAPES[spacing].values()
]


def write_target(raw: Path, dataset_id: int, channels: int, spacing, shape) -> None:
    """Write two cases of noise with a brighter block, which is label 1."""
    folder = raw / f"Dataset{dataset_id:03d}_Target"
    rng = np.random.default_rng(dataset_id)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for case in range(2):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[tuple(slice(side // 4, side // 2 + 1) for side in shape)] = 1
        for channel in range(channels):
            image = rng.normal(size=shape).astype(np.float32) + 2 * labels
            write(image, spacing, folder / "imagesTr" / f"case{case}_{channel:04d}.nii.gz")
        write(labels, spacing, folder / "labelsTr" / f"case{case}.nii.gz")
    description = {
        "channel_names": {str(c): f"MR{c}" for c in range(channels)},
        "labels": {"background": 0, "block": 1},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def write_fingerprint(folder: Path, channels: int, spacing, shape) -> None:
    """Write a fingerprint without intensities, which MR does not use and which take nnU-Net half a minute."""
    folder.mkdir()
    found = {
        "spacings": [spacing] * 2,
        "shapes_after_crop": [shape] * 2,
        "foreground_intensity_properties_per_channel": {str(c): {} for c in range(channels)},
        "median_relative_size_after_cropping": 1.0,
    }
    (folder / "dataset_fingerprint.json").write_text(json.dumps(found))


def preprocess(raw: Path, target: TargetPlans, folder: Path) -> None:
    """Preprocess every case as nnU-Net does, but without a pool of processes."""
    out = folder / target.configuration.data_identifier
    out.mkdir()
    for labels in (raw / "labelsTr").iterdir():
        case = labels.name.removesuffix(".nii.gz")
        images = [str(path) for path in sorted((raw / "imagesTr").glob(f"{case}_*"))]
        DefaultPreprocessor(verbose=False).run_case_save(
            str(out / case), images, str(labels), target.plans_manager, target.configuration, target.dataset_json
        )


def write(array: np.ndarray, spacing, path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])
    sitk.WriteImage(image, path)


ALWAYS_RUN = (1, 6)  # these have each number of channels, spacing and size once


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(
            index,
            id=f"{channels}ch-{spacing[0]:g}mm-{max(shape)}",
            marks=[] if index in ALWAYS_RUN else pytest.mark.slow,
        )
        for index, (channels, spacing, shape) in enumerate(TARGETS)
    ],
)
def test_an_artifact_is_transferred_to_the_target_and_trained(
    index, two_epochs, artifacts, tmp_path, monkeypatch, capsys
):
    channels, spacing, shape = TARGETS[index]
    dataset_id = 50 + index
    folder = two_epochs / "preprocessed" / f"Dataset{dataset_id:03d}_Target"
    write_target(two_epochs / "raw", dataset_id, channels, spacing, shape)
    write_fingerprint(folder, channels, spacing, shape)
    for network, artifact in artifacts.items():
        plans = f"Like{network}"
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # planning divides by it
        main(["plan", "-d", str(dataset_id), "--like", str(artifact), "-overwrite_plans_name", plans])
        if network == "U-Net":
            preprocess(two_epochs / "raw" / folder.name, load_target(str(dataset_id), plans, "3d_fullres"), folder)
        else:  # with equal spacing and normalisation, the preprocessed data are the same

            def share_data(content: dict) -> None:
                content["configurations"]["3d_fullres"]["data_identifier"] = "LikeU-Net_3d_fullres"

            edit_json(folder / f"{plans}.json", share_data)
        weights = artifact
        share = 1.0
        if channels != 1:
            weights = tmp_path / f"{network}.pth"
            main(["adapt", str(artifact), "-d", str(dataset_id), "-p", plans, "-o", str(weights)])
            share = read_artifact(weights)["vf"]["adapted"]["transferred_share"]
            assert share == 1
            assert_transferred(artifact, weights, channels)
        take_first_step(weights, dataset_id, plans, monkeypatch)
        with capsys.disabled():
            print(f"\n{network}, {channels} channels, {spacing} mm, {shape} voxels: {share:.1%} transferred", end="")


def assert_transferred(artifact: Path, adapted: Path, channels: int) -> None:
    """Assert that all tensors are the pretrained ones, with the first convolution repeated for each channel."""
    before, after = (read_artifact(path)["network_weights"] for path in (artifact, adapted))
    inputs = {name for name in before if HEADS not in name and before[name].shape != after[name].shape}
    assert inputs
    for name in before:
        expected = fit_channels(before[name], channels) if name in inputs else before[name]
        assert HEADS in name or torch.equal(after[name], expected)


def take_first_step(weights: Path, dataset_id: int, plans: str, monkeypatch) -> None:
    """Run nnUNetv2_train with -pretrained_weights up to the end of the first step."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(weights)])
    trainer = get_trainer_from_args(str(dataset_id), "3d_fullres", "all", "VFFinetuneTrainer", plans, device=CPU)
    maybe_load_checkpoint(trainer, False, False, str(weights))
    expected = read_artifact(weights)["network_weights"]
    state = trainer.network.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in state if HEADS not in name)
    trainer.on_train_start()
    loss = trainer.train_step(next(trainer.dataloader_train))["loss"]
    trainer.on_train_end()
    assert np.isfinite(loss)
