"""``nnUNetv2_vf fingerprint``: equal to nnU-Net's, in parts, after interruptions, and of a sample."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import edit_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments

from nnunetv2_vf.cli import main
from nnunetv2_vf.preparation.fingerprint import Results, choose_cases, merge
from nnunetv2_vf.preparation.raw_cases import RawCase

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


def test_finished_cases_are_not_read_again_unless_they_change(raw, capsys):
    run("-num_parts", 2, "-part_id", 0)
    for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        shutil.copyfile(raw / f"{kind}Tr" / f"torso_0001{ending}", raw / f"{kind}Tr" / f"torso_0000{ending}")
    for already_finished in ("2/3", "3/3"):
        capsys.readouterr()
        run("-num_parts", 2, "-part_id", 0)
        first_state_of_the_progress_bar = capsys.readouterr().err.split("[")[0]
        assert already_finished in first_state_of_the_progress_bar


def test_no_file_is_written_from_a_case_of_another_part_that_has_changed_since(raw, fingerprint, capsys):
    run("-num_parts", 2, "-part_id", 0)
    os.utime(raw / "imagesTr" / "torso_0002_0000.nii.gz")
    run("-num_parts", 2, "-part_id", 1)
    assert "part 1 of 2 is finished; 1 cases of other parts are not" in capsys.readouterr().out
    assert not fingerprint.exists()


def test_each_channel_gets_the_statistics_of_its_own_intensities(tmp_path):
    generator = np.random.default_rng(0)
    types = (np.float32, np.int16)
    intensities = [[generator.normal(channel, 10, 100).astype(types[channel]) for channel in (0, 1)] for _ in range(5)]
    results = [Results(tmp_path, f"part_{part}_of_2") for part in (0, 1)]
    for number, channels in enumerate(intensities):
        line = {"case": str(number), "shape": [1], "spacing": [1.0], "relative_size": 1.0}
        results[number % 2].append(line, channels)
    lines = results[0].read_lines()
    properties = merge(results[0], [lines[case] for case in "01234"], 2)["foreground_intensity_properties_per_channel"]
    for channel in (0, 1):
        expected = np.concatenate([channels[channel] for channels in intensities])
        assert properties[channel]["mean"] == float(np.mean(expected))
        assert properties[channel]["std"] == float(np.std(expected))
        low, median, high = np.percentile(expected, (0.5, 50.0, 99.5))
        names = ("percentile_00_5", "median", "percentile_99_5")
        assert [properties[channel][name] for name in names] == [low, median, high]


def test_a_line_that_a_kill_has_cut_off_and_its_intensities_do_not_count(fingerprint, expected):
    run("-num_parts", 2, "-part_id", 0)
    (folder,) = (fingerprint.parent / "journals").glob("fingerprint_*")
    journal = folder / "part_0_of_2.jsonl"
    (intensities,) = folder.glob("part_0_of_2_*.intensities")
    journal.write_bytes(journal.read_bytes()[:-20])
    intensities.write_bytes(intensities.read_bytes() + b"cut off")
    run("-num_parts", 2, "-part_id", 0)
    run("-num_parts", 2, "-part_id", 1)
    assert fingerprint.read_bytes() == expected


def test_a_sample_leaves_the_finished_parts_of_the_whole_dataset(fingerprint, expected):
    run("-num_parts", 2, "-part_id", 0)
    run("--sample", 2)
    run("-num_parts", 2, "-part_id", 1, "--clean")
    assert fingerprint.read_bytes() == expected


def test_a_damaged_fingerprint_is_named(fingerprint):
    fingerprint.parent.mkdir(parents=True, exist_ok=True)
    fingerprint.write_text('{"spacings": [')
    with pytest.raises(SystemExit, match=f"{fingerprint} is damaged: .*--clean"):
        run()


def test_labels_that_are_all_empty_are_an_error_in_one_line(raw, fingerprint):
    for file in (raw / "labelsTr").iterdir():
        sitk.WriteImage(sitk.ReadImage(str(file)) * 0, str(file))
    with pytest.raises(SystemExit, match="labels of all cases are empty"):
        run()
    assert not fingerprint.exists()


def test_an_existing_fingerprint_stays(fingerprint, capsys):
    fingerprint.parent.mkdir()
    fingerprint.write_text(json.dumps({"spacings": [[1, 1, 1]]}))
    run()
    assert "exists already, made from 1 cases; this would be 6; to make it again: --clean" in capsys.readouterr().out


def test_a_sample_is_recorded_and_can_be_planned(fingerprint, expected):
    run("--sample", 2, "--seed", 1)
    content = json.loads(fingerprint.read_text())
    assert content["volume_fusion_sample"] == {"cases": 2, "of": CASES, "seed": 1}
    assert len(content["spacings"]) == 2
    assert all(spacing in json.loads(expected)["spacings"] for spacing in content["spacings"])
    plan_experiments([DATASET_ID], gpu_memory_target_in_gb=1)
    assert (fingerprint.parent / "nnUNetPlans.json").is_file()


def test_a_sample_depends_on_the_seed_and_on_the_names_of_the_cases_only():
    cases = {name: RawCase(name, (), "") for name in "abcdefghij"}
    backwards = dict(reversed(cases.items()))
    chosen = [choose_cases(cases, 5, seed) for seed in range(20)]
    assert len({frozenset(choice) for choice in chosen}) > 10
    assert all(choose_cases(backwards, 5, seed) == choice for seed, choice in enumerate(chosen))
    assert all(list(choice) == sorted(choice) for choice in chosen)


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


def test_a_first_case_that_no_reader_of_nnunet_opens_is_named_in_one_line(raw, fingerprint, capsys):
    edit_json(raw / "dataset.json", lambda description: description.pop("overwrite_image_reader_writer", None))
    (raw / "imagesTr" / "torso_0000_0000.nii.gz").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"nnU-Net cannot read .*torso_0000_0000\.nii\.gz; mend or remove this case"):
        run()
    assert "Traceback" not in capsys.readouterr().err


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


@pytest.mark.parametrize("damage", ["short", "missing"])
def test_cases_whose_intensities_are_lost_are_analyzed_again(raw, fingerprint, expected, damage):
    run("-num_parts", 2, "-part_id", 0)
    (intensities,) = fingerprint.parent.glob("journals/*/*.intensities")
    if damage == "short":
        intensities.write_bytes(intensities.read_bytes()[:1000])
    else:
        intensities.unlink()
    run()
    assert fingerprint.read_bytes() == expected


@pytest.mark.parametrize("content", ["null", "[]", '{"labels": {}, "file_ending": ".nii.gz"}'])
def test_a_description_without_channels_is_named_in_one_line(raw, content):
    (raw / "dataset.json").write_text(content)
    with pytest.raises(SystemExit, match=r"dataset\.json or its cases cannot be read: ValueError"):
        run()
