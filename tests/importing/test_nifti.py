from __future__ import annotations

import gzip
import struct

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from unlabelled_data import check_only_volume, ct, mr, read_all, set_nifti_spacing, truncate, write_4d, write_volume

from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.volumes import check_volume


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["scaled", "big-endian"])
def test_scaled_and_big_endian_voxels_are_read_and_truncation_is_found(tmp_path, kind, compressed):
    header = nibabel.Nifti1Header(endianness=">") if kind == "big-endian" else None
    stored = bytearray(nibabel.Nifti1Image(ct(0).T, np.eye(4), header).to_bytes())
    if kind == "scaled":
        struct.pack_into("<ff", stored, 112, 0.5, -10)
    path = tmp_path / ("a.nii.gz" if compressed else "a.nii")
    path.write_bytes(gzip.compress(stored) if compressed else stored)
    (volume,) = read_all(path)
    expected = 0.5 * ct(0) - 10 if kind == "scaled" else ct(0)
    np.testing.assert_allclose(sitk.GetArrayFromImage(volume.images[0]), expected)
    assert check_only_volume(path) == "fine"
    truncate(path)
    assert check_only_volume(path).startswith("unreadable")


def test_nifti_2_is_rejected_as_unreadable(tmp_path):
    nibabel.save(nibabel.Nifti2Image(ct(0).T, np.eye(4)), tmp_path / "a.nii.gz")
    assert check_only_volume(tmp_path / "a.nii.gz") == "unreadable: NIfTI-2, which SimpleITK does not read"


def test_a_damaged_byte_in_a_compressed_file_is_found(tmp_path):
    path = write_volume(tmp_path / "a.nii.gz", ct(0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert check_only_volume(path).startswith("unreadable")


@pytest.mark.parametrize("millimetres", [0.0, -1.0, float("nan"), float("inf"), 20.5])
def test_a_nifti_with_a_spacing_that_is_not_positive_or_too_large_is_rejected(tmp_path, millimetres):
    path = write_volume(tmp_path / "a.nii", ct(0))
    set_nifti_spacing(path, 3, millimetres)
    assert check_only_volume(path).startswith("spacing: ")


def test_nonfinite_voxels_of_a_4d_file_concern_only_their_volume(tmp_path):
    arrays = [mr(0), mr(1)]
    arrays[1][3, 4, 5] = np.nan
    first, second = read_all(write_4d(tmp_path / "a.nii.gz", arrays), keep=("nonfinite",))
    check_volume(first, Selection())
    check_volume(second, Selection(keep=("nonfinite",)))
    assert (first.notes, second.notes) == ([], ["nonfinite: 1 voxels set to the lowest finite value"])
    alone = write_4d(tmp_path / "b.nii.gz", arrays[1:])
    assert check_only_volume(alone, keep=("nonfinite",)).startswith("nonfinite: 1 voxels set")
