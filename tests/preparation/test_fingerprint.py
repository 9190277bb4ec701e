"""``nnUNetv2_vf fingerprint``: equal to nnU-Net's, in parts, after interruptions, and of a sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

from nnunetv2_vf.cli import main

DATASET_ID, DATASET, CASES = 30, "Dataset030_Raw", 6


def run(*arguments: object) -> None:
    main(["fingerprint", "-d", str(DATASET_ID), "-np", "1", *map(str, arguments)])


@pytest.fixture
def fingerprint(raw: Path) -> Path:
    return raw.parents[1] / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json"


@pytest.fixture
def expected(stock: Path) -> bytes:
    return (stock / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json").read_bytes()


def test_the_file_is_that_of_nnunet_byte_by_byte(fingerprint, expected, capsys):
    for part in (2, 1, 0):
        assert not fingerprint.exists()
        run("-num_parts", 3, "-part_id", part)
        output = capsys.readouterr().out
        assert ("next: nnUNetv2_plan_experiment -d 30" in output) == (part == 0)
    assert fingerprint.read_bytes() == expected
    assert {file.suffix for file in fingerprint.parent.glob("journals/*/*")} == {".lock"}
    run()
    assert "exists already; to make it again: --clean" in capsys.readouterr().out


def test_a_case_without_foreground_changes_the_file_as_in_nnunet(stock, raw, fingerprint):
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints

    label_file = raw / "labelsTr" / "torso_0002.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(label_file)) * 0, str(label_file))
    run()
    ours = fingerprint.read_bytes()
    extract_fingerprints([DATASET_ID], num_processes=1)
    assert fingerprint.read_bytes() == ours


def test_finished_cases_are_not_read_again_unless_they_change(raw, fingerprint, expected, capsys):
    run("-num_parts", 2, "-part_id", 0)
    for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        shutil.copyfile(raw / f"{kind}Tr" / f"torso_0001{ending}", raw / f"{kind}Tr" / f"torso_0000{ending}")
    capsys.readouterr()
    run()
    assert "2/6" in capsys.readouterr().err  # of the three cases of part 0, two are still done
    assert fingerprint.read_bytes() != expected


def test_a_line_that_a_kill_has_cut_off_and_its_intensities_do_not_count(fingerprint, expected):
    run("-num_parts", 2, "-part_id", 0)
    folder = fingerprint.parent / "journals" / "fingerprint"
    journal, intensities = folder / "part_0_of_2.jsonl", folder / "part_0_of_2.intensities"
    journal.write_bytes(journal.read_bytes()[:-20])
    intensities.write_bytes(intensities.read_bytes() + b"cut off")
    run("-num_parts", 2, "-part_id", 0)
    run("-num_parts", 2, "-part_id", 1)
    assert fingerprint.read_bytes() == expected


def test_an_existing_fingerprint_stays(fingerprint, capsys):
    fingerprint.parent.mkdir()
    fingerprint.write_text(json.dumps({"spacings": [[1, 1, 1]]}))
    run()
    assert "exists already, of 1 other cases; to make it again: --clean" in capsys.readouterr().out


def test_a_sample_is_the_same_for_the_same_seed_and_recorded(fingerprint, expected):
    contents = []
    for seed in (1, 1, 2):
        run("--sample", 2, "--seed", seed, "--clean")
        contents.append(json.loads(fingerprint.read_text()))
    assert contents[0] == contents[1] != contents[2]
    assert contents[0]["volume_fusion_sample"] == {"cases": 2, "of": CASES, "seed": 1}
    everything = json.loads(expected)
    assert len(contents[0]["spacings"]) == 2
    assert all(spacing in everything["spacings"] for spacing in contents[0]["spacings"])
    plan_experiments([DATASET_ID], gpu_memory_target_in_gb=1)
    assert (fingerprint.parent / "nnUNetPlans.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "7"], "--sample is 7; legal: 1 to 6"),
        (["-np", "0"], "-np is 0"),
        (["-num_parts", "2", "-part_id", "2"], "--part_id is 2; with --num_parts 2"),
        (["-d", "31"], "no dataset 31"),
    ],
)
def test_illegal_values_are_refused(fingerprint, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(*arguments)
    assert not fingerprint.parent.exists()


def test_a_damaged_case_is_named_and_no_fingerprint_is_written(raw, fingerprint, expected):
    run("-num_parts", 2, "-part_id", 1)  # torso_0003 is finished before it is damaged
    damaged = raw / "imagesTr" / "torso_0003_0000.nii.gz"
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(SystemExit, match="1 of 6 cases failed, the first is torso_0003: RuntimeError"):
        run()
    assert not fingerprint.exists()
    damaged.write_bytes(content)
    run()
    assert fingerprint.read_bytes() == expected
