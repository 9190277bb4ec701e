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


OBLIQUE = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(0.3, 0.2, 0.1) @ np.diag([-1, 1.5, 2]), [3, 4, 5])


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr", "a.hdr.gz"])
@pytest.mark.parametrize("affine", [np.diag([1, 1.5, 2, 1]), OBLIQUE])
def test_nifti_2_is_read_like_nifti_1(tmp_path, name, affine):
    is_pair = ".hdr" in name
    one, two = (nibabel.Nifti1Pair, nibabel.Nifti2Pair) if is_pair else (nibabel.Nifti1Image, nibabel.Nifti2Image)
    for folder, image_class in (("1", one), ("2", two)):
        (tmp_path / folder).mkdir()
        nibabel.save(image_class(ct(0).T, affine), tmp_path / folder / name)
    (expected,), (volume,) = read_all(tmp_path / "1"), read_all(tmp_path / "2")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))
    for geometry in ("GetSpacing", "GetDirection", "GetOrigin"):
        ours, reference = (getattr(image, geometry)() for image in (volume.images[0], expected.images[0]))
        assert ours == pytest.approx(reference, abs=1e-5), geometry
    assert check_only_volume(tmp_path / "2").startswith("format: NIfTI-2, converted")
    truncate(tmp_path / "2" / name.replace("hdr", "img"))
    assert check_only_volume(tmp_path / "2").startswith("unreadable")


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("micron", 1000), ("meter", 0.001)])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_nifti_2_of_any_unit_and_byte_order_is_read_like_nifti_1(tmp_path, unit, factor, endianness):
    for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image):
        header = kind.header_class(endianness=endianness)
        image = kind(ct(0).T, np.diag([factor, 1.5 * factor, 2 * factor, 1]), header)
        image.header.set_xyzt_units(unit)
        (tmp_path / "a.nii").write_bytes(image.to_bytes())
        (volume,) = read_all(tmp_path)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))
        assert volume.images[0].GetSpacing() == pytest.approx((1, 1.5, 2), rel=1e-5)


def test_nifti_2_of_several_volumes_is_split(tmp_path):
    nibabel.save(nibabel.Nifti2Image(np.stack([ct(0).T, ct(1).T], axis=-1), np.eye(4)), tmp_path / "a.nii.gz")
    for volume, expected in zip(read_all(tmp_path), (ct(0), ct(1)), strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), expected)
        check_volume(volume, Selection())


def test_nan_in_nifti_2_is_found(tmp_path):
    array = mr(0)
    array[3, 4, 5] = np.nan
    nibabel.save(nibabel.Nifti2Image(array.T, np.eye(4)), tmp_path / "a.nii.gz")
    assert check_only_volume(tmp_path / "a.nii.gz") == "nonfinite: 1 voxels are NaN or infinite"


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Pair, nibabel.Nifti2Pair])
def test_a_pair_with_endings_in_capitals_is_read(tmp_path, image_class):
    nibabel.save(image_class(ct(0).T, np.eye(4)), tmp_path / "a.hdr")
    for ending in ("hdr", "img"):
        (tmp_path / f"a.{ending}").rename(tmp_path / f"A.{ending.upper()}")
    (volume,) = read_all(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))


def test_analyze_is_read(tmp_path):
    nibabel.save(nibabel.AnalyzeImage(ct(0).T, np.diag([1, 1.5, 2, 1])), tmp_path / "a.hdr")
    (volume,) = read_all(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))
    assert volume.images[0].GetSpacing() == pytest.approx((1, 1.5, 2))


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize(("shape", "reason"), [((1, 2), "vector: 2 numbers per voxel"), ((3, 2), "vector: 2 numbers")])
def test_several_numbers_per_voxel_are_rejected_as_a_vector(tmp_path, image_class, shape, reason):
    array = np.broadcast_to(ct(0).T[..., None, None], (*ct(0).T.shape, *shape))
    nibabel.save(image_class(array, np.eye(4)), tmp_path / "a.nii.gz")
    assert check_only_volume(tmp_path / "a.nii.gz").startswith(reason)


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_axes_of_length_1_do_not_count(tmp_path, image_class):
    nibabel.save(image_class(ct(0).T[..., None, None], np.eye(4)), tmp_path / "one.nii.gz")
    stacked = np.stack([ct(0).T, ct(1).T], axis=-1)[..., None]
    nibabel.save(image_class(stacked, np.eye(4)), tmp_path / "two.nii.gz")
    assert [volume.item for volume in read_all(tmp_path)] == ["", "volume 1 of 2", "volume 2 of 2"]
    assert not any(volume.rejection for volume in read_all(tmp_path))


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
