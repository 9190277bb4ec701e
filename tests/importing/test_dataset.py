"""``nnUNetv2_vf import``: what becomes a dataset, what is rejected, and what is refused."""

from __future__ import annotations

import csv
import gzip
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
    DATASET,
    ID,
    NAME,
    PATIENT,
    STUDY,
    check_consistent,
    check_whole,
    command,
    content,
    ct,
    cut_off,
    description,
    error_of,
    image,
    mr,
    reasons,
    report,
    run,
    wait_until,
    write,
    write_4d,
    write_dicom,
    write_rejected,
)

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
