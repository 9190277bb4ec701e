from __future__ import annotations

import csv
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import plan_and_preprocess, pretrain_dataset
from unlabelled_data import (
    NAME,
    PATIENT,
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

from nnunetv2_vf.cli import main

ID, DATASET = 100, "Dataset100_Test"


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """An empty nnUNet_raw; returns the folder of the dataset that is to be."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path / "nnUNet_raw" / DATASET


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def command(*arguments: object) -> list[str]:
    return ["import", "-d", str(ID), "-n", "Test", "-np", "1", *map(str, arguments)]


def run(*arguments: object) -> None:
    main(command(*arguments))


def error_of(*arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    message = str(exit_info.value.code)
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    return message


def report(dataset: Path) -> list[dict[str, str]]:
    with (dataset / "import_report.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def reasons(dataset: Path) -> dict[str, str]:
    """Of each source's file name: 'accepted' or the kind of its rejection."""
    return {Path(row["source"]).name: row["reason"].partition(":")[0] or row["status"] for row in report(dataset)}


def description(dataset: Path) -> dict:
    return json.loads((dataset / "dataset.json").read_text())


def check_consistent(dataset: Path) -> None:
    """Report, description and files tell the same, and nothing is left behind."""
    cases = {row["case"] for row in report(dataset) if row["status"] == "accepted"}
    told = description(dataset)
    assert set(told["dataset"]) == cases
    assert told["numTraining"] == len(cases) > 0
    images = {dataset / name for case in told["dataset"].values() for name in case["images"]}
    labels = {dataset / case["label"] for case in told["dataset"].values()}
    assert {*(dataset / "imagesTr").iterdir()} == images
    assert {*(dataset / "labelsTr").iterdir()} == labels
    assert not list((dataset / "import_journals").glob("*.scratch"))
    assert not (dataset / "import_report_refused.csv").exists()


def content(dataset: Path) -> dict[str, bytes]:
    """Every file that a user reads, by its path; not the journals, nor the picture."""
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and "import_journals" not in path.parts and path.suffix != ".png"
    }


# ---------------------------------------------------------------- all formats, and every rejection


def write_all_formats(data: Path) -> None:
    for number, ending in enumerate(("nii", "nii.gz", "nrrd", "mha", "mhd")):
        write(data / "files" / f"{number}.{ending}", ct(number))
    write_dicom(data / NAME, ct(5))
    write_dicom(data / NAME, ct(6), series=2)
    write_dicom(data / "no_ending", ct(7), series=3, ending="")
    write_4d(data / "4d.nii.gz", [ct(8), ct(9)])


def test_volumes_of_every_format_become_a_dataset(raw, data, capsys):
    write_all_formats(data)
    run(data)
    check_consistent(raw)
    rows = report(raw)
    assert len(rows) == 10
    assert all(row["status"] == "accepted" and row["shape"] == "20x24x28" for row in rows)
    assert {row["spacing_mm"] for row in rows} == {"2x1.5x1"}
    told = description(raw)
    assert told["channel_names"] == {"0": "CT"}
    assert told["labels"] == {"background": 0, "body": 1}
    for case in told["dataset"].values():
        read, label = sitk.ReadImage(str(raw / case["images"][0])), sitk.ReadImage(str(raw / case["label"]))
        assert (read.GetSpacing(), read.GetOrigin()) == (label.GetSpacing(), label.GetOrigin())
        assert label.GetPixelID() == sitk.sitkUInt8
        body = sitk.GetArrayFromImage(label)
        assert set(np.unique(body)) == {0, 1}
        assert 0.3 < body.mean() < 0.6
    assert (raw / "import_preview.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "10 cases" in said
    assert "channel 0 is CT (10 of 10 volumes look like HU)" in said
    assert "next: nnUNetv2_plan_and_preprocess -d 100 -c 3d_fullres\n" in said


def test_the_report_maps_both_ways_and_pixels_are_those_of_the_source(raw, data):
    for number in range(3):
        write(data / f"{number}.mha", ct(number))
    run(data)
    for row in report(raw):
        number = int(Path(row["source"]).stem)
        read = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "imagesTr" / f"{row['case']}_0000.nii.gz")))
        np.testing.assert_array_equal(read, ct(number))
        assert row["case"].startswith(f"{number}_")
        assert (float(row["minimum"]), float(row["maximum"])) == (read.min(), read.max())


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_no_identifier_comes_out(raw, data, capfd, ending):
    write_dicom(data / "series", ct(0))
    write_dicom(data / "single", ct(2)[:1], series=3)
    told = image(ct(3))
    told.SetMetaData("descrip", NAME)
    told.SetMetaData("patient", PATIENT)
    for number, other in enumerate(("nii.gz", "nrrd")):
        sitk.WriteImage(told + number, str(data / f"told.{other}"))
    write_dicom(data / "bad", ct(1), series=2)
    for path in (data / "bad").iterdir():
        cut_off(path)
    run(data, "--file-ending", ending, "--min-size", 1)
    assert len(description(raw)["dataset"]) == 4
    said = capfd.readouterr()
    unpacked = {n: gzip.decompress(text) if n.endswith(".gz") else text for n, text in content(raw).items()}
    out = "".join([said.out, said.err, *(f"{name}{text!r}" for name, text in unpacked.items())])
    out += "".join(path.read_text() for path in (raw / "import_journals").iterdir())
    for secret in (NAME, "Doe", "Jane", PATIENT, STUDY):
        assert secret not in out


def write_rejected(data: Path) -> dict[str, str]:
    """One source for every reason, and the reason."""
    write(data / "a_good.nii.gz", ct(0))
    write(data / "small.nii.gz", ct(0, (15, 24, 28)))
    write(data / "flat.nii.gz", ct(0)[0], (1.0, 1.0))
    change_pixdim(write(data / "zero_spacing.nii", ct(1)), 1, 0.0)
    change_header(write(data / "no_spacing.mha", ct(1)), rb"ElementSpacing[^\n]*\n", b"")
    write(data / "far.nii.gz", ct(1), (21.0, 1.0, 1.0))
    array = mr(0)
    array[0, 0, 0] = np.nan
    write(data / "nan.nii.gz", array)
    array[0, 0, 0] = np.inf
    write(data / "inf.nrrd", array)
    write(data / "constant.nii.gz", ct(0) * 0)
    cut_off(write(data / "cut_off.nii.gz", ct(2)))
    (data / "text.nii.gz").write_text("no image")
    (data / "gone.nii.gz").symlink_to(data / "nowhere")
    write(data / "same.mha", ct(0))
    shear(write(data / "sheared.nii", ct(3)), 0.2)
    sitk.WriteImage(sitk.Compose([image(ct(0).astype(np.uint8))] * 3), str(data / "colour.nrrd"))
    write_dicom(data / "gap", ct(4), skip=(7,))
    write_dicom(data / "segmentation", ct(4), series=2, tags={"0008|0060": "SEG"})
    return {
        "a_good.nii.gz": "accepted",
        "small.nii.gz": "size",
        "flat.nii.gz": "size",
        "zero_spacing.nii": "spacing",
        "no_spacing.mha": "spacing",
        "far.nii.gz": "spacing",
        "nan.nii.gz": "nonfinite",
        "inf.nrrd": "nonfinite",
        "constant.nii.gz": "constant",
        "cut_off.nii.gz": "unreadable",
        "text.nii.gz": "unreadable",
        "gone.nii.gz": "unreadable",
        "same.mha": "duplicate",
        "sheared.nii": "direction",
        "colour.nrrd": "vector",
        "gap": "slices",
        "segmentation": "modality",
    }


def test_every_rejection_is_in_the_report_and_none_in_the_dataset(raw, data, capsys):
    expected = write_rejected(data)
    run(data)
    check_consistent(raw)
    assert reasons(raw) == expected
    said = capsys.readouterr().out
    assert "1 cases" in said
    assert f"{len(expected) - 1} volumes rejected: " in said
    assert "3 unreadable" in said


def test_what_is_kept_is_a_setting(raw, data):
    write_rejected(data)
    run(
        data,
        "--keep",
        "duplicates,nonfinite,direction,slices",
        "--min-size",
        15,
        "--max-spacing",
        30,
        "--channel",
        "CT",
    )
    check_consistent(raw)
    now = reasons(raw)
    for name in ("small.nii.gz", "far.nii.gz", "nan.nii.gz", "inf.nrrd", "same.mha", "sheared.nii", "gap"):
        assert now[name] == "accepted"
    notes = {Path(row["source"]).name: row["note"] for row in report(raw)}
    assert notes["nan.nii.gz"] == "nonfinite: 1 voxels set to the lowest finite value"
    assert notes["sheared.nii"].startswith("direction: made orthonormal")
    assert description(raw)["last_import"]["selection"]["keep"] == ["direction", "duplicates", "nonfinite", "slices"]


def test_without_any_usable_volume_there_is_a_report_but_no_dataset(raw, data):
    write(data / "small.nii.gz", ct(0, (5, 24, 28)))
    assert "none of 1 volumes can be used: 1 size; what became of each: " in error_of(data)
    assert reasons(raw) == {"small.nii.gz": "size"}
    assert not (raw / "dataset.json").exists()


def test_no_mask_means_all_of_the_volume(raw, data):
    write(data / "a.nii.gz", ct(0))
    run(data, "--no-mask")
    (case,) = description(raw)["dataset"].values()
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(raw / case["label"]))).min() == 1


def test_no_split_4d(raw, data):
    write_4d(data / "4d.nii.gz", [ct(0), ct(1)])
    write(data / "3d.nii.gz", ct(2))
    run(data, "--no-split-4d")
    assert reasons(raw) == {"4d.nii.gz": "4D", "3d.nii.gz": "accepted"}


# ---------------------------------------------------------------- channel


@pytest.mark.parametrize(("make", "channel"), [(ct, "CT"), (mr, "MR")])
def test_the_channel_is_decided_from_the_volumes(raw, data, make, channel):
    write(data / "a.nii.gz", make(0))
    run(data)
    assert description(raw)["channel_names"] == {"0": channel}


def test_mixed_volumes_are_refused_with_the_counts_unless_a_channel_is_given(raw, data):
    for number in range(3):
        write(data / f"ct{number}.nii.gz", ct(number))
    write(data / "mr.nii.gz", mr(0))
    message = error_of(data)
    assert "channel 0 looks like HU (CT) in 3 volumes, but not in 1" in message
    assert "mr.nii.gz is of the fewer" in message
    assert "--channel CT, or MR" in message
    assert not (raw / "dataset.json").exists()
    assert [row["hu_like"] for row in report(raw)] == ["yes", "yes", "yes", "no"]
    images = {path: path.stat().st_mtime_ns for path in (raw / "imagesTr").iterdir()}
    run(data, "--channel", "PET")
    check_consistent(raw)
    assert description(raw)["channel_names"] == {"0": "PET"}
    assert images == {path: path.stat().st_mtime_ns for path in (raw / "imagesTr").iterdir()}  # nothing done twice


def test_an_addition_that_does_not_fit_leaves_the_dataset_as_it_was(raw, data):
    """Whatever was refused, its duplicates included, is in no later dataset unless it is given again."""
    for number in range(2):
        write(data / "mr" / f"{number}.nii.gz", mr(number))
    run(data / "mr")
    before = content(raw)
    write(data / "mixed" / "ct.nii.gz", ct(0))
    for number in range(2, 5):
        write(data / "mixed" / f"{number}.nii.gz", mr(number))
        write(data / "mixed" / f"copy_of_{number}.mha", mr(number))
    assert "looks like HU (CT) in 1 volumes, but not in 5" in error_of(data / "mixed")
    assert {name: text for name, text in content(raw).items() if name in before} == before
    with (raw / "import_report_refused.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
    run(data / "mr")
    assert content(raw) == before
    write(data / "more" / "5.nii.gz", mr(5))
    run(data / "more")
    check_consistent(raw)
    assert sorted(reasons(raw).items()) == [(f"{number}.nii.gz", "accepted") for number in (0, 1, 5)]
    run(data / "mixed", "--channel", "CT")
    check_consistent(raw)
    assert len(description(raw)["dataset"]) == 7


def test_a_command_that_finds_nothing_usable_leaves_the_dataset_as_it_was(raw, data):
    write(data / "1.nii.gz", ct(1))
    run(data)
    before = content(raw)
    assert "none of 1 volumes can be used: 1 size" in error_of(data, "--min-size", 40)
    assert {name: text for name, text in content(raw).items() if name in before} == before


def test_after_a_refused_mixture_a_part_of_it_can_be_imported(raw, data):
    write(data / "ct" / "a.nii.gz", ct(0))
    write(data / "mr" / "b.nii.gz", mr(0))
    error_of(data)
    run(data / "ct")
    check_consistent(raw)
    assert description(raw)["channel_names"] == {"0": "CT"}
    assert reasons(raw) == {"a.nii.gz": "accepted"}


def test_only_what_changed_makes_a_fingerprint_stale(raw, data, capsys):
    write(data / "1.nii.gz", ct(1))
    run(data)
    fingerprint = raw.parent.parent / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json"
    fingerprint.parent.mkdir()
    fingerprint.touch()
    run(data)
    assert "--clean" not in capsys.readouterr().out
    time.sleep(0.01)
    write(data / "2.nii.gz", ct(2))
    run(data)
    assert "nnUNetv2_plan_and_preprocess -d 100 -c 3d_fullres --clean" in capsys.readouterr().out


def test_labels_among_the_volumes_are_noted(raw, data, capsys):
    write(data / "1.nii.gz", (ct(1) > -500).astype(np.int16) * 3)
    run(data)
    (row,) = report(raw)
    assert row["note"] == "labels: 2 different values, all whole; is it a segmentation?"
    assert "notes: 1 labels" in capsys.readouterr().out


def test_a_channel_that_was_given_holds_for_additions(raw, data):
    write(data / "1" / "a.nii.gz", ct(0))
    run(data / "1", "--channel", "CBCT")
    write(data / "2" / "b.nii.gz", mr(0))
    run(data / "2")
    assert description(raw)["channel_names"] == {"0": "CBCT"}


def test_cases_of_several_channels(raw, data):
    for case in "ab":
        write(data / f"{case}_0000.nii.gz", ct(ord(case)))
        write(data / f"{case}_0001.nii.gz", mr(ord(case)))
    write(data / "c_0000.nii.gz", ct(0))
    run(data)
    check_consistent(raw)
    assert description(raw)["channel_names"] == {"0": "CT", "1": "MR"}
    assert reasons(raw) == {"a_0000.nii.gz": "accepted", "b_0000.nii.gz": "accepted", "c_0000.nii.gz": "channels"}
    assert "names 1 channels, the cases have 2" in error_of(data, "--channel", "CT")
    run(data, "--channel", "CT,FDG")
    assert description(raw)["channel_names"] == {"0": "CT", "1": "FDG"}


# ---------------------------------------------------------------- links, file endings


def test_links_where_nnunet_reads_the_file_and_copies_where_not(raw, data, capsys):
    whole = write(data / "a.nii.gz", ct(0))
    write(data / "b.nrrd", ct(1))
    write_4d(data / "c.nii.gz", [ct(2), ct(3)])
    run(data, "--link")
    check_consistent(raw)
    linked = [path for path in (raw / "imagesTr").iterdir() if path.is_symlink()]
    assert [path.readlink() for path in linked] == [whole]
    assert "4 cases, 1 of them links" in capsys.readouterr().out
    run(data)
    check_consistent(raw)
    assert not any(path.is_symlink() for path in (raw / "imagesTr").iterdir())
    assert whole.is_file()
    assert not whole.is_symlink()


def test_a_link_whose_file_is_gone_is_no_case(raw, data):
    write(data / "a.nii.gz", ct(0))
    gone = write(data / "b.nii.gz", ct(1))
    run(data, "--link")
    gone.unlink()
    run(data, "--link")
    assert reasons(raw) == {"a.nii.gz": "accepted", "b.nii.gz": "missing"}
    check_consistent(raw)


def test_data_that_moved_are_no_duplicates_of_what_they_were(raw, data):
    for number in range(3):
        write(data / "old" / f"{number}.nii.gz", ct(number))
    write(data / "old" / "twin.nii.gz", ct(0))
    run(data / "old", "--link")
    (data / "old").rename(data / "new")
    run(data / "new", "--link")
    check_consistent(raw)
    sources = [row["source"] for row in report(raw) if row["status"] == "accepted"]
    assert sources == [str(data / "new" / f"{number}.nii.gz") for number in range(3)]


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
def test_the_file_ending_is_a_setting(raw, data, ending):
    write(data / "a.nii.gz", ct(0))
    write(data / f"b{ending}", ct(1))
    run(data, "--file-ending", ending, "--link")
    check_consistent(raw)
    assert all(path.name.endswith(f"_0000{ending}") for path in (raw / "imagesTr").iterdir())
    assert sum(path.is_symlink() for path in (raw / "imagesTr").iterdir()) == 1
    assert f"use --file-ending {ending}" in error_of(data)


# ---------------------------------------------------------------- again, more, interrupted, in parts


def test_a_second_run_changes_nothing_and_reads_nothing(raw, data):
    write_rejected(data)
    run(data)
    before = content(raw)
    times = {path: path.stat().st_mtime_ns for path in (raw / "imagesTr").iterdir()}
    run(data)
    assert content(raw) == before
    assert times == {path: path.stat().st_mtime_ns for path in (raw / "imagesTr").iterdir()}


def test_more_volumes_later(raw, data):
    for number in range(3):
        write(data / "first" / f"{number}.nii.gz", ct(number))
    run(data / "first")
    before = content(raw)
    write(data / "second" / "3.nii.gz", ct(3))
    write(data / "a_before" / "same.nii.gz", ct(0))  # sorts first, but the dataset has that case already
    run(data)
    check_consistent(raw)
    after = content(raw)
    assert all(after[name] == before[name] for name in before if name.startswith(("images", "labels")))
    assert len(description(raw)["dataset"]) == 4
    assert reasons(raw)["same.nii.gz"] == "duplicate"


def test_a_source_that_changes_is_imported_again_and_one_that_is_gone_stays(raw, data):
    first, second = write(data / "1.nii.gz", ct(1)), write(data / "2.nii.gz", ct(2))
    run(data)
    write(first, ct(3, (22, 24, 28)))
    second.unlink()
    run(data)
    check_consistent(raw)
    assert {Path(row["source"]).name: row["shape"] for row in report(raw)} == {
        "1.nii.gz": "22x24x28",
        "2.nii.gz": "20x24x28",
    }
    write(first, ct(3, (5, 24, 28)))
    run(data)
    check_consistent(raw)
    assert reasons(raw) == {"1.nii.gz": "size", "2.nii.gz": "accepted"}


def test_a_duplicate_of_what_has_changed_is_imported(raw, data):
    first = write(data / "a.nii.gz", ct(1))
    write(data / "b.nii.gz", ct(1))
    run(data)
    assert reasons(raw) == {"a.nii.gz": "accepted", "b.nii.gz": "duplicate"}
    write(first, ct(2, (22, 24, 28)))
    run(data)
    check_consistent(raw)
    assert reasons(raw) == {"a.nii.gz": "accepted", "b.nii.gz": "accepted"}


def test_a_refused_command_leaves_nothing_for_the_next(raw, data):
    """Neither files of another ending, nor the number of channels."""
    for channel, make in enumerate((ct, mr)):
        write(data / "two" / f"a_000{channel}.nii.gz", make(0))
        write(data / "two" / f"b_000{channel}.nii.gz", mr(1) if channel else mr(2))
    error_of(data / "two")
    write(data / "one" / "c.nii.gz", ct(3))
    run(data / "one", "--file-ending", ".nrrd")
    check_consistent(raw)
    assert reasons(raw) == {"c.nii.gz": "accepted"}


def test_files_that_were_removed_come_back(raw, data):
    write(data / "1.nii.gz", ct(1))
    write(data / "2.nii.gz", ct(2))
    run(data)
    before = content(raw)
    next((raw / "imagesTr").iterdir()).unlink()
    run(data)
    assert content(raw) == before


def test_what_was_unreadable_is_tried_again(raw, data):
    write(data / "1.nii.gz", ct(1))
    path = write(data / "2.nii.gz", ct(2))
    whole, stamp = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-20] + bytes(20))  # as by a failing disk
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    run(data)
    assert reasons(raw)["2.nii.gz"] == "unreadable"
    path.write_bytes(whole)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    run(data)
    assert reasons(raw)["2.nii.gz"] == "accepted"


def test_other_settings_do_it_again(raw, data):
    write(data / "1.nii.gz", ct(1))
    write(data / "2.nii.gz", ct(2, (12, 24, 28)))
    run(data)
    assert reasons(raw)["2.nii.gz"] == "size"
    run(data, "--min-size", 8)
    assert reasons(raw)["2.nii.gz"] == "accepted"
    run(data)
    check_consistent(raw)
    assert reasons(raw)["2.nii.gz"] == "size"


def start(raw: Path, *arguments: object) -> subprocess.Popen:
    words = [sys.executable, "-m", "nnunetv2_vf", *command(*arguments)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def check_whole(dataset: Path) -> None:
    """Every image that is there can be read to its end, and has a label."""
    for path in (dataset / "imagesTr").iterdir():
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(path))).std() > 0
        label = dataset / "labelsTr" / path.name.replace("_0000", "")
        assert sitk.GetArrayFromImage(sitk.ReadImage(str(label))).max() == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in Linux's /proc")
def test_killed_in_the_middle_it_resumes_and_never_leaves_half_a_case(raw, data, tmp_path, monkeypatch):
    for number in range(60):
        write(data / f"{number:02d}.nii.gz", ct(number, (48, 48, 48)))
    run(data, "-np", 2)
    expected = content(raw)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "other"))
    other = tmp_path / "other" / DATASET
    done = lambda: len(list((other / "imagesTr").glob("*"))) if other.exists() else 0  # noqa: E731
    draw = random.Random(0)
    killed, times = 0, {}
    while killed < 4 and done() < 50:
        before = done()
        process = start(raw, data)
        wait_until(lambda before=before: done() > before + draw.randrange(4))
        workers = children(process)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        wait_until(lambda workers=workers: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        check_whole(other)
        now = {path: path.stat().st_mtime_ns for path in (other / "imagesTr").iterdir()}
        assert sum(now[path] != times[path] for path in times) <= 2  # in place, but not yet in the journal
        times = now
    assert killed
    run(data)
    check_consistent(other)
    assert {name: text for name, text in content(other).items() if name != "dataset.json"} == {
        name: text for name, text in expected.items() if name != "dataset.json"
    }
    assert description(other) == description(raw)


def test_two_parts_at_once_make_the_same_dataset_as_one(raw, data, tmp_path, monkeypatch):
    write_rejected(data)
    for number in range(8):
        write(data / f"x{number}.nii.gz", ct(10 + number))
    write(data / "y3.nii.gz", ct(13))  # its twin may be in the other part
    run(data)
    expected = content(raw)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    parts = [start(raw, data, "--num_parts", 2, "--part_id", part) for part in range(2)]
    assert [part.wait(timeout=120) for part in parts] == [0, 0]
    check_consistent(tmp_path / "other" / DATASET)
    assert content(tmp_path / "other" / DATASET) == expected
    run(data, "--num_parts", 2, "--part_id", 0)
    assert content(tmp_path / "other" / DATASET) == expected


def test_a_part_alone_says_what_is_left_and_a_run_without_parts_finishes(raw, data, capsys):
    for number in range(12):
        write(data / f"{number}.nii.gz", ct(number))
    run(data, "--num_parts", 3, "--part_id", 1)
    assert "part 1 of 3 is done" in capsys.readouterr().out
    assert not (raw / "dataset.json").exists()
    some = {path: path.stat().st_mtime_ns for path in (raw / "imagesTr").iterdir()}
    assert 0 < len(some) < 12
    run(data)
    check_consistent(raw)
    assert len(description(raw)["dataset"]) == 12
    assert all(path.stat().st_mtime_ns == some[path] for path in some)


def test_the_same_part_cannot_run_twice_at_once(raw, data):
    from filelock import FileLock

    write(data / "1.nii.gz", ct(1))
    run(data)
    with FileLock(raw / "import_journals" / "part_0_of_1.lock"):
        assert "part_0_of_1 of this import is already running" in error_of(data)


def test_a_journal_that_was_cut_off_costs_one_source(raw, data):
    for number in range(3):
        write(data / f"{number}.nii.gz", ct(number))
    run(data)
    expected = content(raw)
    journal = raw / "import_journals" / "part_0_of_1.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    run(data)
    assert content(raw) == expected
    assert len(journal.read_bytes().splitlines()) == 4


def test_a_journal_of_others_names_no_files_elsewhere(raw, data):
    """Names of cases are names of files: what leads out of the dataset's folder is as if it had not been written."""
    write(data / "0.nii.gz", ct(0))
    run(data)
    expected = content(raw)
    journal = raw / "import_journals" / "part_0_of_1.jsonl"
    case = json.loads(journal.read_text().splitlines()[0])["rows"][0]["case"]
    journal.write_text(journal.read_text().replace(f'"{case}"', f'"../{case}"'))
    run(data)
    assert content(raw) == expected


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--part_id", "2", "--num_parts", "2"], ["--part_id is 2", "0 to num_parts - 1"]),
        (["-np", "0"], ["-np is 0"]),
        (["-d", "0"], ["-d is 0", "1 to 999"]),
        (["-n", "a/b"], ["-n is 'a/b'", "letters"]),
        (["--file-ending", ".png"], ["'.png'", ".nii.gz, .nii, .nrrd, .mha"]),
        (["--keep", "nan"], ["'nan'", "duplicates"]),
        (["--channel", " "], ["--channel is ' '", "CT or MR"]),
        (["/gone"], ["/gone does not exist"]),
    ],
)
def test_wrong_values_are_one_line_and_write_nothing(raw, data, arguments, parts):
    write(data / "1.nii.gz", ct(1))
    message = error_of(data, *arguments)
    for part in parts:
        assert part in message
    assert not list(raw.parent.iterdir())


def test_an_id_or_a_folder_that_is_taken(raw, data):
    write(data / "1.nii.gz", ct(1))
    other = raw.parent.parent / "nnUNet_results" / "Dataset100_Other"
    other.mkdir()
    assert "Dataset100_Other" in error_of(data)
    other.rmdir()
    (raw / "imagesTr").mkdir(parents=True)
    assert "was not made by import" in error_of(data)


def test_a_damaged_description_is_told(raw, data):
    write(data / "1.nii.gz", ct(1))
    run(data)
    expected = content(raw)
    (raw / "dataset.json").write_text("{")
    assert "dataset.json is damaged" in error_of(data)
    (raw / "dataset.json").unlink()
    run(data)
    assert content(raw) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_is_one_line_and_the_same_command_goes_on(raw, data):
    for number in range(40):
        write(data / f"{number:02d}.nii.gz", ct(number, (48, 48, 48)))
    words = [sys.executable, "-m", "nnunetv2_vf", *command(data)]
    listen = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  which a job in the background does not
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=listen)
    wait_until(lambda: raw.exists() and any((raw / "imagesTr").glob("*")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.decode().endswith("nnUNetv2_vf: error: interrupted; the same command goes on from here\n")
    assert b"Traceback" not in said
    run(data)
    check_consistent(raw)


def test_nnunet_raw_must_be_set(raw, data, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in error_of(data)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX limit on the size of files")
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_full_disk_is_told_and_leaves_no_half_a_case(raw, data, ending):
    import resource

    write(data / "1.nii.gz", ct(1, (16, 16, 16)))
    write(data / "2.nii.gz", np.random.default_rng(0).integers(0, 30000, (64, 64, 64)).astype(np.int16))
    words = [sys.executable, "-m", "nnunetv2_vf", *command(data, "--channel", "CT", "--file-ending", ending)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731  bytes a file
    done = subprocess.run(words, preexec_fn=limit, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert "nnUNetv2_vf: error: cannot write to" in done.stderr
    assert "Traceback" not in done.stderr
    check_whole(raw)
    assert len(list((raw / "imagesTr").iterdir())) <= 1
    run(data, "--channel", "CT", "--file-ending", ending)
    check_consistent(raw)


# ---------------------------------------------------------------- stock nnU-Net takes it


@pytest.mark.parametrize("make", [ct, mr])
def test_stock_fingerprint_plan_preprocess_and_pretraining(raw, data, monkeypatch, make):
    for number in range(5):
        write(data / f"{number}.nrrd", make(number, (32, 32, 32)), (2.0, 2.0, 2.0))
    run(data)
    plans = pretrain_dataset(ID, monkeypatch)
    write(data / "more.nrrd", make(9, (32, 32, 32)), (2.0, 2.0, 2.0))
    run(data)
    assert plan_and_preprocess(ID, monkeypatch) == 6  # cases, the new one among them
    normalization = plans["configurations"]["3d_fullres"]["normalization_schemes"]
    assert normalization == ["CTNormalization" if make is ct else "ZScoreNormalization"]
    intensities = plans["foreground_intensity_properties_per_channel"]["0"]
    assert intensities["median"] == pytest.approx(40 if make is ct else 302, abs=10)  # of the body, not of the air
    results = raw.parent.parent / "nnUNet_results" / DATASET
    assert (results / "VFPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all" / "vf_pretrained.pth").is_file()
