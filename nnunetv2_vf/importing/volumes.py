"""A volume of unlabelled data: check that it is fit for training, and repair what can be repaired.

Axes are (slices, rows, columns); spacings are in mm, in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.errors import printable
from nnunetv2_vf.importing.body_mask import is_hu_like
from nnunetv2_vf.importing.images import image_on_grid
from nnunetv2_vf.importing.label_maps import describe_label_map
from nnunetv2_vf.importing.settings import Selection

# Largest error of a direction cosine that counts as rounding. Headers written with two digits stay below it; a scanner
# tilted by 1 degree is 0.017 off.
MAX_ROUNDING_OF_COSINES = 5e-3
# A file with all spacings below this is in metres. Optical coherence tomography has 0.002 mm, but on one axis only.
_METRES = 0.01
_CAST_TO_FLOAT32 = (sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkUInt32)


class RejectedError(Exception):
    """A volume is not fit for training. The message is the reason for the report: ``KIND: what is wrong``."""


@dataclass
class Volume:
    """One volume of a source: its images, or the reason why they cannot be used.

    Attributes:
        case: name of the case in the dataset.
        item: which volume of the source this is; empty if the source has only one.
        images: one per channel, all on the same grid; empty if the volume is rejected.
        rejection: the reason why the volume is rejected, ``KIND: what is wrong``; empty if it is not.
        notes: what was repaired.
        files: one per channel, each of which holds only this volume and can be linked; else empty.
    """

    case: str
    item: str = ""
    images: list[sitk.Image] = field(default_factory=list)
    rejection: str = ""
    notes: list[str] = field(default_factory=list)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class VolumeFacts:
    """Measurements of a volume for the report. ``hu_like`` has one entry per channel."""

    minimum: float
    maximum: float
    hu_like: tuple[bool, ...]
    content_hash: str


def check_volume(volume: Volume, selection: Selection) -> VolumeFacts:
    """Check that a volume is fit for training, and measure it. Repairs are made in place, each with a note.

    Raises:
        RejectedError: the volume is not fit for training.
    """
    for image in volume.images:
        _check_size(image, selection.min_size)
        _check_spacing(image, selection.max_spacing)
    for channel, image in enumerate(volume.images):
        direction = orthonormalize(np.reshape(image.GetDirection(), (3, 3)), selection, volume.notes)
        image.SetDirection(direction.ravel().tolist())
        _align_with_first_channel(image, volume.images[0], volume.notes)
        volume.images[channel] = _make_finite(_make_storable(image), selection, volume.notes)
    arrays = [sitk.GetArrayViewFromImage(image) for image in volume.images]
    ranges = [(float(array.min()), float(array.max())) for array in arrays]
    for minimum, maximum in ranges:
        if maximum - minimum <= selection.min_range:
            raise RejectedError(f"constant: all intensities are between {minimum:g} and {maximum:g}")
    for array in arrays:
        _check_labels(array, selection, volume.notes)
    return VolumeFacts(
        minimum=min(minimum for minimum, _ in ranges),
        maximum=max(maximum for _, maximum in ranges),
        hu_like=tuple(is_hu_like(array) for array in arrays),
        content_hash=_hash_content(arrays, volume.images[0].GetSpacing()[::-1]),
    )


def orthonormalize(direction: np.ndarray, selection: Selection, notes: list[str]) -> np.ndarray:
    """Return the orthonormal matrix nearest to a direction matrix, and note the change if there is one.

    Raises:
        RejectedError: the axes are not at right angles, by more than rounding explains.
    """
    left, _, right = np.linalg.svd(direction)
    nearest = left @ right
    error = float(np.abs(nearest - direction).max())
    if error <= 1e-6:
        return direction
    if error > MAX_ROUNDING_OF_COSINES and "direction" not in selection.keep:
        raise RejectedError(f"direction: axes are not at right angles, off by {error:.3g}")
    notes.append(f"direction: made orthonormal, was off by {error:.2g}")
    return nearest


def require_spacing(stated: str, separator: str | None = None) -> None:
    """Raise RejectedError unless the spacing that a header states, as text, has only positive numbers.

    SimpleITK takes a spacing that is missing, and that of some files with 0, for 1 mm.
    """
    try:
        is_positive = all(float(number) > 0 for number in stated.split(separator))
    except ValueError:
        is_positive = False
    if not is_positive or not stated:
        raise RejectedError(f"spacing: the file states {printable(stated) or 'none'}")


def _check_size(image: sitk.Image, min_size: int) -> None:
    if image.GetDimension() != 3 or min(image.GetSize()) < min_size:
        size = " x ".join(map(str, image.GetSize()[::-1]))
        raise RejectedError(f"size: {size} voxels; needs 3 axes with at least {min_size} voxels each")


def _check_spacing(image: sitk.Image, max_spacing: float) -> None:
    largest = max(image.GetSpacing())
    if largest > max_spacing:
        raise RejectedError(f"spacing: {largest:g} mm, more than {max_spacing:g}")
    if largest < _METRES:
        raise RejectedError(f"spacing: {largest:g} mm on the longest side of a voxel; is it in metres?")


def _align_with_first_channel(image: sitk.Image, first: sitk.Image, notes: list[str]) -> None:
    """Give a channel the grid of the first channel, from which it may differ only by rounding."""
    if image.IsSameImageGeometryAs(first, 0.0, 0.0):
        return
    if image.GetSize() != first.GetSize() or not (
        np.allclose(image.GetSpacing(), first.GetSpacing(), rtol=1e-3)
        and np.allclose(image.GetDirection(), first.GetDirection(), atol=MAX_ROUNDING_OF_COSINES)
        and np.allclose(image.GetOrigin(), first.GetOrigin(), rtol=0, atol=0.1 * min(first.GetSpacing()))
    ):
        raise RejectedError("channels: not on the same grid")
    image.CopyInformation(first)
    notes.append("channels: put on the grid of the first")


def _make_storable(image: sitk.Image) -> sitk.Image:
    """Remove metadata, which may identify the patient, and cast wide types to float32, in which nnU-Net computes."""
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in image.GetPixelIDTypeAsString():
        raise RejectedError(f"vector: {image.GetPixelIDTypeAsString()}, with several numbers per voxel")
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return sitk.Cast(image, sitk.sitkFloat32) if image.GetPixelID() in _CAST_TO_FLOAT32 else image


def _make_finite(image: sitk.Image, selection: Selection, notes: list[str]) -> sitk.Image:
    array = sitk.GetArrayViewFromImage(image)
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)  # finite if all float32 values are; needs no temporary array
    if np.isfinite(total):
        return image
    is_finite = np.isfinite(array)
    count = array.size - int(is_finite.sum())
    if "nonfinite" not in selection.keep or count == array.size:
        raise RejectedError(f"nonfinite: {count} voxels are NaN or infinite")
    notes.append(f"nonfinite: {count} voxels set to the lowest finite value")
    return image_on_grid(np.where(is_finite, array, array[is_finite].min()), image)


def _check_labels(array: np.ndarray, selection: Selection, notes: list[str]) -> None:
    description = describe_label_map(array)
    if description and "labels" not in selection.keep:
        raise RejectedError(f"labels: {description}")
    if description:
        notes.append(f"labels: {description}")


def _hash_content(arrays: Sequence[np.ndarray], spacing: Sequence[float]) -> str:
    """Hash voxels and spacing. The file format and the voxel type make no difference."""
    digest = hashlib.sha256(f"{arrays[0].shape} {[round(mm, 3) for mm in spacing]}".encode())
    for array in arrays:
        for one_slice in array:
            digest.update(np.ascontiguousarray(one_slice, dtype=np.float32).data)
    return digest.hexdigest()[:32]
