from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from unlabelled_data import (
    NAME,
    PATIENT,
    SHAPE,
    SPACING,
    STUDY,
    change_header,
    change_pixdim,
    ct,
    cut_off,
    image,
    mr,
    shear,
    write,
    write_4d,
    write_dicom,
)

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.readers import read_volumes
from nnunetv2_vf.importing.sources import find_sources
from nnunetv2_vf.importing.volumes import Rejected, Selection, Volume, examine

FORMATS = ("nii", "nii.gz", "nrrd", "mha", "mhd")


def volumes(path, **selection) -> list[Volume]:
    chosen = Selection(**selection)
    found = find_sources([Path(path)], Path("/nowhere")).sources
    return [volume for source in found for volume in read_volumes(source, chosen)]


def verdict(path, **selection) -> str:
    """Why the only volume of a path is rejected, or what was mended, or 'fine'."""
    (volume,) = volumes(path, **selection)
    try:
        if volume.problem:
            return volume.problem
        examine(volume, Selection(**selection))
    except Rejected as reason:
        return str(reason)
    return "; ".join(volume.notes) or "fine"


# ---------------------------------------------------------------- formats


@pytest.mark.parametrize("ending", FORMATS)
def test_every_format_gives_the_same_volume(tmp_path, ending):
    (volume,) = volumes(write(tmp_path / f"a.{ending}", ct(0)))
    facts = examine(volume, Selection())
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))
    assert facts.shape == SHAPE
    assert facts.spacing == pytest.approx(SPACING)
    assert (facts.minimum, facts.maximum) == (ct(0).min(), ct(0).max())
    assert facts.hu_like == (True,)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["scaled", "big-endian"])
def test_nifti_whose_voxels_are_not_as_stored_are_read_and_their_damage_found(tmp_path, kind, packed):
    header = nibabel.Nifti1Header(endianness=">") if kind == "big-endian" else None
    stored = bytearray(nibabel.Nifti1Image(ct(0).T, np.eye(4), header).to_bytes())
    if kind == "scaled":
        struct.pack_into("<ff", stored, 112, 0.5, -10)
    path = tmp_path / ("a.nii.gz" if packed else "a.nii")
    path.write_bytes(gzip.compress(stored) if packed else stored)
    (volume,) = volumes(path)
    expected = 0.5 * ct(0) - 10 if kind == "scaled" else ct(0)
    np.testing.assert_allclose(sitk.GetArrayFromImage(volume.images[0]), expected)
    assert verdict(path) == "fine"
    cut_off(path)
    assert verdict(path).startswith("unreadable")


def test_nifti_2_is_told(tmp_path):
    nibabel.save(nibabel.Nifti2Image(ct(0).T, np.eye(4)), tmp_path / "a.nii.gz")
    assert verdict(tmp_path / "a.nii.gz") == "unreadable: NIfTI-2, which SimpleITK does not read"


@pytest.mark.parametrize("ending", [".dcm", ""])
def test_several_dicom_series_in_one_folder_are_several_volumes(tmp_path, ending):
    arrays = [ct(1), ct(2)]
    for number, array in enumerate(arrays, start=1):
        write_dicom(tmp_path, array, number, ending)
    (tmp_path / "notes.txt").write_text("stray")
    found = volumes(tmp_path)
    assert [volume.item for volume in found] == ["series 1 of 2, 20 files", "series 2 of 2, 20 files"]
    for volume, array in zip(found, arrays, strict=True):
        facts = examine(volume, Selection())
        assert (facts.shape, facts.spacing) == (SHAPE, pytest.approx(SPACING))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), array)
    assert found[0].case != found[1].case


def test_nothing_of_a_dicom_file_but_pixels_and_geometry_is_kept(tmp_path):
    write_dicom(tmp_path / "series", ct(0))
    write_dicom(tmp_path / "single", ct(0)[:1])
    for volume in volumes(tmp_path, min_size=1):
        examine(volume, Selection(min_size=1))
        assert volume.images[0].GetMetaDataKeys() == ()
        assert not any(secret in f"{volume.case} {volume.item}" for secret in (NAME, "Doe", PATIENT, STUDY))


def test_a_dicom_file_that_is_given_by_name_is_named_by_no_part_of_it(tmp_path):
    write_dicom(tmp_path, ct(0)[:1])
    file = (tmp_path / "s1_000.dcm").rename(tmp_path / PATIENT)
    (volume,) = volumes(file, min_size=1)
    assert not volume.problem
    assert volume.case.startswith("dicom_")


def test_a_tilted_scanner_is_told(tmp_path):
    write_dicom(tmp_path, ct(0), shift=0.5)
    assert verdict(tmp_path).startswith("direction: axes are not at right angles")
    assert verdict(tmp_path, keep=("direction",)).startswith("direction: made orthonormal")


@pytest.mark.parametrize("slopes", [("1", "0.1"), ("0.5",)])
def test_slices_that_are_rescaled_to_fractions_keep_them(tmp_path, slopes):
    write_dicom(tmp_path, ct(0), tags={"0008|0060": "PT"}, slopes=slopes)
    (volume,) = volumes(tmp_path)
    stored = [sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0] for path in sorted(tmp_path.iterdir())]
    read = sitk.GetArrayFromImage(volume.images[0])
    np.testing.assert_allclose(read, np.stack(stored), rtol=1e-6)
    assert np.any(read != np.round(read))


def test_two_phases_at_the_same_positions_are_no_volume(tmp_path):
    write_dicom(tmp_path / "1", ct(0))
    write_dicom(tmp_path / "2", ct(1))
    for path in (tmp_path / "2").iterdir():
        path.rename(tmp_path / "1" / f"second_{path.name}")
    for keep in ((), ("slices",)):
        assert verdict(tmp_path / "1", keep=keep).startswith("slices: missing, doubled or uneven")


def test_hidden_files_and_folders_beside_a_series_are_no_dicom(tmp_path):
    write_dicom(tmp_path, ct(0))
    (tmp_path / "._s1_000.dcm").write_bytes(b"AppleDouble")
    (tmp_path / "folder.dcm").mkdir()
    assert verdict(tmp_path) == "fine"


def test_a_damaged_dicom_file_is_told(tmp_path):
    write_dicom(tmp_path, ct(0))
    (tmp_path / "bad.dcm").write_bytes(b"no DICOM")
    whole, stray = volumes(tmp_path)
    assert not whole.problem
    assert stray.problem == "unreadable: 1 DICOM files that are part of no series"


def test_files_that_gdcm_cannot_list_do_not_hide_the_series_beside_them(tmp_path):
    write_dicom(tmp_path, ct(0))
    write_dicom(tmp_path, ct(1), series=2, tags={"0008|0060": "RTDOSE"})  # without what a dose must have
    whole, stray = volumes(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(whole.images[0]), ct(0))
    assert stray.problem == "unreadable: 20 DICOM files that are part of no series"


@pytest.mark.parametrize(
    ("changes", "kept", "reason"),
    [
        ({"skip": (5, 6)}, "", "slices: missing, doubled or uneven, 2 to 6 mm apart"),
        ({"skip": (5, 6)}, "slices", "slices: 2 to 6 mm apart, taken as even"),
        ({"tags": {"0008|0060": "SEG"}}, "", "modality: SEG is no scan"),
    ],
)
def test_dicom_series_that_are_no_even_stack_of_images(tmp_path, changes, kept, reason):
    write_dicom(tmp_path, ct(0), **changes)
    assert verdict(tmp_path, keep=tuple(filter(None, [kept]))) == reason


@pytest.mark.parametrize("ending", ["nii.gz", "nrrd", "mha"])
def test_a_4d_file_is_split_or_refused(tmp_path, ending):
    arrays = [ct(1), ct(2), ct(3)]
    path = write_4d(tmp_path / f"a.{ending}", arrays)
    split = volumes(path)
    assert [volume.item for volume in split] == [f"volume {n} of 3" for n in (1, 2, 3)]
    assert [volume.case[-5:] for volume in split] == ["_v000", "_v001", "_v002"]
    for volume, array in zip(split, arrays, strict=True):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), array)
        assert examine(volume, Selection()).spacing == pytest.approx(SPACING)
    assert verdict(path, split_4d=False) == "4D: 3 volumes in one file"
    assert verdict(write_4d(tmp_path / f"one.{ending}", [ct(1)]), split_4d=False) == "fine"


# ---------------------------------------------------------------- selection


@pytest.mark.parametrize("ending", FORMATS)
def test_a_file_that_is_cut_off_is_unreadable(tmp_path, ending):
    path = write(tmp_path / f"a.{ending}", ct(0))
    cut_off(path.with_suffix(".raw") if ending == "mhd" else path)
    assert verdict(path).startswith("unreadable")


@pytest.mark.parametrize("ending", FORMATS)
def test_an_empty_file_is_unreadable(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    path.touch()
    assert verdict(path).startswith("unreadable")


def test_a_damaged_byte_in_a_compressed_file_is_found(tmp_path):
    path = write(tmp_path / "a.nii.gz", ct(0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    assert verdict(path).startswith("unreadable")


@pytest.mark.parametrize("shape", [(15, 24, 28), (20, 15, 28), (20, 24, 15)])
def test_a_side_that_is_too_short(tmp_path, shape):
    path = write(tmp_path / "a.nii.gz", ct(0, shape))
    assert verdict(path) == f"size: {' x '.join(map(str, shape))} voxels, fewer than 16 on a side"
    assert verdict(path, min_size=15) == "fine"


def test_a_single_slice_is_too_short(tmp_path):
    assert verdict(write(tmp_path / "a.nii.gz", ct(0)[0], SPACING[1:])).startswith("size: 24 x 28 voxels")


@pytest.mark.parametrize("millimetres", [0.0, -1.0, float("nan"), float("inf"), 20.5])
def test_absurd_spacings_of_nifti(tmp_path, millimetres):
    path = write(tmp_path / "a.nii", ct(0))
    change_pixdim(path, 3, millimetres)
    assert verdict(path).startswith("spacing: ")


def test_the_largest_spacing_is_a_setting(tmp_path):
    path = write(tmp_path / "a.nii.gz", ct(0), (25.0, 1.0, 1.0))
    assert verdict(path) == "spacing: 25 mm, more than 20"
    assert verdict(path, max_spacing=25) == "fine"


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
        ("nrrd", rb"space directions:[^\n]*\n", b"space directions: none none none\n"),
    ],
)
def test_missing_and_absurd_spacings_of_text_headers(tmp_path, ending, pattern, replacement):
    path = write(tmp_path / f"a.{ending}", ct(0))
    change_header(path, pattern, replacement)
    assert verdict(path).startswith("spacing: ")


def test_dicom_without_pixel_spacing(tmp_path):
    write_dicom(tmp_path, ct(0))
    for path in tmp_path.iterdir():  # hide the tag: 0028,0030 becomes 0028,0033, which says something else
        content = path.read_bytes()
        assert content.count(b"\x28\x00\x30\x00") == 1
        path.write_bytes(content.replace(b"\x28\x00\x30\x00", b"\x28\x00\x33\x00"))
    assert verdict(tmp_path) == "spacing: the file states none"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    array = mr(0)
    array[3, 4, 5] = value
    path = write(tmp_path / "a.nii.gz", array)
    assert verdict(path) == "nonfinite: 1 voxels are NaN or infinite"
    (volume,) = volumes(path)
    assert verdict(path, keep=("nonfinite",)) == "nonfinite: 1 voxels set to the lowest finite value"
    examine(volume, Selection(keep=("nonfinite",)))
    mended = sitk.GetArrayFromImage(volume.images[0])
    assert mended[3, 4, 5] == mr(0).min()
    assert volume.images[0].GetSpacing() == pytest.approx(SPACING[::-1])


def test_numbers_that_are_not_finite_in_a_4d_file(tmp_path):
    arrays = [mr(0), mr(1)]
    arrays[1][3, 4, 5] = np.nan
    first, second = volumes(write_4d(tmp_path / "a.nii.gz", arrays), keep=("nonfinite",))
    examine(first, Selection())
    examine(second, Selection(keep=("nonfinite",)))
    assert (first.notes, second.notes) == ([], ["nonfinite: 1 voxels set to the lowest finite value"])
    alone = write_4d(tmp_path / "b.nii.gz", arrays[1:])
    assert verdict(alone, keep=("nonfinite",)).startswith("nonfinite: 1 voxels set")


@pytest.mark.parametrize("keep", [(), ("nonfinite",)])
def test_nothing_but_nan(tmp_path, keep):
    assert verdict(write(tmp_path / "a.nii.gz", np.full(SHAPE, np.nan, np.float32)), keep=keep).startswith("nonfinite")


def test_constant_volumes(tmp_path):
    assert verdict(write(tmp_path / "a.nii.gz", np.zeros(SHAPE, np.int16))) == "constant: all voxels between 0 and 0"
    nearly = np.zeros(SHAPE, np.int16)
    nearly[0] = 1
    path = write(tmp_path / "b.nii.gz", nearly)
    assert verdict(path) == "fine"
    assert verdict(path, min_range=1).startswith("constant")


@pytest.mark.parametrize("ending", ["nii", "mha"])
@pytest.mark.parametrize(
    ("amount", "keep", "expected"),
    [
        (0.002, (), "direction: made orthonormal"),  # a header written with two digits
        (0.05, (), "direction: axes are not at right angles"),
        (0.05, ("direction",), "direction: made orthonormal"),
    ],
)
def test_directions_that_are_not_orthonormal(tmp_path, ending, amount, keep, expected):
    path = write(tmp_path / f"a.{ending}", ct(0))
    if ending == "nii":
        shear(path, amount)
    else:
        change_header(path, rb"TransformMatrix = 1 0 0 0 1 0 0 0 1", b"TransformMatrix = 1 0 0 0 1 0 %f 0 1" % amount)
    assert verdict(path, keep=keep).startswith(expected)
    if expected == "direction: made orthonormal":
        (volume,) = volumes(path, keep=keep)
        examine(volume, Selection(keep=keep))
        matrix = np.reshape(volume.images[0].GetDirection(), (3, 3))
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-6)
        sitk.WriteImage(volume.images[0], str(tmp_path / "mended.nii.gz"))
        sitk.ReadImage(str(tmp_path / "mended.nii.gz"))  # what nnU-Net does; ITK refuses what is not orthonormal


def test_colour_images_are_no_volumes(tmp_path):
    grey = image(ct(0).astype(np.uint8))
    sitk.WriteImage(sitk.Compose([grey] * 3), str(tmp_path / "a.nrrd"))
    assert verdict(tmp_path / "a.nrrd").startswith("vector")


def test_channels_must_lie_on_one_grid(tmp_path):
    write(tmp_path / "a_0000.nii.gz", mr(0))
    write(tmp_path / "a_0001.nii.gz", mr(1))
    assert verdict(tmp_path) == "fine"
    write(tmp_path / "a_0001.nii.gz", mr(1), (2.0, 1.5, 1.0005))
    assert verdict(tmp_path) == "channels: put on the grid of the first"
    write(tmp_path / "a_0001.nii.gz", mr(1), (2.0, 1.5, 1.5))
    assert verdict(tmp_path) == "channels: not on one grid"
    write(tmp_path / "a_0001.nii.gz", mr(1, (21, 24, 28)))
    assert verdict(tmp_path) == "channels: not on one grid"


def test_the_content_hash_sees_pixels_and_spacing_but_no_format(tmp_path):
    def digest(name, array, spacing=SPACING):
        (volume,) = volumes(write(tmp_path / name, array, spacing))
        return examine(volume, Selection()).digest

    first = digest("a.nii.gz", ct(0))
    assert digest("a.nrrd", ct(0)) == digest("b.mha", ct(0).astype(np.float64)) == first
    other = ct(0)
    other[0, 0, 0] += 1
    assert len({first, digest("c.nrrd", other), digest("d.nrrd", ct(0), (2, 1.5, 1.1))}) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"keep": ("nan",)}, "no check 'nan'; use duplicates"),
        ({"min_size": 0}, "--min-size is 0"),
        ({"max_spacing": 0.0}, "--max-spacing is 0.0"),
        ({"min_range": -1.0}, "--min-range is -1.0"),
    ],
)
def test_settings_that_are_not_legal(wrong, message):
    with pytest.raises(UserError, match=message):
        Selection(**wrong)
