"""Which files and folders become sources."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from unlabelled_data import check_only_volume, ct, write_dicom, write_volume

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.search import FoundSources, find_sources
from nnunetv2_vf.importing.sources import Source


def create_files(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def find(*paths: Path, excluded: str | Path = "/nowhere", **options) -> FoundSources:
    return find_sources(paths, Path(excluded), **options)


def file_names(sources: list[Source]) -> list[list[str]]:
    return [[Path(path).name for path in source.paths] for source in sources]


def test_volumes_of_every_format_are_found_in_all_folders_sorted_by_path(tmp_path):
    create_files(tmp_path / "b" / "deep", "3.NII.GZ", "4.mha")
    create_files(tmp_path / "a", "1.nii", "2.nrrd")
    create_files(tmp_path, "5.mhd", "notes.txt", "5.raw", "table.csv", ".hidden.nii.gz")
    create_files(tmp_path, "6.nhdr", "6.raw.gz", "7.HDR", "7.IMG", "8.hdr.gz", "8.img.gz", "9.raw")
    result = find(tmp_path)
    assert file_names(result.sources) == [
        *(["5.mhd"], ["6.nhdr"], ["7.HDR"], ["8.hdr.gz"]),
        *(["1.nii"], ["2.nrrd"], ["3.NII.GZ"], ["4.mha"]),
    ]
    assert not any(source.rejection for source in result.sources)
    assert dict(result.ignored) == {".txt": 1, ".raw": 1, ".csv": 1, "hidden": 1}


@pytest.mark.parametrize("name", ["1.mgz", "1.npy", "1.nii.zst", "1.HEAD", "1.img", "1.mgh.gz", "1.tif"])
def test_a_volume_in_a_format_that_is_not_read_is_a_rejected_source(tmp_path, name):
    create_files(tmp_path, name, "2.nii.gz")
    source, valid = find(tmp_path).sources
    assert source.rejection.startswith(f"format: .{name.partition('.')[2].lower()} ")
    assert not valid.rejection


def test_a_volume_in_such_a_format_beside_dicom_files_is_a_source_too(tmp_path):
    write_dicom(tmp_path, ct(0))
    create_files(tmp_path, "brain.mgz", "v.nii.zst")
    rejections = {Path(source.key).name: source.rejection for source in find(tmp_path).sources}
    assert rejections.pop(tmp_path.name) == ""
    assert [rejections[name][:7] for name in sorted(rejections)] == ["format:", "format:"]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_names_that_are_not_utf_8_are_rejected_sources(tmp_path):
    for name in (b"M\xfcller.nrrd", b"B\xf6hm/a.nii.gz", b"K\xf6nig/slice.dcm"):
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0" * 128 + b"DICM")
    create_files(tmp_path, "fine.nii.gz")
    rejections = [source.rejection for source in find(tmp_path).sources]
    assert sorted(rejections) == ["", *["name: not UTF-8; rename the file or folder"] * 3]


def test_a_given_dicom_file_is_a_source_without_its_folder(tmp_path):
    write_dicom(tmp_path, ct(0))
    given = sorted(tmp_path.iterdir())[:2]
    assert [source.key for source in find(*given).sources] == [str(path) for path in given]


def test_a_path_may_be_a_file_and_no_source_is_found_twice(tmp_path):
    create_files(tmp_path, "1.nii.gz", "2.nii.gz")
    assert file_names(find(tmp_path / "2.nii.gz").sources) == [["2.nii.gz"]]
    assert len(find(tmp_path, tmp_path / "2.nii.gz", tmp_path).sources) == 2


@pytest.mark.parametrize(("voxels", "header"), [("a.img", "a.hdr"), ("a.img.gz", "a.hdr.gz"), ("A.IMG", "A.HDR")])
def test_either_file_of_a_pair_may_be_given(tmp_path, voxels, header):
    create_files(tmp_path, voxels, header)
    for given in ([tmp_path / voxels], [tmp_path / voxels, tmp_path / header]):
        assert file_names(find(*given).sources) == [[header]]


def test_given_files_are_grouped_into_cases_like_those_of_a_folder(tmp_path):
    create_files(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz")
    sources = find(*sorted(tmp_path.iterdir())).sources
    assert file_names(sources) == [["a_0000.nii.gz", "a_0001.nii.gz"], ["b_0000.nii.gz", "b_0001.nii.gz"]]


def test_one_case_with_an_additional_channel_does_not_reject_the_others(tmp_path):
    create_files(tmp_path, *(f"{case}_{channel:04d}.nii.gz" for case in "abc" for channel in range(2)))
    create_files(tmp_path, "a_0002.nii.gz")
    assert not any(source.rejection for source in find(tmp_path).sources)


def test_a_link_to_itself_does_not_hide_the_files_beside_it(tmp_path):
    create_files(tmp_path, "1.nii.gz")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert file_names(find(tmp_path).sources) == [["1.nii.gz"]]


def test_links_are_followed_and_circles_of_links_end(tmp_path):
    create_files(tmp_path / "elsewhere", "1.nii.gz")
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "circle").symlink_to(data)
    (data / "2.nii.gz").symlink_to(tmp_path / "elsewhere" / "1.nii.gz")
    assert file_names(find(data).sources) == [["2.nii.gz"], ["1.nii.gz"]]


def test_hidden_folders_are_not_searched(tmp_path):
    create_files(tmp_path / ".snapshot", "1.nii.gz")
    create_files(tmp_path, "1.nii.gz")
    assert [source.key for source in find(tmp_path).sources] == [str(tmp_path / "1.nii.gz")]


def test_a_broken_link_is_a_rejected_source(tmp_path):
    (tmp_path / "1.nii.gz").symlink_to(tmp_path / "gone")
    (source,) = find(tmp_path).sources
    assert source.rejection.startswith("unreadable")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may read every folder")
def test_a_folder_without_read_permission_is_a_rejected_source(tmp_path):
    create_files(tmp_path / "closed", "1.nii.gz")
    (tmp_path / "closed").chmod(0)
    (source,) = find(tmp_path).sources
    (tmp_path / "closed").chmod(0o700)
    assert source.rejection.startswith("unreadable")


def test_labels_and_the_excluded_folder_are_not_searched(tmp_path):
    create_files(tmp_path / "Dataset004_X" / "imagesTr", "1_0000.nii.gz")
    create_files(tmp_path / "Dataset004_X" / "labelsTr", "1.nii.gz")
    create_files(tmp_path / "Dataset100_Y" / "imagesTr", "2_0000.nii.gz")
    result = find(tmp_path, excluded=tmp_path / "Dataset100_Y")
    assert file_names(result.sources) == [["1_0000.nii.gz"]]
    assert result.num_labels == 1


def test_files_named_like_nnunet_channels_are_grouped_into_cases(tmp_path):
    create_files(tmp_path / "two", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz")
    sources = find(tmp_path / "two").sources
    assert file_names(sources) == [
        ["a_0000.nii.gz", "a_0001.nii.gz"],
        ["b_0000.nii.gz", "b_0001.nii.gz"],
        ["c_0000.nii.gz"],
    ]
    assert [source.rejection for source in sources] == ["", "", "channels: no _0001"]


@pytest.mark.parametrize(
    "files",
    [
        ("scan_2019.nii.gz", "scan_2020.nii.gz"),  # years
        ("a_0000.nii.gz", "b_0000.nii.gz"),
        ("a_0000.nii.gz", "a_0001.nii.gz", "other.nii.gz"),
        ("a_0001.nii.gz", "a_0002.nii.gz"),
    ],
)
def test_in_any_other_folder_every_file_is_a_case(tmp_path, files):
    create_files(tmp_path, *files)
    assert file_names(find(tmp_path).sources) == [[name] for name in sorted(files)]


@pytest.mark.parametrize("ending", [".dcm", ".IMA", "", ".17"])
def test_a_folder_of_dicom_files_is_one_source(tmp_path, ending):
    write_dicom(tmp_path / "d", ct(0), ending=ending)
    create_files(tmp_path / "d", "DICOMDIR", "notes.txt")
    create_files(tmp_path / "no", "DICOMDIR", "binary")
    result = find(tmp_path)
    assert [source.key for source in result.sources] == [str(tmp_path / "d")]


def test_a_changed_source_has_a_different_stamp(tmp_path):
    path = write_volume(tmp_path / "1.nii.gz", ct(0))
    write_dicom(tmp_path / "d", ct(0))
    write_volume(tmp_path / "2.mhd", ct(0))
    write_volume(tmp_path / "3.nhdr", ct(0))
    before = find(tmp_path).sources
    assert find(tmp_path).sources == before
    write_volume(path, ct(0, (30, 30, 30)))
    (tmp_path / "2.raw").write_bytes(b"other")
    (tmp_path / "3.raw").write_bytes(b"other")
    write_dicom(tmp_path / "d", ct(1), series=2)
    assert all(a.stamp != b.stamp for a, b in zip(find(tmp_path).sources, before, strict=True))


def test_errors_name_the_given_path(tmp_path):
    with pytest.raises(UserError, match=r"gone does not exist"):
        find(tmp_path / "gone")
    create_files(tmp_path, "notes.txt")
    with pytest.raises(UserError, match=r"no volumes in .*\.nrrd.*1 other files"):
        find(tmp_path)


# ---------------------------------------------------------------- the selection


def test_a_selection_names_parts_of_the_path_below_the_given_folder(tmp_path):
    root = tmp_path / "T1w"
    create_files(root / "sub-01" / "anat", "sub-01_T1w.nii.gz", "sub-01_T2w.nii.gz", "sub-01_FLAIR.nii.gz")
    result = find(root, select=["T1w"])
    assert file_names(result.sources) == [["sub-01_T1w.nii.gz"]]
    assert result.num_not_selected == 2
    assert len(find(root, select=["T?w"]).sources) == 2
    assert len(find(root, select=["sub-01/*_T1w.nii.gz", "FLAIR"]).sources) == 2
    assert file_names(find(*(root / "sub-01" / "anat").iterdir(), select=["T2w"]).sources) == [["sub-01_T2w.nii.gz"]]


def test_a_selection_names_folders_of_dicom_files(tmp_path):
    write_dicom(tmp_path / "patient" / "T1", ct(0))
    write_dicom(tmp_path / "patient" / "T2", ct(1), series=2)
    assert [source.key for source in find(tmp_path, select=["T1"]).sources] == [str(tmp_path / "patient" / "T1")]


def test_a_selection_without_volumes_is_refused(tmp_path):
    create_files(tmp_path, "1.nii.gz", "2.nii.gz")
    with pytest.raises(UserError, match=r"--select T1w,T2w matches none of 2 volumes in .*; legal: parts of their"):
        find(tmp_path, select=["T1w", "T2w"])


def test_numbered_scans_are_not_the_channels_of_one_case(tmp_path):
    create_files(tmp_path, *(f"scan_{number:04d}.nii.gz" for number in range(20)))
    assert [len(source.paths) for source in find(tmp_path).sources] == [1] * 20
    create_files(tmp_path, *(f"other_{number:04d}.nii.gz" for number in range(20)))
    assert [len(source.paths) for source in find(tmp_path).sources] == [20] * 2


def test_no_file_is_dropped_if_names_differ_only_in_the_case_of_their_ending(tmp_path):
    create_files(tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "a_0000.NII.GZ")
    if len(list(tmp_path.iterdir())) < 3:
        pytest.skip("this file system ignores the case of names")
    assert sum(len(source.paths) for source in find(tmp_path).sources) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="other systems have no named pipes")
def test_a_named_pipe_is_ignored(tmp_path):
    create_files(tmp_path, "1.nii.gz")
    write_dicom(tmp_path / "series", ct(0))
    for folder in (tmp_path, tmp_path / "series"):
        for name in ("pipe", "pipe.dcm", "pipe.nii.gz"):
            os.mkfifo(folder / name)
    result = find(tmp_path)
    assert [Path(source.key).name for source in result.sources] == ["1.nii.gz", "series"]
    assert result.ignored["special"] == 6
    assert check_only_volume(tmp_path / "series") == "fine"
