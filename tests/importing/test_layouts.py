"""Labels in the layouts of common datasets are left out; images are found and have readable names."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from unlabelled_data import (
    DATASET,
    assert_consistent,
    ct,
    import_error,
    mr,
    read_description,
    read_outcomes,
    read_report,
    run_import,
    write_dicom,
    write_volume,
)

from nnunetv2_vf.importing.layouts import is_label_file, is_label_folder

# Files of each layout: the images first, then the labels.
LAYOUTS = {
    "nnU-Net raw": (
        ["imagesTr/liver_001_0000.nii.gz", "imagesTs/liver_002_0000.nii.gz"],
        ["labelsTr/liver_001.nii.gz", "labelsTs/liver_002.nii.gz"],
    ),
    "MSD": (
        ["Task09_Spleen/imagesTr/spleen_2.nii.gz", "Task09_Spleen/imagesTs/spleen_1.nii.gz"],
        ["Task09_Spleen/labelsTr/spleen_2.nii.gz"],
    ),
    "TotalSegmentator v2": (
        ["s0001/ct.nii.gz", "s0002/ct.nii.gz"],
        [
            "s0001/segmentations/liver.nii.gz",
            "s0001/segmentations/rib_left_1.nii.gz",
            "s0002/segmentations/aorta.nii.gz",
        ],
    ),
    "BraTS 2021": (
        [f"BraTS2021_00000/BraTS2021_00000_{kind}.nii.gz" for kind in ("flair", "t1", "t1ce", "t2")],
        ["BraTS2021_00000/BraTS2021_00000_seg.nii.gz"],
    ),
    "BraTS 2023": (
        [f"BraTS-GLI-00000-000/BraTS-GLI-00000-000-{kind}.nii.gz" for kind in ("t1c", "t1n", "t2f", "t2w")],
        ["BraTS-GLI-00000-000/BraTS-GLI-00000-000-seg.nii.gz"],
    ),
    "AMOS": (
        [f"amos22/images{part}/amos_000{number}.nii.gz" for number, part in enumerate(("Tr", "Va", "Ts"))],
        [f"amos22/labels{part}/amos_000{number}.nii.gz" for number, part in enumerate(("Tr", "Va", "Ts"))],
    ),
    "KiTS": (
        ["case_00000/imaging.nii.gz"],
        ["case_00000/segmentation.nii.gz", "case_00000/instances/kidney_instance-1_annotation-1.nii.gz"],
    ),
    "ACDC": (
        ["patient001/patient001_frame01.nii.gz", "patient001/patient001_frame12.nii.gz"],
        ["patient001/patient001_frame01_gt.nii.gz", "patient001/patient001_frame12_gt.nii.gz"],
    ),
    "BIDS": (
        [f"sub-01/ses-{session}/anat/sub-01_ses-{session}_T1w.nii.gz" for session in ("01", "02")],
        [
            "sub-01/ses-01/anat/sub-01_ses-01_label-lesion_mask.nii.gz",
            "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz",
            "derivatives/fmriprep/sub-01/anat/sub-01_dseg.nii.gz",
        ],
    ),
    "LiTS": (["volume-0.nii", "volume-1.nii"], ["segmentation-0.nii", "segmentation-1.nii"]),
    "SegTHOR": (["Patient_01/Patient_01.nii.gz"], ["Patient_01/GT.nii.gz"]),
    "3D Slicer": (["1.nrrd"], ["1.seg.nrrd"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_of_common_layouts_are_left_out_and_counted(dataset, data, capsys, layout):
    images, labels = LAYOUTS[layout]
    for number, file in enumerate([*images, *labels]):
        write_volume(data / file, mr(number))  # the names alone must decide
    run_import(data)
    assert_consistent(dataset)
    assert {row["source"] for row in read_report(dataset)} == {str(data / file) for file in images}
    found, *_, summary = capsys.readouterr().out.split(f"{DATASET}: ")[1:]
    for output in (found, summary):
        assert f"left out {len(labels)} volumes with names of labels or derivatives, such as {data}" in output


def test_nested_dicom_with_segmentations_beside_the_images(dataset, data, capsys):
    patient = data / "LIDC-IDRI-0001" / "01-01-2000-30178"
    write_dicom(patient / "3000566.000000-03192", ct(0))
    write_dicom(patient / "1000.000000-Nodule 1 - Segmentation", ct(1), series=2, tags={"0008|0060": "SEG"})
    write_dicom(patient / "0.000000-NA", ct(2)[:1], series=3, tags={"0008|0060": "RTSTRUCT"})
    write_dicom(patient / "5.000000-41281", ct(3), series=4, tags={"0008|0060": "SEG"})
    run_import(data)
    assert_consistent(dataset)
    assert list(read_outcomes(dataset).values()) == ["modality", "accepted", "modality"]
    assert "left out 1 volumes with names of labels" in capsys.readouterr().out


def test_kept_labels_are_imported(dataset, data):
    write_volume(data / "s0001" / "ct.nii.gz", ct(0))
    write_volume(data / "s0001" / "segmentations" / "body.nii.gz", (ct(0) > -500).astype(np.uint8))
    run_import(data, "--keep", "labels", "--channel", "CT")
    assert_consistent(dataset)
    assert read_outcomes(dataset) == {"ct.nii.gz": "accepted", "body.nii.gz": "accepted"}


def test_a_given_folder_is_searched_whatever_its_name_is(dataset, data):
    write_volume(data / "masks" / "a.nii.gz", mr(0))
    run_import(data / "masks")
    assert read_outcomes(dataset) == {"a.nii.gz": "accepted"}


def test_data_with_labels_only_are_refused(dataset, data):
    write_volume(data / "labelsTr" / "a.nii.gz", mr(0))
    assert "but 1 with names of labels or derivatives; import them: --keep labels" in import_error(data)
    assert not list(dataset.parent.iterdir())


@pytest.mark.parametrize(
    "stem",
    [
        "scan_2019",
        "unlabelled_01",
        "T1_masked",
        "gtv-study_ct",
        "seg_001_ct",
        "2019",
        "segmented_lung",
        "labelled",
        "sub-mask01_T1w",
    ],
)
def test_names_that_only_contain_the_letters_of_a_label_are_images(stem):
    assert not is_label_file(stem)


@pytest.mark.parametrize(
    "name",
    [
        "labelsTr",
        "labels_Tr",
        "cow_seg_labelsTr",
        "gt_segmentations",
        "lung_mask",
        "MASKS_DICOM",
        "averaged-training-labels",
        "Ground Truth",
    ],
)
def test_folders_named_after_labels_are_left_out(name):
    assert is_label_folder(name, {"other"})


@pytest.mark.parametrize(
    "name", ["labelled", "mask_study", "segmentation_paper_data", "GTV", "derivatives", "imagesTr"]
)
def test_folders_that_only_contain_the_letters_of_a_label_are_searched(name):
    assert not is_label_folder(name, {"other"})


# ---------------------------------------------------------------- BIDS


@pytest.fixture
def bids(data: Path) -> Path:
    """Two subjects with T1w and T2w each, the first one in two sessions."""
    number = 0
    for subject, session in (("01", "ses-a"), ("01", "ses-b"), ("02", "")):
        for suffix in ("T1w", "T2w"):
            name = "_".join(filter(None, (f"sub-{subject}", session, "run-1", suffix)))
            write_volume(data / f"sub-{subject}" / session / "anat" / f"{name}.nii.gz", mr(number))
            number += 1
    return data


def cases(dataset: Path) -> list[str]:
    """Return the names of the cases without their hashes."""
    return sorted(re.sub("_[0-9a-f]{12}$", "", case) for case in read_description(dataset)["dataset"])


def test_images_of_several_bids_suffixes_are_refused_with_their_counts(dataset, bids):
    message = import_error(bids)
    assert "images of several kinds: 3 T1w, 3 T2w; import one kind, with --select _T1w, or all of them" in message
    assert not list(dataset.parent.iterdir())


@pytest.mark.parametrize("suffixes", [("1", "2"), ("2019", "2020"), ("pre", "post")])
def test_names_that_only_look_like_bids_are_not_refused(dataset, data, suffixes):
    for number, suffix in enumerate(suffixes):
        write_volume(data / f"sub-01_{suffix}.nii.gz", mr(number))
    run_import(data)
    assert len(cases(dataset)) == 2


def test_patterns_may_follow_the_comma_with_a_space_and_brackets_are_no_wildcards(dataset, bids, capsys):
    write_volume(bids / "[T]_old.nii.gz", mr(9))
    run_import(bids, "--select", "[T], _T1w")
    assert cases(dataset)[0] == "T_old"
    assert "no volume matches" not in capsys.readouterr().out
    run_import(bids, "--select", "[T],_T1w,_bold")
    assert "no volume matches --select _bold" in capsys.readouterr().out
    assert len(cases(dataset)) == 4


def test_one_suffix_is_selected(dataset, bids, capsys):
    run_import(bids, "--select", "_T1w")
    assert_consistent(dataset)
    assert cases(dataset) == ["sub-01_ses-a_run-1_T1w", "sub-01_ses-b_run-1_T1w", "sub-02_run-1_T1w"]
    assert "left out 3 volumes that --select does not name" in capsys.readouterr().out


def test_several_suffixes_become_one_channel_if_it_is_named(dataset, bids):
    run_import(bids, "--channel", "MR")
    assert len(cases(dataset)) == 6
    assert "sub-01_ses-a_run-1_T2w" in cases(dataset)
    run_import(bids)  # the name also holds for what is added later
    assert len(cases(dataset)) == 6


def test_another_suffix_cannot_be_added_under_auto(dataset, bids):
    run_import(bids, "--select", "_T1w")
    assert "3 T1w, 3 T2w" in import_error(bids, "--select", "_T2w")
    run_import(bids, "--select", "_T1w")
    assert len(cases(dataset)) == 3
