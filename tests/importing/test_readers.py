from __future__ import annotations

import zlib

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from unlabelled_data import (
    SPACING,
    VOLUME_FORMATS,
    change_text_header,
    check_only_volume,
    ct,
    make_image,
    read_all,
    truncate,
    write_4d,
    write_volume,
)

from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.volumes import check_volume


@pytest.mark.parametrize("ending", VOLUME_FORMATS)
def test_every_format_gives_the_same_volume(tmp_path, ending):
    (volume,) = read_all(write_volume(tmp_path / f"a.{ending}", ct(0)))
    facts = check_volume(volume, Selection())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))
    assert volume.images[0].GetSpacing() == pytest.approx(SPACING[::-1])
    assert (facts.minimum, facts.maximum) == (ct(0).min(), ct(0).max())
    assert facts.hu_like == (True,)


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd", "mha"])
def test_a_4d_file_is_split_or_rejected(tmp_path, ending):
    arrays = [ct(1), ct(2), ct(3)]
    path = write_4d(tmp_path / f"a.{ending}", arrays)
    split = read_all(path)
    assert [volume.item for volume in split] == [f"volume {n} of 3" for n in (1, 2, 3)]
    assert [volume.case[-5:] for volume in split] == ["_v000", "_v001", "_v002"]
    for volume, array in zip(split, arrays, strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), array)
        assert volume.images[0].GetSpacing() == pytest.approx(SPACING[::-1])
        check_volume(volume, Selection())
    assert check_only_volume(path, split_4d=False) == "4D: 3 volumes in one file"
    assert check_only_volume(write_4d(tmp_path / f"one.{ending}", [ct(1)]), split_4d=False) == "fine"


@pytest.mark.parametrize("ending", VOLUME_FORMATS)
def test_a_truncated_file_is_rejected_as_unreadable(tmp_path, ending):
    path = write_volume(tmp_path / f"a.{ending}", ct(0))
    truncate(path.with_suffix({"mhd": ".raw", "nhdr": ".raw", "hdr": ".img"}.get(ending, path.suffix)))
    assert check_only_volume(path).startswith("unreadable")


@pytest.mark.parametrize("ending", VOLUME_FORMATS)
def test_an_empty_file_is_rejected_as_unreadable(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.touch()
    assert check_only_volume(path).startswith("unreadable")


@pytest.mark.parametrize(
    ("ending", "pattern", "replacement"),
    [
        ("nrrd", rb"space directions:[^\n]*\n", b""),
        ("nrrd", rb"space directions:[^\n]*\n", b"spacings: nan nan nan\n"),
        ("nrrd", rb"\(0,0,2\)", b"(0,0,0)"),
        ("mha", rb"ElementSpacing[^\n]*\n", b""),
        ("mha", rb"ElementSpacing = 1", b"ElementSpacing = 0"),
        ("mha", rb"ElementSpacing = 1", b"ElementSpacing = -1"),
        ("mhd", rb"ElementSpacing[^\n]*\n", b""),
        ("nhdr", rb"space directions:[^\n]*\n", b""),
        ("nrrd", rb"space directions:[^\n]*\n", b"space directions: none none none\n"),
    ],
)
def test_a_text_header_without_positive_spacings_is_rejected(tmp_path, ending, pattern, replacement):
    path = write_volume(tmp_path / f"a.{ending}", ct(0))
    change_text_header(path, pattern, replacement)
    assert check_only_volume(path).startswith("spacing: ")


@pytest.mark.parametrize("ending", ["mha", "mhd", "nrrd"])
def test_damaged_compressed_voxels_are_rejected(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    sitk.WriteImage(make_image(ct(0)), str(path), useCompression=True)
    assert check_only_volume(path) == "fine"
    voxels = path.with_suffix(".zraw") if ending == "mhd" else path
    content = bytearray(voxels.read_bytes())
    content[-3000] ^= 0xFF
    voxels.write_bytes(content)
    assert check_only_volume(path).startswith("unreadable: ")


def test_a_compressed_file_that_is_shorter_than_its_header_says_is_rejected(tmp_path):
    sitk.WriteImage(make_image(ct(0)), str(tmp_path / "a.mha"), useCompression=True)
    change_text_header(tmp_path / "a.mha", rb"DimSize = 28 24 20", b"DimSize = 28 24 21")
    assert check_only_volume(tmp_path / "a.mha") == "unreadable: too short or damaged"


def test_a_direction_matrix_without_an_inverse_is_rejected(tmp_path):
    path = write_volume(tmp_path / "a.nrrd", ct(0))
    change_text_header(path, rb"space directions: [^\n]*", b"space directions: (1,0,0) (1,0,0) (0,0,1)")
    assert check_only_volume(path) == "direction: Bad direction, determinant is 0."


def test_a_compressed_metaimage_with_a_file_for_each_slice_is_read(tmp_path):
    path = write_volume(tmp_path / "a.mhd", ct(0))
    names = [f"slice_{number:02d}.zraw" for number in range(len(ct(0)))]
    for name, one_slice in zip(names, ct(0), strict=True):
        (tmp_path / name).write_bytes(zlib.compress(one_slice.tobytes()))
    change_text_header(path, rb"CompressedData = False", b"CompressedData = True")
    change_text_header(path, rb"ElementDataFile = .*", b"ElementDataFile = LIST\n" + "\n".join(names).encode())
    (volume,) = read_all(path)
    assert not volume.rejection
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))
