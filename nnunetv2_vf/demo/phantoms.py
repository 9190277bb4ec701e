"""Procedural CT-like torso phantoms: seeded images in HU with organ labels, for the demo and the tests.

They are drawn, not measured: ellipsoids and cylinders in millimetres, jittered per patient, with texture and noise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention
from numpy.typing import ArrayLike

_BODY_MM = (240.0, 220.0, 320.0)  # depth (head to foot), front to back, left to right


class Phantom(NamedTuple):
    """A torso: image in HU (int16) and labels (uint8), axes (D, H, W); spacing in mm, in the same order."""

    image: np.ndarray
    labels: np.ndarray
    spacing: tuple[float, float, float]


class _Organ(NamedTuple):
    label: int
    hu: float  # mean of the organ
    contrast: float  # standard deviation of that mean between patients, in HU
    texture: float  # standard deviation within the organ, in HU
    ellipsoids: tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...]  # centre, semi-axes in mm


LABELS = {"background": 0, "lungs": 1, "heart": 2, "liver": 3, "kidneys": 4, "spine": 5}
_ORGANS = (
    _Organ(1, -820, 30, 90, (((-45, 0, -75), (80, 70, 48)), ((-45, 0, 75), (80, 70, 48)))),
    _Organ(2, 170, 30, 25, (((-25, -30, 15), (42, 38, 42)),)),
    _Organ(3, 110, 15, 30, (((55, -10, -60), (45, 65, 72)),)),
    _Organ(4, 240, 40, 40, (((80, 40, -58), (36, 20, 18)), ((72, 40, 58), (36, 20, 18)))),
    _Organ(5, 420, 60, 120, (((0, 75, 0), (400, 17, 19)),)),  # longer than the body: a column
)
_AIR, _FAT, _SOFT = -1000.0, -100.0, 40.0


def make_phantom(seed: int, spacing: float = 6.0) -> Phantom:
    """Draw the phantom of one patient.

    Args:
        seed: the patient; the same seed gives the same phantom.
        spacing: typical voxel size in mm; every patient's scan differs from it by up to a quarter, per axis
            (left to right as front to back).
    """
    rng = np.random.default_rng(seed)
    across, along = (spacing * rng.uniform(0.8, 1.25, size=2)).tolist()
    voxel = (along, across, across)
    build = rng.uniform(0.9, 1.1, size=3)  # of the patient
    axes = [_axis(*per_axis) for per_axis in zip(_BODY_MM, voxel, build, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)

    image = np.full(np.broadcast_shapes(*(g.shape for g in grid)), _AIR)
    labels = np.zeros(image.shape, dtype=np.uint8)
    fine, coarse = (_texture(rng, image.shape, voxel, width) for width in (6.0, 20.0))  # vessels, muscles
    body = _inside(grid, (0, 0, 0), (1e6, 100, 145))
    image[body] = _FAT + 20 * coarse[body]
    body = _inside(grid, (0, 0, 0), (1e6, 88, 132))
    image[body] = _SOFT + 25 * coarse[body]
    for organ in _ORGANS:
        hu = rng.normal(organ.hu, organ.contrast)
        for centre, semi_axes in organ.ellipsoids:
            inside = _inside(grid, rng.normal(centre, 5), rng.normal(1, 0.06, size=3) * semi_axes)
            image[inside] = hu + organ.texture * fine[inside]
            labels[inside] = organ.label
    image += rng.normal(0, rng.uniform(10, 35), size=image.shape)
    return Phantom(np.clip(image, -1024, 3071).astype(np.int16), labels, voxel)


def write_dataset(folder: Path, seeds: Sequence[int], spacing: float = 6.0) -> None:
    """Write phantoms, one a seed, as an nnU-Net raw dataset: ``imagesTr``, ``labelsTr``, ``dataset.json``."""
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


def _axis(length: float, step: float, build: float) -> np.ndarray:
    """Voxel centres in mm of a body of average build, 0 in the middle."""
    count = round(length / step)
    return (np.arange(count) - (count - 1) / 2) * step / build


def _texture(rng: np.random.Generator, shape: tuple[int, ...], voxel: Sequence[float], width: float) -> np.ndarray:
    """Smooth noise of mean 0 and standard deviation 1; ``width`` in mm is the Gaussian's sigma."""
    noise = sitk.GetImageFromArray(rng.normal(size=shape).astype(np.float32))
    noise.SetSpacing(voxel[::-1])
    smooth = sitk.GetArrayFromImage(sitk.SmoothingRecursiveGaussian(noise, width))
    return (smooth - smooth.mean()) / smooth.std()


def _inside(grid: Sequence[np.ndarray], centre: ArrayLike, axes: ArrayLike) -> np.ndarray:
    """Which voxels lie in an ellipsoid; centre and semi-axes in mm."""
    z, y, x = ((g - c) / a for g, c, a in zip(grid, np.asarray(centre), np.asarray(axes), strict=True))
    return z**2 + y**2 + x**2 <= 1


def _write(array: np.ndarray, spacing: Sequence[float], path: Path) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing[::-1])  # SimpleITK counts axes (x, y, z)
    sitk.WriteImage(image, str(path), useCompression=True)
