"""Read NIfTI files, also pairs (``.hdr`` and ``.img``) and NIfTI-2; find the errors that SimpleITK does not report.

SimpleITK reads a truncated or damaged file as if it were whole (the rest is zeros or noise), replaces NaN by 0, and
cannot read NIfTI-2, which nibabel reads. It also reads pairs in the older format Analyze 7.5.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from io import BufferedReader
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention

from nnunetv2_vf.importing.images import NIFTI_IO, image_on_grid
from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.sources import data_files
from nnunetv2_vf.importing.volumes import RejectedError, orthonormalize

_MM_OF_UNITS = {"meter": 1e3, "micron": 1e-3}
_PERMISSIVE = "ITK_NIFTI_SFORM_PERMISSIVE"


def read_nifti(path: str, selection: Selection, notes: list[str]) -> sitk.Image:
    """Read a NIfTI file. NaN and infinite voxels stay recognisable: they are NaN in the image.

    Args:
        path: of the header, if header and voxels are two files.

    Raises:
        RejectedError: the file is truncated, has several numbers per voxel, its spacing is not positive, or its axes
            are not at right angles.
        EOFError, OSError, RuntimeError, zlib.error, nibabel's errors: the file is damaged.
    """
    header = _read_header(path)
    spacing = header["pixdim"][1:4]
    if not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise RejectedError(f"spacing: {' x '.join(f'{mm:g}' for mm in spacing[::-1])} mm")
    numbers_per_voxel = math.prod(header["dim"][5 : int(header["dim"][0]) + 1].tolist())
    if numbers_per_voxel > 1:  # axis 4 is time, axis 5 holds vectors
        raise RejectedError(f"vector: {numbers_per_voxel} numbers per voxel")
    if isinstance(header, nibabel.Nifti2Header):
        _check_voxel_data(path, header)
        notes.append("format: NIfTI-2, converted")
        return _read_nifti2(path)
    image = _read_image(path, header, selection, notes)
    if _matches_checksum(path, header, image):
        return image
    has_nonfinite = _check_voxel_data(path, header)
    return _restore_nonfinite(path, image) if has_nonfinite else image


def _open(path: str) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb")


def _voxel_file(path: str) -> str:
    """Return the file that holds the voxels: the file itself, or the second one of a pair."""
    return next(iter(data_files(path)), path)


def _read_header(path: str) -> nibabel.Nifti1Header | nibabel.Nifti2Header:
    with _open(path) as file:
        header_size = file.read(4)
        file.seek(0)
        is_nifti2 = 540 in (int.from_bytes(header_size, "little"), int.from_bytes(header_size, "big"))
        header_class = nibabel.Nifti2Header if is_nifti2 else nibabel.Nifti1Header
        return header_class.from_fileobj(file, check=False)


def _read_nifti2(path: str) -> sitk.Image:
    """Read a NIfTI-2 file with 3 or 4 axes."""
    content = nibabel.load(path)
    array = np.asanyarray(content.dataobj).T  # (volumes,) slices, rows, columns
    array = array.reshape(-1, *array.shape[-3:]).astype(array.dtype.newbyteorder("="), copy=False)
    unit_mm = _MM_OF_UNITS.get(content.header.get_xyzt_units()[0], 1.0)
    volumes = [_make_image(volume, np.diag([unit_mm, unit_mm, unit_mm, 1]) @ content.affine) for volume in array]
    return volumes[0] if len(volumes) == 1 else sitk.JoinSeries(volumes)


def _make_image(array: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """Return an array (slices, rows, columns) as an image.

    Args:
        affine: from (column, row, slice) to mm, towards the right, front and head of the patient, as in NIfTI.
    """
    affine = np.diag([-1, -1, 1, 1]) @ affine  # SimpleITK's axes point towards the left, back and head
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array), isVector=False)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def _read_image(path: str, header: nibabel.Nifti1Header, selection: Selection, notes: list[str]) -> sitk.Image:
    try:
        return sitk.ReadImage(path, imageIO=NIFTI_IO)
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise
    matrix = header.get_sform()[:3, :3]
    orthonormalize(matrix / np.linalg.norm(matrix, axis=0), selection, notes)
    os.environ[_PERMISSIVE] = "1"  # makes ITK read the file and orthonormalise its matrix
    try:
        return sitk.ReadImage(path)
    finally:
        del os.environ[_PERMISSIVE]


def _matches_checksum(path: str, header: nibabel.Nifti1Header, image: sitk.Image) -> bool:
    """Return True if the checksum that a ``.gz`` file states equals that of its header and the image's voxels.

    Then the file is whole and SimpleITK has changed nothing. If not, the file may be damaged, or its voxels may be
    scaled or byte-swapped; :func:`_check_voxel_data` reads it again to find out. The checksum usually saves this second
    reading, which takes a sixth of the time per volume.
    """
    if not path.lower().endswith(".gz"):
        return False
    voxel_file = _voxel_file(path)
    with _open(voxel_file) as file:
        before_voxels = file.read(int(header["vox_offset"]))
    with Path(voxel_file).open("rb") as compressed:
        compressed.seek(-8, os.SEEK_END)
        stated = int.from_bytes(compressed.read(4), "little")
    return zlib.crc32(sitk.GetArrayViewFromImage(image), zlib.crc32(before_voxels)) == stated


def _check_voxel_data(path: str, header: nibabel.Nifti1Header) -> bool:
    """Read all voxels, which also verifies a compressed file's checksum. Return True if some are not finite.

    Raises:
        RejectedError: the file has fewer voxels than its header states.
        EOFError, zlib.error, OSError: the file is damaged.
    """
    dtype, num_axes = header.get_data_dtype(), int(header["dim"][0])
    required = math.prod(map(int, header["dim"][1 : num_axes + 1])) * dtype.itemsize
    length, has_nonfinite = 0, False
    with _open(_voxel_file(path)) as file:
        file.seek(int(header["vox_offset"]))
        for block in iter(lambda: file.read(1 << 20), b""):
            length += len(block)
            if dtype.kind == "f" and not has_nonfinite:
                whole = len(block) // dtype.itemsize
                has_nonfinite = not np.isfinite(np.frombuffer(block, dtype, count=whole)).all()
    if length < required:
        raise RejectedError(f"unreadable: truncated, {length} of {required} bytes of voxels")
    return has_nonfinite


def _restore_nonfinite(path: str, image: sitk.Image) -> sitk.Image:
    """Set the voxels to NaN that are not finite in the file."""
    array = sitk.GetArrayViewFromImage(image)
    is_finite = np.isfinite(nibabel.load(path).dataobj).T.reshape(array.shape)
    return image_on_grid(np.where(is_finite, array, np.nan), image)
