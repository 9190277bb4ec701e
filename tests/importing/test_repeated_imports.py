"""A second import into the same dataset: more sources, changed sources, other settings, missing files."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from unlabelled_data import (
    DATASET,
    assert_consistent,
    ct,
    image_times,
    import_error,
    mr,
    read_description,
    read_outcomes,
    read_report,
    read_user_files,
    run_import,
    start_import,
    write_dicom,
    write_rejected_volumes,
    write_volume,
)


def test_a_second_run_changes_nothing(dataset, data):
    write_rejected_volumes(data)
    run_import(data)
    files, times = read_user_files(dataset), image_times(dataset)
    run_import(data)
    assert read_user_files(dataset) == files
    assert image_times(dataset) == times


def test_more_sources_are_added_and_existing_cases_stay(dataset, data):
    for number in range(3):
        write_volume(data / "first" / f"{number}.nii.gz", ct(number))
    run_import(data / "first")
    before = read_user_files(dataset)
    write_volume(data / "second" / "3.nii.gz", ct(3))
    write_volume(data / "a_before" / "same.nii.gz", ct(0))  # is first by path, but the dataset already has its content
    run_import(data)
    assert_consistent(dataset)
    after = read_user_files(dataset)
    assert all(after[name] == before[name] for name in before if name.startswith(("images", "labels")))
    assert len(read_description(dataset)["dataset"]) == 4
    assert read_outcomes(dataset)["same.nii.gz"] == "duplicate"


def test_a_changed_source_is_imported_again_and_the_case_of_a_removed_source_stays(dataset, data):
    changed, removed = write_volume(data / "1.nii.gz", ct(1)), write_volume(data / "2.nii.gz", ct(2))
    run_import(data)
    write_volume(changed, ct(3, (22, 24, 28)))
    removed.unlink()
    run_import(data)
    assert_consistent(dataset)
    shapes = {Path(row["source"]).name: row["shape"] for row in read_report(dataset)}
    assert shapes == {"1.nii.gz": "22x24x28", "2.nii.gz": "20x24x28"}
    write_volume(changed, ct(3, (5, 24, 28)))
    run_import(data)
    assert_consistent(dataset)
    assert read_outcomes(dataset) == {"1.nii.gz": "size", "2.nii.gz": "accepted"}


def test_a_duplicate_of_a_source_that_has_changed_is_imported(dataset, data):
    changed = write_volume(data / "a.nii.gz", ct(1))
    write_volume(data / "b.nii.gz", ct(1))
    run_import(data)
    assert read_outcomes(dataset) == {"a.nii.gz": "accepted", "b.nii.gz": "duplicate"}
    write_volume(changed, ct(2, (22, 24, 28)))
    run_import(data)
    assert_consistent(dataset)
    assert read_outcomes(dataset) == {"a.nii.gz": "accepted", "b.nii.gz": "accepted"}


def test_a_refused_import_fixes_neither_the_file_ending_nor_the_number_of_channels(dataset, data):
    for channel, make in enumerate((ct, mr)):
        write_volume(data / "two" / f"a_000{channel}.nii.gz", make(0))
        write_volume(data / "two" / f"b_000{channel}.nii.gz", mr(1) if channel else mr(2))
    import_error(data / "two")
    write_volume(data / "one" / "c.nii.gz", ct(3))
    run_import(data / "one", "--file-ending", ".nrrd")
    assert_consistent(dataset)
    assert read_outcomes(dataset) == {"c.nii.gz": "accepted"}


def test_an_import_without_usable_volumes_leaves_the_dataset_unchanged(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    before = read_user_files(dataset)
    assert "none of 1 volumes can be used: 1 size" in import_error(data, "--min-size", 40)
    assert before.items() <= read_user_files(dataset).items()


def test_removed_files_of_the_dataset_are_imported_again(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    write_volume(data / "2.nii.gz", ct(2))
    run_import(data)
    before = read_user_files(dataset)
    next((dataset / "imagesTr").iterdir()).unlink()
    run_import(data)
    assert read_user_files(dataset) == before


def test_an_image_that_a_power_failure_has_emptied_is_imported_again(dataset, data):
    write_volume(data / "a.nii.gz", ct(0))
    run_import(data)
    (image,) = (dataset / "imagesTr").iterdir()
    whole = image.read_bytes()
    image.write_bytes(b"")
    run_import(data)
    assert image.read_bytes() == whole


def test_an_unreadable_source_is_tried_again(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    path = write_volume(data / "2.nii.gz", ct(2))
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content[:-20] + bytes(20))  # size and time stay the same, as on a failing disk
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    run_import(data)
    assert read_outcomes(dataset)["2.nii.gz"] == "unreadable"
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    run_import(data)
    assert read_outcomes(dataset)["2.nii.gz"] == "accepted"


def test_sources_are_imported_again_with_other_settings(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    write_volume(data / "2.nii.gz", ct(2, (12, 24, 28)))
    run_import(data)
    assert read_outcomes(dataset)["2.nii.gz"] == "size"
    run_import(data, "--min-size", 8)
    assert read_outcomes(dataset)["2.nii.gz"] == "accepted"
    run_import(data)
    assert_consistent(dataset)
    assert read_outcomes(dataset)["2.nii.gz"] == "size"


def test_the_next_command_has_clean_only_if_the_dataset_changed_after_its_fingerprint(dataset, data, capsys):
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    fingerprint = dataset.parent.parent / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json"
    fingerprint.parent.mkdir()
    fingerprint.touch()
    run_import(data)
    output = capsys.readouterr().out
    assert "--clean" not in output
    assert "for PCT-Net: nnUNetv2_vf plan -d 100 " in output
    time.sleep(0.01)  # the fingerprint becomes older than the dataset
    write_volume(data / "2.nii.gz", ct(2))
    run_import(data)
    output = capsys.readouterr().out
    assert "nnUNetv2_plan_and_preprocess -d 100 -c 3d_fullres --clean" in output
    assert "for PCT-Net: nnUNetv2_extract_fingerprint -d 100 --clean; nnUNetv2_vf plan -d 100 " in output


def test_a_changed_volume_makes_the_fingerprint_old(dataset, data, capsys):
    write_volume(data / "a.nii.gz", ct(0))
    run_import(data)
    fingerprint = dataset.parent.parent / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json"
    fingerprint.parent.mkdir(parents=True)
    fingerprint.write_text("{}")
    time.sleep(0.01)
    write_volume(data / "a.nii.gz", ct(1))
    capsys.readouterr()
    run_import(data)
    assert "-c 3d_fullres --clean" in capsys.readouterr().out


def test_the_next_steps_name_cases_that_are_in_no_fold_of_an_older_split(dataset, data, capsys):
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    (first,) = read_description(dataset)["dataset"]
    assert "in no fold" not in capsys.readouterr().out
    splits_file = dataset.parent.parent / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    splits_file.parent.mkdir()
    splits_file.write_text(json.dumps([{"train": [first], "val": [first]}]))
    run_import(data)
    assert "in no fold" not in capsys.readouterr().out
    write_volume(data / "2.nii.gz", ct(2))
    run_import(data)
    out = capsys.readouterr().out
    assert f"  1 of 2 cases are in no fold of {splits_file}, for example 2_" in out
    assert f"rm {splits_file}" in out


def test_an_import_is_finished_even_if_a_split_cannot_be_read(dataset, data, capsys):
    splits_file = dataset.parent.parent / "nnUNet_preprocessed" / DATASET / "splits_final.json"
    splits_file.parent.mkdir()
    splits_file.write_text("{bad")
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    assert f"  {splits_file} cannot be read" in capsys.readouterr().out
    assert_consistent(dataset)


def test_a_source_that_cannot_be_listed_keeps_its_case(dataset, data, tmp_path):
    disk = tmp_path / "disk"
    write_volume(disk / "1.nii.gz", ct(1))
    (data / "1.nii.gz").symlink_to(disk / "1.nii.gz")
    run_import(data)
    before = image_times(dataset)
    disk.rename(tmp_path / "away")
    write_volume(data / "2.nii.gz", ct(2))
    run_import(data)
    assert_consistent(dataset)
    assert before.items() <= image_times(dataset).items()
    notes = {Path(row["source"]).name: row["note"] for row in read_report(dataset)}
    assert notes == {
        "1.nii.gz": "kept: the source cannot be read now (unreadable: No such file or directory)",
        "2.nii.gz": "",
    }
    (tmp_path / "away").rename(disk)
    run_import(data)
    assert {row["note"] for row in read_report(dataset)} == {""}


def test_a_series_of_which_slices_were_away_is_imported_again_once_they_are_back(dataset, data, tmp_path):
    write_dicom(tmp_path / "disk", ct(1))
    for number, path in enumerate(sorted((tmp_path / "disk").iterdir())):
        (data / path.name).symlink_to(path if number < 16 else tmp_path / "second_disk" / path.name)
    run_import(data)
    assert [row["reason"] or row["shape"] for row in read_report(dataset)] == [
        "16x24x28",
        "unreadable: 4 DICOM files are links to nothing",
    ]
    (tmp_path / "disk").rename(tmp_path / "second_disk")
    (tmp_path / "disk").symlink_to(tmp_path / "second_disk")
    run_import(data)
    assert_consistent(dataset)
    assert [row["shape"] for row in read_report(dataset)] == ["20x24x28"]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such names")
def test_ignored_files_whose_ending_is_not_utf_8_are_counted(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    (data / os.fsdecode(b"notes.\xff\x1b")).touch()
    process = start_import(data, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_consistent(dataset)
