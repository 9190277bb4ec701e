from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from unlabelled_data import ct, write, write_dicom

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.sources import Source, case_name, find_sources, in_part


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")


def found(*paths, leave_out="/nowhere"):
    return find_sources([Path(p) for p in paths], Path(leave_out))


def names(sources):
    return [[Path(path).name for path in source.paths] for source in sources]


def test_volumes_of_every_ending_are_found_in_all_folders_in_the_order_of_their_paths(tmp_path):
    touch(tmp_path / "b" / "deep", "3.NII.GZ", "4.mha")
    touch(tmp_path / "a", "1.nii", "2.nrrd")
    touch(tmp_path, "5.mhd", "notes.txt", "5.raw", "table.csv", ".hidden.nii.gz")
    result = found(tmp_path)
    assert names(result.sources) == [["5.mhd"], ["1.nii"], ["2.nrrd"], ["3.NII.GZ"], ["4.mha"]]
    assert dict(+result.ignored) == {".txt": 1, ".raw": 1, ".csv": 1, "hidden": 1}


def test_a_file_may_be_given_and_nothing_is_found_twice(tmp_path):
    touch(tmp_path, "1.nii.gz", "2.nii.gz")
    assert names(found(tmp_path / "2.nii.gz").sources) == [["2.nii.gz"]]
    assert len(found(tmp_path, tmp_path / "2.nii.gz", tmp_path).sources) == 2


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path / "elsewhere", "1.nii.gz")
    data = tmp_path / "data"
    data.mkdir()
    (data / "linked").symlink_to(tmp_path / "elsewhere")
    (data / "circle").symlink_to(data)
    (data / "2.nii.gz").symlink_to(tmp_path / "elsewhere" / "1.nii.gz")
    assert names(found(data).sources) == [["2.nii.gz"], ["1.nii.gz"]]


def test_hidden_folders_are_not_entered(tmp_path):
    touch(tmp_path / ".snapshot", "1.nii.gz")
    touch(tmp_path, "1.nii.gz")
    assert [source.key for source in found(tmp_path).sources] == [str(tmp_path / "1.nii.gz")]


def test_a_link_to_nowhere_is_a_source_with_a_problem(tmp_path):
    (tmp_path / "1.nii.gz").symlink_to(tmp_path / "gone")
    (source,) = found(tmp_path).sources
    assert source.problem.startswith("unreadable")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="whoever runs this may read everything")
def test_a_folder_without_permission_is_a_source_with_a_problem(tmp_path):
    touch(tmp_path / "closed", "1.nii.gz")
    (tmp_path / "closed").chmod(0)
    (source,) = found(tmp_path).sources
    (tmp_path / "closed").chmod(0o700)
    assert source.problem.startswith("unreadable")


def test_segmentations_and_the_dataset_itself_are_left_out(tmp_path):
    touch(tmp_path / "Dataset004_X" / "imagesTr", "1_0000.nii.gz")
    touch(tmp_path / "Dataset004_X" / "labelsTr", "1.nii.gz")
    touch(tmp_path / "Dataset100_Y" / "imagesTr", "2_0000.nii.gz")
    result = found(tmp_path, leave_out=tmp_path / "Dataset100_Y")
    assert names(result.sources) == [["1_0000.nii.gz"]]
    assert result.ignored["labelsTr/labelsTs"] == 1


def test_channels_belong_together_where_the_folder_follows_nnunet(tmp_path):
    touch(tmp_path / "two", "a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz", "c_0000.nii.gz")
    sources = found(tmp_path / "two").sources
    assert names(sources) == [["a_0000.nii.gz", "a_0001.nii.gz"], ["b_0000.nii.gz", "b_0001.nii.gz"], ["c_0000.nii.gz"]]
    assert [source.problem for source in sources] == ["", "", "channels: no _0001"]


@pytest.mark.parametrize(
    "files",
    [
        ("scan_2019.nii.gz", "scan_2020.nii.gz"),  # years
        ("a_0000.nii.gz", "b_0000.nii.gz"),
        ("a_0000.nii.gz", "a_0001.nii.gz", "other.nii.gz"),
        ("a_0001.nii.gz", "a_0002.nii.gz"),
    ],
)
def test_other_folders_hold_one_volume_a_file(tmp_path, files):
    touch(tmp_path, *files)
    assert names(found(tmp_path).sources) == [[name] for name in sorted(files)]


def test_the_channels_number_is_no_part_of_the_stem():
    assert Source(("/x/liver_0000.nii.gz",), "").stem == "liver"
    assert Source(("/x/scan_2019.nii.gz",), "").stem == "scan_2019"


@pytest.mark.parametrize("ending", [".dcm", ".IMA", "", ".17"])
def test_a_folder_of_dicom_files_is_one_source(tmp_path, ending):
    write_dicom(tmp_path / "d", ct(0), ending=ending)
    touch(tmp_path / "d", "DICOMDIR", "notes.txt")
    touch(tmp_path / "no", "DICOMDIR", "binary")
    result = found(tmp_path)
    assert [source.key for source in result.sources] == [str(tmp_path / "d")]


def test_a_source_that_changes_has_another_stamp(tmp_path):
    path = write(tmp_path / "1.nii.gz", ct(0))
    write_dicom(tmp_path / "d", ct(0))
    write(tmp_path / "2.mhd", ct(0))
    before = found(tmp_path).sources
    assert found(tmp_path).sources == before
    write(path, ct(0, (30, 30, 30)))
    (tmp_path / "2.raw").write_bytes(b"other")
    write_dicom(tmp_path / "d", ct(1), series=2)
    assert all(a.stamp != b.stamp for a, b in zip(found(tmp_path).sources, before, strict=True))


def test_errors_name_what_was_given(tmp_path):
    with pytest.raises(UserError, match=r"gone does not exist"):
        found(tmp_path / "gone")
    touch(tmp_path, "notes.txt")
    with pytest.raises(UserError, match=r"no volumes in .*\.nrrd.*1 other files"):
        found(tmp_path)


@pytest.mark.parametrize("stem", ["a", "Ünï çode", "a b/../c", "x" * 300, "", "a_0000", "腹部"])
def test_case_names_are_legal_stable_and_unique(stem):
    name = case_name(stem, "/data/1")
    assert re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9_-]{0,59}", name)
    assert not re.search(r"_\d{4}$", name)
    assert name == case_name(stem, "/data/1") != case_name(stem, "/data/2")


def test_every_source_is_in_one_part_and_parts_are_about_equal():
    sources = [Source((f"/data/{i}.nii.gz",), "") for i in range(1000)]
    parts = [[s for s in sources if in_part(s, part, 4)] for part in range(4)]
    assert sorted(source.key for part in parts for source in part) == sorted(source.key for source in sources)
    assert all(200 < len(part) < 300 for part in parts)
