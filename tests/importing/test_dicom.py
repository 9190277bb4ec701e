from __future__ import annotations

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from unlabelled_data import (
    PATIENT_ID,
    PATIENT_NAME,
    SPACING,
    STUDY_UID,
    check_only_volume,
    ct,
    read_all,
    write_dicom,
    write_enhanced_dicom,
)

from nnunetv2_vf.importing.settings import Selection
from nnunetv2_vf.importing.volumes import check_volume


@pytest.mark.parametrize("ending", [".dcm", ""])
def test_each_series_in_a_folder_is_a_volume(tmp_path, ending):
    arrays = [ct(1), ct(2)]
    for number, array in enumerate(arrays, start=1):
        write_dicom(tmp_path, array, number, ending)
    (tmp_path / "notes.txt").write_text("stray")
    found = read_all(tmp_path)
    assert [volume.item for volume in found] == ["series 1 of 2, 20 files", "series 2 of 2, 20 files"]
    for volume, array in zip(found, arrays, strict=True):
        check_volume(volume, Selection())
        assert volume.images[0].GetSpacing() == pytest.approx(SPACING[::-1])
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), array)
    assert found[0].case != found[1].case


def test_only_voxels_and_geometry_of_a_dicom_file_are_kept(tmp_path):
    write_dicom(tmp_path / "series", ct(0))
    write_dicom(tmp_path / "single", ct(0)[:1])
    for volume in read_all(tmp_path, min_size=1):
        check_volume(volume, Selection(min_size=1))
        assert volume.images[0].GetMetaDataKeys() == ()
        for identifier in (PATIENT_NAME, "Doe", PATIENT_ID, STUDY_UID):
            assert identifier not in f"{volume.case} {volume.item}"


def test_the_case_name_of_a_dicom_file_does_not_contain_the_file_name(tmp_path):
    write_dicom(tmp_path, ct(0)[:1])
    file = (tmp_path / "s1_000.dcm").rename(tmp_path / PATIENT_ID)
    (volume,) = read_all(file, min_size=1)
    assert not volume.rejection
    assert volume.case.startswith("dicom_")


def test_a_series_from_a_tilted_scanner_is_rejected_unless_directions_are_kept(tmp_path):
    write_dicom(tmp_path, ct(0), shift=0.5)
    assert check_only_volume(tmp_path).startswith("direction: axes are not at right angles")
    assert check_only_volume(tmp_path, keep=("direction",)).startswith("direction: made orthonormal")


@pytest.mark.parametrize("slopes", [("1", "0.1"), ("0.5",)])
def test_slices_that_are_rescaled_to_fractions_keep_their_fractions(tmp_path, slopes):
    write_dicom(tmp_path, ct(0), tags={"0008|0060": "PT"}, slopes=slopes)
    (volume,) = read_all(tmp_path)
    stored = [sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0] for path in sorted(tmp_path.iterdir())]
    read = sitk.GetArrayFromImage(volume.images[0])
    np.testing.assert_allclose(read, np.stack(stored), rtol=1e-6)
    assert np.any(read != np.round(read))


def test_two_phases_at_the_same_positions_are_always_rejected(tmp_path):
    write_dicom(tmp_path / "1", ct(0))
    write_dicom(tmp_path / "2", ct(1))
    for path in (tmp_path / "2").iterdir():
        path.rename(tmp_path / "1" / f"second_{path.name}")
    for keep in ((), ("slices",)):
        assert check_only_volume(tmp_path / "1", keep=keep).startswith("slices: missing, doubled or uneven")


def test_whole_rescale_slopes_that_differ_do_not_overflow(tmp_path):
    write_dicom(tmp_path, ct(0) * 4, slopes=("1", "20"))
    (volume,) = read_all(tmp_path)
    stored = [sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0] for path in sorted(tmp_path.iterdir())]
    np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), np.stack(stored))
    assert np.stack(stored).min() < np.iinfo(np.int16).min


POSITIONS = [2.0 * number for number in range(20)]


def test_an_enhanced_file_with_evenly_spaced_frames_is_a_volume(tmp_path):
    write_enhanced_dicom(tmp_path / "scan.dcm", ct(0), POSITIONS)
    for path in (tmp_path, tmp_path / "scan.dcm"):
        (volume,) = read_all(path)
        assert not volume.rejection
        assert volume.images[0].GetSpacing() == pytest.approx(SPACING[::-1])
        np.testing.assert_array_equal(sitk.GetArrayFromImage(volume.images[0]), ct(0))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": POSITIONS[:10] * 2}, "slices: missing, doubled or uneven"),
        ({"positions": [z for z in POSITIONS for _ in range(2)][:20]}, "slices: missing, doubled or uneven"),
        ({"positions": [*POSITIONS[:-1], 60]}, "slices: missing, doubled or uneven"),
        ({"positions": POSITIONS[::2] + POSITIONS[1::2]}, "slices: missing, doubled or uneven"),
        ({"slopes": (1, 3)}, "slices: the frames have different rescale slopes"),
        ({"states_positions": False}, "slices: the file does not state the positions of its 20 frames"),
    ],
)
def test_an_enhanced_file_with_other_frames_is_rejected(tmp_path, changes, reason):
    write_enhanced_dicom(tmp_path / "scan.dcm", ct(0), **{"positions": POSITIONS, **changes})
    for path in (tmp_path, tmp_path / "scan.dcm"):
        (volume,) = read_all(path)
        assert volume.rejection.startswith(reason)


def test_an_enhanced_file_of_a_tilted_scanner_is_rejected_unless_directions_are_kept(tmp_path):
    write_enhanced_dicom(tmp_path / "scan.dcm", ct(0), POSITIONS, shift=0.5)
    assert check_only_volume(tmp_path).startswith("direction: axes are not at right angles")
    assert check_only_volume(tmp_path, keep=("direction",)).startswith("direction: made orthonormal")


@pytest.mark.parametrize(("without", "reason"), [(20, "20 of 20"), (1, "1 of 20")])
def test_a_series_whose_slices_state_no_position_is_rejected(tmp_path, without, reason):
    write_dicom(tmp_path, ct(0))
    for path in sorted(tmp_path.iterdir())[:without]:
        content = pydicom.dcmread(path)
        del content.ImagePositionPatient
        content.save_as(path)
    assert check_only_volume(tmp_path) == f"slices: {reason} files state no position"


def test_slices_named_like_voxel_files_are_reported_once(tmp_path):
    write_dicom(tmp_path, ct(0), ending=".img")
    assert check_only_volume(tmp_path) == "fine"


def test_hidden_files_and_folders_beside_a_series_are_ignored(tmp_path):
    write_dicom(tmp_path, ct(0))
    (tmp_path / "._s1_000.dcm").write_bytes(b"AppleDouble")
    (tmp_path / "folder.dcm").mkdir()
    assert check_only_volume(tmp_path) == "fine"


@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_dicom_file_is_reported_beside_its_series(tmp_path, number):
    for series in range(number):
        write_dicom(tmp_path, ct(series), series + 1)
    (tmp_path / "bad.dcm").write_bytes(b"no DICOM")
    *series, others = read_all(tmp_path)
    assert [volume.rejection for volume in series] == [""] * number
    assert others.rejection == "unreadable: 1 DICOM files belong to no series"


def test_a_series_with_an_illegal_number_does_not_hide_the_other_series(tmp_path):
    write_dicom(tmp_path, ct(0))
    write_dicom(tmp_path, ct(1), series=2, slopes=("1", "xxxx"))
    volumes = read_all(tmp_path)
    assert [bool(volume.rejection) for volume in volumes] == [False, True]
    assert volumes[1].rejection.startswith("unreadable: ")


def test_files_that_gdcm_cannot_list_do_not_hide_the_series_beside_them(tmp_path):
    write_dicom(tmp_path, ct(0))
    write_dicom(tmp_path, ct(1), series=2, tags={"0008|0060": "RTDOSE"})  # lacks tags that a dose must have
    series, others = read_all(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(series.images[0]), ct(0))
    assert others.rejection == "unreadable: 20 DICOM files belong to no series"


@pytest.mark.parametrize(
    ("changes", "kept", "reason"),
    [
        ({"skipped": (5, 6)}, "", "slices: missing, doubled or uneven, 2 to 6 mm apart"),
        ({"skipped": (5, 6)}, "slices", "slices: 2 to 6 mm apart, treated as even"),
        ({"tags": {"0008|0060": "SEG"}}, "", "modality: SEG is not a scan"),
    ],
)
def test_uneven_series_and_other_modalities_are_rejected(tmp_path, changes, kept, reason):
    write_dicom(tmp_path, ct(0), **changes)
    assert check_only_volume(tmp_path, keep=tuple(filter(None, [kept]))) == reason


def test_a_series_without_pixel_spacing_is_rejected(tmp_path):
    write_dicom(tmp_path, ct(0))
    for path in tmp_path.iterdir():  # rename the tag 0028,0030 to 0028,0033, which has another meaning
        content = path.read_bytes()
        assert content.count(b"\x28\x00\x30\x00") == 1
        path.write_bytes(content.replace(b"\x28\x00\x30\x00", b"\x28\x00\x33\x00"))
    assert check_only_volume(tmp_path) == "spacing: the file states none"


@pytest.mark.parametrize("name", ["zz.dcm", "notes", ".#lock"])
@pytest.mark.parametrize("num_series", [1, 2])
def test_a_link_to_nothing_hides_no_slice(tmp_path, name, num_series):
    for number in range(num_series):
        write_dicom(tmp_path, ct(number), number + 1)
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    *series, other = [*read_all(tmp_path), None][: num_series + 1]
    assert [volume.images[0].GetSize() for volume in series] == [ct(0).shape[::-1]] * num_series
    if name == "zz.dcm":
        assert other.rejection == "unreadable: 1 DICOM files are links to nothing"
    else:
        assert other is None


@pytest.mark.parametrize("uids", [("1.2-3_4 x", "1.2-34x"), ("A#1", "A#2")])
def test_series_whose_uids_have_illegal_characters_are_volumes(tmp_path, uids):
    for number, uid in enumerate(uids):
        write_dicom(tmp_path, ct(number), number + 1, tags={"0020|000e": uid})
    volumes = read_all(tmp_path)
    assert [volume.rejection for volume in volumes] == ["", ""]
    assert volumes[0].case != volumes[1].case


@pytest.mark.parametrize("ending", ["", ".IMG0001"])
def test_a_link_to_nothing_that_is_named_like_the_slices_is_reported(tmp_path, ending):
    write_dicom(tmp_path, ct(0))
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        path.rename(tmp_path / f"1.2.840.{number}{ending}")
    (tmp_path / f"1.2.840.99{ending}").symlink_to(tmp_path / "nowhere")
    series, other = read_all(tmp_path)
    assert not series.rejection
    assert other.rejection == "unreadable: 1 DICOM files are links to nothing"


def test_slices_without_a_series_uid_are_one_series(tmp_path):
    write_dicom(tmp_path, ct(0))
    for path in tmp_path.iterdir():
        content = pydicom.dcmread(path)
        del content.SeriesInstanceUID
        content.save_as(path)
    assert check_only_volume(tmp_path) == "fine"


def test_a_series_with_a_pixel_spacing_of_zero_is_rejected(tmp_path):
    write_dicom(tmp_path, ct(0))
    for path in tmp_path.iterdir():
        content = pydicom.dcmread(path)
        content.PixelSpacing = ["0", "1"]
        content.save_as(path)
    assert check_only_volume(tmp_path) == r"spacing: the file states 0\1"


def test_a_series_whose_slices_are_not_parallel_is_rejected(tmp_path):
    write_dicom(tmp_path, ct(0))
    for path in sorted(tmp_path.iterdir())[10:]:
        content = pydicom.dcmread(path)
        content.ImageOrientationPatient = [0.98, 0.199, 0, -0.199, 0.98, 0]
        content.save_as(path)
    assert check_only_volume(tmp_path) == "slices: their orientations differ"


def test_an_unexpected_error_in_one_series_does_not_hide_the_other_series(tmp_path):
    write_enhanced_dicom(tmp_path / "a.dcm", ct(0), POSITIONS)
    content = pydicom.dcmread(tmp_path / "a.dcm")
    content.PerFrameFunctionalGroupsSequence[3].PixelValueTransformationSequence[0].RescaleSlope = [1, 2]
    content.save_as(tmp_path / "a.dcm")
    write_dicom(tmp_path, ct(1), series=9)
    rejections = sorted(volume.rejection for volume in read_all(tmp_path))
    assert rejections[0] == ""
    assert rejections[1].startswith("error: TypeError: ")
