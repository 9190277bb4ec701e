"""A volume of unlabelled data: decide whether it is fit for training, and mend what may be mended.

Axes are (slices, rows, columns), spacings in mm in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.body_mask import is_hu_like

CHECKS = ("duplicates", "nonfinite", "direction", "slices")  # what --keep can let pass
_ROUNDING = 5e-3  # of a direction cosine: headers written with two digits; a scanner tilted by 1 degree is 0.017 off
NIFTI_IO = "NiftiImageIO"  # named, ITK need not ask all others: saves a tenth of the time of a small volume


@dataclass(frozen=True)
class Selection:
    """Which volumes are fit for training.

    Attributes:
        min_size: least number of slices, rows and columns.
        max_spacing: in mm; larger ones are taken for mistakes.
        min_range: volumes whose intensities do not differ by more than this are constant.
        keep: checks of :data:`CHECKS` that let pass what they find: duplicates as they are, voxels that are not
            finite set to the lowest that is, directions made orthonormal, unevenly spaced slices as if they were even.
        split_4d: a 4D file is so many volumes; else it is rejected.

    Raises:
        UserError: for a value that is not legal.
    """

    min_size: int = 16
    max_spacing: float = 20.0
    min_range: float = 0.0
    keep: tuple[str, ...] = ()
    split_4d: bool = True

    def __post_init__(self) -> None:
        unknown = sorted({*self.keep} - {*CHECKS})
        if unknown:
            raise UserError(f"--keep: there is no check {unknown[0]!r}; use {', '.join(CHECKS)}, separated by commas")
        if self.min_size < 1:
            raise UserError(f"--min-size is {self.min_size}; it must be at least 1 voxel")
        if not self.max_spacing > 0:
            raise UserError(f"--max-spacing is {self.max_spacing}; it must be more than 0 mm")
        if not self.min_range >= 0:
            raise UserError(f"--min-range is {self.min_range}; it must be at least 0")


class Rejected(Exception):  # noqa: N818  a verdict, not an error
    """A volume is not fit; the message is ``KIND: what is wrong``."""


@dataclass
class Volume:
    """One volume (of one or more channels) that a source gave, or why it did not.

    Attributes:
        case: its name in the dataset.
        item: which of the source's volumes; empty if there is but one.
        images: one a channel, all on one grid.
        problem: why there are none.
        notes: what was mended.
        files: one a channel that hold just this volume, for links; empty if there are none.
    """

    case: str
    item: str = ""
    images: list[sitk.Image] = field(default_factory=list)
    problem: str = ""
    notes: list[str] = field(default_factory=list)
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Facts:
    """What the report says of a volume; ``hu_like`` has an entry per channel."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    minimum: float
    maximum: float
    hu_like: tuple[bool, ...]
    digest: str


def examine(volume: Volume, selection: Selection) -> Facts:
    """Measure a volume and decide whether it is fit for training; mend in place what may be mended, with a note.

    Raises:
        Rejected: it is not fit.
    """
    for image in volume.images:
        if image.GetDimension() != 3 or min(image.GetSize()) < selection.min_size:
            extent = " x ".join(map(str, image.GetSize()[::-1]))
            raise Rejected(f"size: {extent} voxels, fewer than {selection.min_size} on a side")
        if max(image.GetSpacing()) > selection.max_spacing:
            raise Rejected(f"spacing: {max(image.GetSpacing()):g} mm, more than {selection.max_spacing:g}")
    for number, image in enumerate(volume.images):
        _mend_direction(image, selection, volume.notes)
        _share_grid(volume.images[0], image, volume.notes)
        volume.images[number] = _finite(_storable(image), selection, volume.notes)
    shape, spacing = volume.images[0].GetSize()[::-1], volume.images[0].GetSpacing()[::-1]
    arrays = [sitk.GetArrayViewFromImage(image) for image in volume.images]
    lows, highs = [float(array.min()) for array in arrays], [float(array.max()) for array in arrays]
    for low, high in zip(lows, highs, strict=True):
        if high - low <= selection.min_range:
            raise Rejected(f"constant: all voxels between {low:g} and {high:g}")
    hu_like = tuple(is_hu_like(array) for array in arrays)
    return Facts(shape, spacing, min(lows), max(highs), hu_like, _content_hash(arrays, spacing))


def on_grid_of(like: sitk.Image, array: np.ndarray) -> sitk.Image:
    """An array, (D, H, W), as an image on the grid of another."""
    image = sitk.GetImageFromArray(array, isVector=False)
    image.CopyInformation(like)
    return image


def one_line(error: Exception) -> str:
    """What went wrong, as the last line of a library's message has it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    last = " ".join(str(error).strip().rpartition("\n")[2].split()).removeprefix("sitk::ERROR: ")
    return "too short or damaged" if last in ("", "Reason: No such file or directory") else last  # MetaImage's


# ---------------------------------------------------------------- what a volume holds


def _storable(image: sitk.Image) -> sitk.Image:
    """Without metadata, which may tell of the patient, and in no more than 32 bits: nnU-Net computes in float32."""
    if image.GetNumberOfComponentsPerPixel() > 1 or "complex" in image.GetPixelIDTypeAsString():
        raise Rejected(f"vector: {image.GetPixelIDTypeAsString()} with several numbers a voxel")
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    wide = (sitk.sitkFloat64, sitk.sitkInt64, sitk.sitkUInt64, sitk.sitkUInt32)
    return sitk.Cast(image, sitk.sitkFloat32) if image.GetPixelID() in wide else image


def _finite(image: sitk.Image, selection: Selection, notes: list[str]) -> sitk.Image:
    array = sitk.GetArrayViewFromImage(image)
    with np.errstate(invalid="ignore"):
        total = array.sum(dtype=np.float64)  # finite where all float32 are, and needs no array of its own
    if np.isfinite(total):
        return image
    finite = np.isfinite(array)
    count = array.size - int(finite.sum())
    if "nonfinite" not in selection.keep or count == array.size:
        raise Rejected(f"nonfinite: {count} voxels are NaN or infinite")
    notes.append(f"nonfinite: {count} voxels set to the lowest finite value")
    return on_grid_of(image, np.where(finite, array, array[finite].min()))


def _content_hash(arrays: Sequence[np.ndarray], spacing: Sequence[float]) -> str:
    """Of pixels and spacing, whatever the file's format or type of pixel."""
    digest = hashlib.sha256(f"{arrays[0].shape} {[round(mm, 3) for mm in spacing]}".encode())
    for array in arrays:
        for one_slice in array:
            digest.update(np.ascontiguousarray(one_slice, dtype=np.float32).data)
    return digest.hexdigest()[:32]


def _mend_direction(image: sitk.Image, selection: Selection, notes: list[str]) -> None:
    nearest, off = orthonormal(np.reshape(image.GetDirection(), (3, 3)))
    if off > 1e-6:
        accept_direction(off, selection, notes)
        image.SetDirection(nearest.ravel().tolist())


def accept_direction(off: float, selection: Selection, notes: list[str]) -> None:
    if off > _ROUNDING and "direction" not in selection.keep:
        raise Rejected(f"direction: axes are not at right angles, off by {off:.3g}")
    notes.append(f"direction: made orthonormal, was off by {off:.2g}")


def _share_grid(first: sitk.Image, image: sitk.Image, notes: list[str]) -> None:
    """Give a further channel the first one's grid, which it may differ from by rounding only."""
    if image.IsSameImageGeometryAs(first, 0.0, 0.0):
        return
    if image.GetSize() != first.GetSize() or not (
        np.allclose(image.GetSpacing(), first.GetSpacing(), rtol=1e-3)
        and np.allclose(image.GetDirection(), first.GetDirection(), atol=_ROUNDING)
        and np.allclose(image.GetOrigin(), first.GetOrigin(), rtol=0, atol=0.1 * min(first.GetSpacing()))
    ):
        raise Rejected("channels: not on one grid")
    image.CopyInformation(first)
    notes.append("channels: put on the grid of the first")


def orthonormal(direction: np.ndarray) -> tuple[np.ndarray, float]:
    """The orthonormal matrix nearest to one whose columns are directions, and how far the two are apart."""
    left, _, right = np.linalg.svd(direction)
    return left @ right, float(np.abs(left @ right - direction).max())
