"""Label maps are recognised by their voxels, and images are not mistaken for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from unlabelled_data import check_only_volume, ct, mr, write_volume

from nnunetv2_vf.demo.phantoms import make_phantom
from nnunetv2_vf.importing.label_maps import describe_label_map

PHANTOM = make_phantom(seed=0, spacing=4)


def thin_vessels() -> np.ndarray:
    volume = np.zeros((40, 40, 40), dtype=np.uint8)
    volume[:, 10, 10] = volume[20, :, 30] = volume[5, 5, :] = 1
    return volume


def atlas(labels: int) -> np.ndarray:
    """Return cubes of 5 voxels per side with different labels, as numerous as in an atlas of the brain."""
    cubes = 1 + np.random.default_rng(0).integers(labels, size=(8, 8, 8))
    return np.pad(np.kron(cubes, np.ones((5, 5, 5), dtype=int)), 10).astype(np.int16)


def tubes(width: int) -> np.ndarray:
    """Return 13 thin vessels with a label each."""
    volume = np.zeros((60, 60, 60), dtype=np.uint8)
    for label in range(1, 14):
        volume[:, 4 * label : 4 * label + width, 30 : 30 + width] = label
    return volume


def lesions() -> np.ndarray:
    """Return 30 small lesions with a label each."""
    volume = np.zeros((60, 60, 60), dtype=np.int16)
    for label, (z, y, x) in enumerate(np.random.default_rng(0).integers(0, 57, (30, 3)), start=1):
        volume[z : z + 3, y : y + 3, x : x + 3] = label
    return volume


def noiseless_phantom(num_values: int) -> np.ndarray:
    """Return a CT without noise, stored with an offset of 1024."""
    return 24 + (1000 // num_values) * (PHANTOM.labels.astype(np.uint16) % num_values)


@pytest.mark.parametrize(
    "volume",
    [
        tubes(2),
        tubes(3),
        lesions(),
        PHANTOM.labels.astype(np.int8) - (PHANTOM.labels == 5) * np.int8(6),  # -1 marks voxels to ignore
        PHANTOM.labels + 1,
        PHANTOM.labels,
        PHANTOM.labels.astype(np.float32),
        (PHANTOM.labels == 4) * np.uint8(255),
        thin_vessels(),
        atlas(120),
        atlas(400) * 30,  # FreeSurfer's labels reach 14,175
    ],
)
def test_label_maps_are_recognised(volume):
    assert describe_label_map(volume).startswith("looks like a segmentation: ")


def eight_bits(volume: np.ndarray, levels: int = 256) -> np.ndarray:
    low, high = np.percentile(volume, (0.5, 99.5))
    return (np.clip((volume - low) / (high - low), 0, 1) * (levels - 1)).astype(np.uint8)


@pytest.mark.parametrize(
    "volume",
    [
        PHANTOM.image,
        PHANTOM.image.astype(np.float32) / 7,
        np.where(PHANTOM.image < -200, -1000, PHANTOM.image),  # thresholds
        np.where(PHANTOM.image < 100, 0, PHANTOM.image),
        np.clip(PHANTOM.image, -160, 240) + 160,  # a window
        eight_bits(PHANTOM.image),
        eight_bits(PHANTOM.image, 64),
        eight_bits(mr(0)),
        np.where(ct(0) > -500, 40, -1000).astype(np.int16),  # a phantom without noise, in HU
        noiseless_phantom(2),
        noiseless_phantom(6),
        eight_bits(PHANTOM.image).repeat(3, 0).repeat(3, 1).repeat(3, 2),  # enlarged without interpolation
        (np.clip(PHANTOM.image, -100, 0) * 2.55 + 255).astype(np.uint8),  # a narrow window
    ],
)
def test_images_are_not_mistaken_for_label_maps(volume):
    assert describe_label_map(volume) == ""


def test_a_label_map_is_rejected_or_kept_with_a_note(tmp_path):
    path = write_volume(tmp_path / "OTMultiClass.nii.gz", PHANTOM.labels)
    assert check_only_volume(path).startswith("labels: looks like a segmentation: 6 different values, all whole; 99%")
    assert check_only_volume(path, keep=("labels",)).startswith("labels: looks like")


@pytest.mark.parametrize(
    ("folder", "is_label"),
    [
        ("Dataset101_LeftAtrium/imagesTr", False),
        ("Dataset101_LeftAtrium/labelsTr", True),
        ("Dataset004_Hippocampus/imagesTr", False),
        ("Dataset004_Hippocampus/labelsTr", True),
        ("ct", False),
    ],
)
def test_real_volumes(real_data: Path, folder, is_label):
    paths = sorted((real_data / folder).glob("*.nii.gz"))
    if not paths:
        pytest.skip(f"NNUNETV2_VF_TEST_DATA has no {folder}")
    for path in paths:
        volume = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert bool(describe_label_map(volume)) == is_label, path
