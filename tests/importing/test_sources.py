from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from unlabelled_data import ct, write_dicom, write_volume

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.sources import FoundSources, Source, case_name, find_sources, is_in_part


def create_files(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def find(*paths: Path, excluded: str | Path = "/nowhere") -> FoundSources:
    return find_sources(paths, Path(excluded))


def file_names(sources: list[Source]) -> list[list[str]]:
    return [[Path(path).name for path in source.paths] for source in sources]


def test_volumes_of_every_format_are_found_in_all_folders_sorted_by_path(tmp_path):
    create_files(tmp_path / "b" / "deep", "3.NII.GZ", "4.mha")
    create_files(tmp_path / "a", "1.nii", "2.nrrd")
    create_files(tmp_path, "5.mhd", "notes.txt", "5.raw", "table.csv", ".hidden.nii.gz")
    result = find(tmp_path)
    assert file_names(result.sources) == [["5.mhd"], ["1.nii"], ["2.nrrd"], ["3.NII.GZ"], ["4.mha"]]
    assert dict(result.ignored) == {".txt": 1, ".raw": 1, ".csv": 1, "hidden": 1}


def test_a_path_may_be_a_file_and_no_source_is_found_twice(tmp_path):
    create_files(tmp_path, "1.nii.gz", "2.nii.gz")
    assert file_names(find(tmp_path / "2.nii.gz").sources) == [["2.nii.gz"]]
    assert len(find(tmp_path, tmp_path / "2.nii.gz", tmp_path).sources) == 2


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
    assert result.ignored["labelsTr/labelsTs"] == 1


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


def test_the_stem_excludes_the_number_of_the_first_channel():
    assert Source(("/x/liver_0000.nii.gz",), "").stem == "liver"
    assert Source(("/x/scan_2019.nii.gz",), "").stem == "scan_2019"


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
    before = find(tmp_path).sources
    assert find(tmp_path).sources == before
    write_volume(path, ct(0, (30, 30, 30)))
    (tmp_path / "2.raw").write_bytes(b"other")
    write_dicom(tmp_path / "d", ct(1), series=2)
    assert all(a.stamp != b.stamp for a, b in zip(find(tmp_path).sources, before, strict=True))


def test_errors_name_the_given_path(tmp_path):
    with pytest.raises(UserError, match=r"gone does not exist"):
        find(tmp_path / "gone")
    create_files(tmp_path, "notes.txt")
    with pytest.raises(UserError, match=r"no volumes in .*\.nrrd.*1 other files"):
        find(tmp_path)


@pytest.mark.parametrize("stem", ["a", "Ünï çode", "a b/../c", "x" * 300, "", "a_0000", "腹部"])
def test_case_names_are_legal_and_stable_and_unique(stem):
    name = case_name(stem, "/data/1")
    assert re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9_-]{0,59}", name)
    assert not re.search(r"_\d{4}$", name)
    assert name == case_name(stem, "/data/1") != case_name(stem, "/data/2")


def test_every_source_is_in_exactly_one_part_and_parts_have_similar_sizes():
    sources = [Source((f"/data/{i}.nii.gz",), "") for i in range(1000)]
    parts = [[source for source in sources if is_in_part(source, part, 4)] for part in range(4)]
    assert sorted(source.key for part in parts for source in part) == sorted(source.key for source in sources)
    assert all(200 < len(part) < 300 for part in parts)
