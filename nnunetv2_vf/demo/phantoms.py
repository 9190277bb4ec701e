"""Procedural CT-like torso phantoms: seeded images in HU with organ labels, for the demo and the tests.

Organs are ellipsoids and the body is an elliptic cylinder, in mm; size and position vary between patients. Texture
and noise are added.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention
from numpy.typing import ArrayLike

_FIELD_OF_VIEW_MM = (240.0, 220.0, 320.0)  # head to foot, front to back, left to right


class Phantom(NamedTuple):
    """Image in HU (int16) and labels (uint8) of a torso, axes (D, H, W); spacing in mm, in the same order."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


class _Organ(NamedTuple):
    label: int
    mean_hu: float
    hu_std_between_patients: float
    hu_std_within_organ: float
    ellipsoids: tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...]  # centre and semi-axes, mm


LABELS = {"background": 0, "lungs": 1, "heart": 2, "liver": 3, "kidneys": 4, "spine": 5}
_ORGANS = (
    _Organ(1, -820, 30, 90, (((-45, 0, -75), (80, 70, 48)), ((-45, 0, 75), (80, 70, 48)))),
    _Organ(2, 170, 30, 25, (((-25, -30, 15), (42, 38, 42)),)),
    _Organ(3, 110, 15, 30, (((55, -10, -60), (45, 65, 72)),)),
    _Organ(4, 240, 40, 40, (((80, 40, -58), (36, 20, 18)), ((72, 40, 58), (36, 20, 18)))),
    _Organ(5, 420, 60, 120, (((0, 75, 0), (400, 17, 19)),)),  # longer than the image
)
_AIR, _FAT, _SOFT_TISSUE = -1000.0, -100.0, 40.0  # mean HU


def make_phantom(seed: int, spacing: float = 6.0) -> Phantom:
    """Generate the phantom of one patient.

    Args:
        seed: number of the patient; the same seed gives the same phantom.
        spacing: typical voxel size in mm. The voxel sizes along the slice axis and within the slices each differ
            from it by up to a quarter.
    """
    rng = np.random.default_rng(seed)
    within_slice, between_slices = (spacing * rng.uniform(0.8, 1.25, size=2)).tolist()
    voxel = (between_slices, within_slice, within_slice)
    body_scale = rng.uniform(0.9, 1.1, size=3)
    axes = [_voxel_centres(*per_axis) for per_axis in zip(_FIELD_OF_VIEW_MM, voxel, body_scale, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)

    image = np.full(np.broadcast_shapes(*(g.shape for g in grid)), _AIR)
    labels = np.zeros(image.shape, dtype=np.uint8)
    fine, coarse = (_texture(rng, image.shape, voxel, width) for width in (6.0, 20.0))
    body = _inside(grid, (0, 0, 0), (1e6, 100, 145))
    image[body] = _FAT + 20 * coarse[body]
    below_fat = _inside(grid, (0, 0, 0), (1e6, 88, 132))
    image[below_fat] = _SOFT_TISSUE + 25 * coarse[below_fat]
    for organ in _ORGANS:
        hu = rng.normal(organ.mean_hu, organ.hu_std_between_patients)
        for centre, semi_axes in organ.ellipsoids:
            inside = _inside(grid, rng.normal(centre, 5), rng.normal(1, 0.06, size=3) * semi_axes)
            image[inside] = hu + organ.hu_std_within_organ * fine[inside]
            labels[inside] = organ.label
    image += rng.normal(0, rng.uniform(10, 35), size=image.shape)
    return Phantom(np.clip(image, -1024, 3071).astype(np.int16), labels, voxel)


def write_dataset(folder: Path, seeds: Sequence[int], spacing: float = 6.0) -> None:
    """Write one phantom per seed as an nnU-Net raw dataset: ``imagesTr``, ``labelsTr``, ``dataset.json``."""
    write_images(folder / "imagesTr", seeds, spacing)
    write_labels(folder / "labelsTr", seeds, spacing)
    description = {
        "channel_names": {"0": "CT"},
        "labels": LABELS,
        "numTraining": len(seeds),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=2))


def write_images(folder: Path, seeds: Sequence[int], spacing: float = 6.0) -> None:
    """Write the images of phantoms as ``torso_SEED_0000.nii.gz``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        phantom = make_phantom(seed, spacing)
        _write(phantom.image, phantom.spacing, folder / f"torso_{seed:04d}_0000.nii.gz")


def write_labels(folder: Path, seeds: Sequence[int], spacing: float = 6.0) -> None:
    """Write the labels of phantoms as ``torso_SEED.nii.gz``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        phantom = make_phantom(seed, spacing)
        _write(phantom.labels, phantom.spacing, folder / f"torso_{seed:04d}.nii.gz")


def _voxel_centres(length: float, step: float, body_scale: float) -> np.ndarray:
    """Return the distances of the voxel centres from the middle of an axis, in mm, divided by the body's scale."""
    count = round(length / step)
    return (np.arange(count) - (count - 1) / 2) * step / body_scale


def _texture(rng: np.random.Generator, shape: tuple[int, ...], voxel: Sequence[float], width: float) -> np.ndarray:
    """Return smooth noise of mean 0 and standard deviation 1; ``width`` is the sigma of the Gaussian in mm."""
    noise = sitk.GetImageFromArray(rng.normal(size=shape).astype(np.float32))
    noise.SetSpacing(voxel[::-1])
    smooth = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(noise, width))
    return (smooth - smooth.mean()) / smooth.std()


def _inside(grid: Sequence[np.ndarray], centre: ArrayLike, axes: ArrayLike) -> np.ndarray:
    """Return a mask of the voxels in an ellipsoid; centre and semi-axes in mm."""
    z, y, x = ((g - c) / a for g, c, a in zip(grid, np.asarray(centre), np.asarray(axes), strict=True))
    return z**2 + y**2 + x**2 <= 1


def _write(array: np.ndarray, spacing: Sequence[float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])  # SimpleITK counts axes (x, y, z)
    sitk.WriteImage(image, str(path), useCompression=True)
