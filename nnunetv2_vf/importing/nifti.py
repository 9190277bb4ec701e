"""Read NIfTI files with SimpleITK, and find the errors that SimpleITK does not report.

SimpleITK reads a truncated or damaged file as if it were whole (the rest is zeros or noise), and replaces NaN by 0.
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
from nnunetv2_vf.importing.volumes import RejectedError, orthonormalize

_PERMISSIVE = "ITK_NIFTI_SFORM_PERMISSIVE"


def read_nifti(path: str, selection: Selection, notes: list[str]) -> sitk.Image:
    """Read a NIfTI file. NaN and infinite voxels stay recognisable: they are NaN in the image.

    Raises:
        RejectedError: the file is NIfTI-2 or truncated, its spacing is not positive, or its axes are not at right
            angles.
        EOFError, OSError, RuntimeError, zlib.error, nibabel's header errors: the file is damaged.
    """
    header = _read_header(path)
    spacing = header["pixdim"][1:4]
    if not np.all(np.isfinite(spacing) & (spacing > 0)):
        raise RejectedError(f"spacing: {' x '.join(f'{mm:g}' for mm in spacing[::-1])} mm")
    image = _read_image(path, header, selection, notes)
    if _matches_checksum(path, header, image):
        return image
    has_nonfinite = _check_voxel_data(path, header)
    return _restore_nonfinite(path, image) if has_nonfinite else image


def _open(path: str) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.lower().endswith(".gz") else Path(path).open("rb")


def _read_header(path: str) -> nibabel.Nifti1Header:
    with _open(path) as file:
        header_size = file.read(4)
        if 540 in (int.from_bytes(header_size, "little"), int.from_bytes(header_size, "big")):
            raise RejectedError("unreadable: NIfTI-2, which SimpleITK does not read")
        file.seek(0)
        return nibabel.Nifti1Header.from_fileobj(file, check=False)


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
    with _open(path) as file:
        before_voxels = file.read(int(header["vox_offset"]))
    with Path(path).open("rb") as compressed:
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
    with _open(path) as file:
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
