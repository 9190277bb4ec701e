"""``nnUNetv2_vf import``: which volumes become a dataset, which are rejected, and which commands are refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import pretrain_dataset
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from unlabelled_data import (
    DATASET,
    DATASET_ID,
    PATIENT_ID,
    PATIENT_NAME,
    STUDY_UID,
    VOLUME_FORMATS,
    assert_consistent,
    ct,
    import_error,
    make_image,
    mr,
    read_description,
    read_outcomes,
    read_report,
    read_user_files,
    run_import,
    truncate,
    write_4d,
    write_dicom,
    write_rejected_volumes,
    write_volume,
)

# ---------------------------------------------------------------- accepted and rejected volumes


def write_all_formats(data: Path) -> None:
    for number, ending in enumerate(VOLUME_FORMATS):
        write_volume(data / "files" / f"{number}.{ending}", ct(number))
    write_dicom(data / PATIENT_NAME, ct(10))
    write_dicom(data / PATIENT_NAME, ct(11), series=2)
    write_dicom(data / "no_ending", ct(12), series=3, ending="")
    write_4d(data / "4d.nii.gz", [ct(13), ct(14)])


@pytest.mark.pictures
def test_volumes_of_every_format_become_a_dataset(dataset, data, capsys):
    write_all_formats(data)
    run_import(data)
    assert_consistent(dataset)
    rows = read_report(dataset)
    assert len(rows) == 12
    assert all(row["status"] == "accepted" and row["shape"] == "20x24x28" for row in rows)
    assert {row["spacing_mm"] for row in rows} == {"2x1.5x1"}
    description = read_description(dataset)
    assert description["channel_names"] == {"0": "CT"}
    assert description["labels"] == {"background": 0, "body": 1}
    for case in description["dataset"].values():
        stored, label = sitk.ReadImage(str(dataset / case["images"][0])), sitk.ReadImage(str(dataset / case["label"]))
        assert (stored.GetSpacing(), stored.GetOrigin()) == (label.GetSpacing(), label.GetOrigin())
        assert label.GetPixelID() == sitk.sitkUInt8
        body = sitk.GetArrayFromImage(label)
        assert set(np.unique(body)) == {0, 1}
        assert 0.3 < body.mean() < 0.6
    assert (dataset / "import_preview.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "12 cases" in output
    assert "channel 0 is CT (12 of 12 volumes look like HU)" in output
    assert "next: nnUNetv2_plan_and_preprocess -d 100 -c 3d_fullres\n" in output


def test_the_report_maps_sources_to_cases_and_cases_have_the_voxels_of_their_source(dataset, data):
    for number in range(3):
        write_volume(data / f"{number}.mha", ct(number))
    run_import(data)
    for row in read_report(dataset):
        number = int(Path(row["source"]).stem)
        stored = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "imagesTr" / f"{row['case']}_0000.nii.gz")))
        np.testing.assert_array_equal(stored, ct(number))
        assert row["case"].startswith(f"{number}_")
        assert (float(row["minimum"]), float(row["maximum"])) == (stored.min(), stored.max())


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_no_identifier_of_a_patient_is_written_or_printed(dataset, data, capfd, ending):
    write_dicom(data / "series", ct(0))
    write_dicom(data / "single", ct(2)[:1], series=3)
    with_metadata = make_image(ct(3))
    with_metadata.SetMetaData("descrip", PATIENT_NAME)
    with_metadata.SetMetaData("patient", PATIENT_ID)
    for number, format_ in enumerate(("nii.gz", "nrrd")):
        sitk.WriteImage(with_metadata + number, str(data / f"metadata.{format_}"))
    write_dicom(data / "damaged", ct(1), series=2)
    for path in (data / "damaged").iterdir():
        truncate(path)
    run_import(data, "--file-ending", ending, "--min-size", 1)
    assert len(read_description(dataset)["dataset"]) == 4
    texts = [*capfd.readouterr(), *(path.read_text() for path in (dataset / "import_journals").iterdir())]
    for name, content in read_user_files(dataset).items():
        texts += [name, repr(gzip.decompress(content) if name.endswith(".gz") else content)]
    for identifier in (PATIENT_NAME, "Doe", "Jane", PATIENT_ID, STUDY_UID):
        assert not any(identifier in text for text in texts)


def test_every_rejected_volume_is_in_the_report_and_none_in_the_dataset(dataset, data, capsys):
    expected = write_rejected_volumes(data)
    run_import(data)
    assert_consistent(dataset)
    assert read_outcomes(dataset) == expected
    output = capsys.readouterr().out
    assert "1 cases" in output
    assert f"{len(expected) - 1} volumes rejected: " in output
    assert "3 unreadable" in output


def test_kept_checks_repair_volumes_instead_of_rejecting_them(dataset, data):
    write_rejected_volumes(data)
    checks = "duplicates,nonfinite,direction,slices"
    run_import(data, "--keep", checks, "--min-size", 15, "--max-spacing", 30, "--channel", "CT")
    assert_consistent(dataset)
    outcomes = read_outcomes(dataset)
    for name in ("small.nii.gz", "far.nii.gz", "nan.nii.gz", "inf.nrrd", "same.mha", "sheared.nii", "gap"):
        assert outcomes[name] == "accepted"
    notes = {Path(row["source"]).name: row["note"] for row in read_report(dataset)}
    assert notes["nan.nii.gz"] == "nonfinite: 1 voxels set to the lowest finite value"
    assert notes["sheared.nii"].startswith("direction: made orthonormal")
    kept = read_description(dataset)["last_import"]["selection"]["keep"]
    assert kept == ["direction", "duplicates", "nonfinite", "slices"]


def test_if_no_volume_can_be_used_there_is_a_report_but_no_dataset(dataset, data):
    write_volume(data / "small.nii.gz", ct(0, (5, 24, 28)))
    assert "none of 1 volumes can be used: 1 size; the reason for each volume is in " in import_error(data)
    assert read_outcomes(dataset) == {"small.nii.gz": "size"}
    assert not (dataset / "dataset.json").exists()


def test_no_mask_labels_the_whole_volume(dataset, data):
    write_volume(data / "a.nii.gz", ct(0))
    run_import(data, "--no-mask")
    (case,) = read_description(dataset)["dataset"].values()
    assert sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / case["label"]))).min() == 1


def test_no_split_4d_rejects_4d_files(dataset, data):
    write_4d(data / "4d.nii.gz", [ct(0), ct(1)])
    write_volume(data / "3d.nii.gz", ct(2))
    run_import(data, "--no-split-4d")
    assert read_outcomes(dataset) == {"4d.nii.gz": "4D", "3d.nii.gz": "accepted"}


def test_a_volume_that_looks_like_a_segmentation_is_rejected_or_kept_with_a_note(dataset, data, capsys):
    write_volume(data / "1.nii.gz", (ct(1) > -500).astype(np.int16) * 3)
    write_volume(data / "2.nii.gz", mr(2))
    run_import(data)
    assert read_outcomes(dataset) == {"1.nii.gz": "labels", "2.nii.gz": "accepted"}
    run_import(data, "--keep", "labels")
    kept, _ = read_report(dataset)
    assert kept["status"] == "accepted"
    assert kept["note"].startswith("labels: looks like a segmentation: 2 different values, all whole; ")
    assert "notes: 1 labels" in capsys.readouterr().out


# ---------------------------------------------------------------- links and file endings


def test_only_files_that_nnunet_can_read_are_linked(dataset, data, capsys):
    source = write_volume(data / "a.nii.gz", ct(0))
    write_volume(data / "b.nrrd", ct(1))
    write_4d(data / "c.nii.gz", [ct(2), ct(3)])
    run_import(data, "--link")
    assert_consistent(dataset)
    linked = [path for path in (dataset / "imagesTr").iterdir() if path.is_symlink()]
    assert [path.readlink() for path in linked] == [source]
    assert "4 cases, 1 of them links" in capsys.readouterr().out
    run_import(data)
    assert_consistent(dataset)
    assert not any(path.is_symlink() for path in (dataset / "imagesTr").iterdir())
    assert source.is_file()
    assert not source.is_symlink()


def test_a_case_whose_link_is_broken_is_rejected_as_missing(dataset, data):
    write_volume(data / "a.nii.gz", ct(0))
    removed = write_volume(data / "b.nii.gz", ct(1))
    run_import(data, "--link")
    removed.unlink()
    run_import(data, "--link")
    assert read_outcomes(dataset) == {"a.nii.gz": "accepted", "b.nii.gz": "missing"}
    assert_consistent(dataset)


def test_moved_data_are_not_duplicates_of_their_broken_links(dataset, data):
    for number in range(3):
        write_volume(data / "old" / f"{number}.nii.gz", ct(number))
    write_volume(data / "old" / "twin.nii.gz", ct(0))
    run_import(data / "old", "--link")
    (data / "old").rename(data / "new")
    run_import(data / "new", "--link")
    assert_consistent(dataset)
    sources = [row["source"] for row in read_report(dataset) if row["status"] == "accepted"]
    assert sources == [str(data / "new" / f"{number}.nii.gz") for number in range(3)]


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii"])
def test_the_dataset_has_the_given_file_ending(dataset, data, ending):
    write_volume(data / "a.nii.gz", ct(0))
    write_volume(data / f"b{ending}", ct(1))
    run_import(data, "--file-ending", ending, "--link")
    assert_consistent(dataset)
    assert all(path.name.endswith(f"_0000{ending}") for path in (dataset / "imagesTr").iterdir())
    assert sum(path.is_symlink() for path in (dataset / "imagesTr").iterdir()) == 1
    assert f"use --file-ending {ending}" in import_error(data)


# ---------------------------------------------------------------- refused commands


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--part_id", "2", "--num_parts", "2"], ["--part_id is 2", "with --num_parts 2 it must be 0 to 1"]),
        (["-np", "0"], ["-np is 0"]),
        (["-d", "0"], ["-d is 0", "1 to 999"]),
        (["-n", "a/b"], ["-n is 'a/b'", "letters"]),
        (["--file-ending", ".png"], ["'.png'", ".nii.gz, .nii, .nrrd, .mha"]),
        (["--keep", "nan"], ["'nan'", "duplicates"]),
        (["--channel", " "], ["--channel is ' '", "CT or MR"]),
        (["/gone"], ["/gone does not exist"]),
    ],
)
def test_an_illegal_value_is_a_one_line_error_and_writes_nothing(dataset, data, arguments, parts):
    write_volume(data / "1.nii.gz", ct(1))
    message = import_error(data, *arguments)
    for part in parts:
        assert part in message
    assert not list(dataset.parent.iterdir())


def test_an_id_or_folder_of_another_dataset_is_refused(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    other = dataset.parent.parent / "nnUNet_results" / "Dataset100_Other"
    other.mkdir()
    assert "Dataset100_Other" in import_error(data)
    other.rmdir()
    (dataset / "imagesTr").mkdir(parents=True)
    assert "was not made by import" in import_error(data)


def test_a_damaged_description_is_refused_and_rebuilt_once_removed(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    expected = read_user_files(dataset)
    (dataset / "dataset.json").write_text("{")
    assert "dataset.json is damaged" in import_error(data)
    (dataset / "dataset.json").unlink()
    run_import(data)
    assert read_user_files(dataset) == expected


def test_an_unset_nnunet_raw_is_refused(dataset, data, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in import_error(data)


# ---------------------------------------------------------------- stock nnU-Net


def test_stock_nnunet_plans_and_pretrains_on_an_imported_dataset_and_its_additions(dataset, data, monkeypatch):
    def write_case(number: int) -> None:
        for channel, make in enumerate((ct, mr)):
            write_volume(data / f"{number}_000{channel}.nrrd", make(number, (32, 32, 32)), (2.0, 2.0, 2.0))

    for number in range(5):
        write_case(number)
    run_import(data)
    write_case(9)
    run_import(data)
    plans = pretrain_dataset(DATASET_ID, monkeypatch)
    configuration = plans["configurations"]["3d_fullres"]
    assert configuration["normalization_schemes"] == ["CTNormalization", "ZScoreNormalization"]
    intensities = plans["foreground_intensity_properties_per_channel"]
    assert intensities["0"]["median"] == pytest.approx(40, abs=10)  # of the body, not of the air
    assert intensities["1"]["median"] == pytest.approx(302, abs=10)
    preprocessed = dataset.parent.parent / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_3d_fullres"
    assert len(infer_dataset_class(str(preprocessed)).get_identifiers(str(preprocessed))) == 6
    results = dataset.parent.parent / "nnUNet_results" / DATASET
    assert (results / "VFPretrainTrainer__nnUNetPlans__3d_fullres" / "fold_all" / "vf_pretrained.pth").is_file()
