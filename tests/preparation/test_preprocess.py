"""``nnUNetv2_vf preprocess``: equal to nnU-Net's, in parts, and after interruptions without doing anything twice."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from conftest import edit_json
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments, preprocess
from raw_datasets import set_folders

from nnunetv2_vf.cli import main
from nnunetv2_vf.demo.phantoms import write_dataset

DATASET_ID, DATASET, CASES = 30, "Dataset030_Raw", 6
IDENTIFIER = "nnUNetPlans_3d_fullres"


def run(*arguments: object) -> None:
    main(["preprocess", "-d", str(DATASET_ID), "-c", "3d_fullres", "-np", "1", *map(str, arguments)])


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def assert_equal_to_stock(preprocessed: Path, stock: Path, identifier: str = IDENTIFIER) -> None:
    ours, reference = (folder / identifier for folder in (preprocessed, stock / "nnUNet_preprocessed" / DATASET))
    assert files(ours) == files(reference)
    for file in reference.iterdir():
        if file.suffix == ".b2nd":
            one, other = (blosc2.open(str(folder / file.name), mode="r")[:] for folder in (ours, reference))
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)
        else:
            one, other = (pickle.loads((folder / file.name).read_bytes()) for folder in (ours, reference))
            np.testing.assert_equal(one, other)
    labels, stock_labels = (folder.parent / "gt_segmentations" for folder in (ours, reference))
    assert files(labels) == files(stock_labels)
    assert not list(preprocessed.glob("journals/*/*.scratch"))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_cases_are_those_of_nnunet(preprocessed, stock, capsys, num_parts):
    for part in range(num_parts):
        run("-num_parts", num_parts, "-part_id", part)
        output = capsys.readouterr().out
        is_last = part == num_parts - 1
        assert ("all 6 cases are preprocessed\nnext, to pretrain: nnUNetv2_train 30" in output) == is_last
    assert_equal_to_stock(preprocessed, stock)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_channels_regions_and_voxels_to_ignore_are_treated_as_by_nnunet(
    tmp_path, monkeypatch, fast_processes, capsys, configuration
):
    """A dataset with two channels, planned by nnU-Net from a made-up fingerprint."""
    for folder in (tmp_path / "stock", tmp_path / "ours"):
        set_folders(folder, monkeypatch)
        write_regions_dataset(folder / "nnUNet_raw" / DATASET)
        preprocessed = folder / "nnUNet_preprocessed" / DATASET
        write_fingerprint(preprocessed)
        plan_experiments([DATASET_ID], gpu_memory_target_in_gb=1)
        if folder.name == "stock":
            preprocess([DATASET_ID], configurations=[configuration], num_processes=[1])
    main(["preprocess", "-d", str(DATASET_ID), "-c", configuration, "-np", "1"])
    assert_equal_to_stock(preprocessed, tmp_path / "stock", f"nnUNetPlans_{configuration}")
    assert ("nnUNetv2_train" in capsys.readouterr().out) == (configuration != "2d")  # 2d cannot be pretrained


def write_regions_dataset(folder: Path) -> None:
    write_dataset(folder, range(2), spacing=16)
    for case in ("torso_0000", "torso_0001"):
        image = sitk.ReadImage(str(folder / "imagesTr" / f"{case}_0000.nii.gz"))
        sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32) * 0.3, str(folder / "imagesTr" / f"{case}_0001.nii.gz"))
        label_file = str(folder / "labelsTr" / f"{case}.nii.gz")
        labels = sitk.GetArrayFromImage(sitk.ReadImage(label_file))
        labels = np.where(labels > 3, 3, labels)  # 3: ignore
        labels[0] = 0
        changed = sitk.GetImageFromArray(labels)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, label_file)

    def change(description: dict) -> None:
        labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
        description.update(channel_names={"0": "CT", "1": "MR"}, labels=labels, regions_class_order=[1, 2])

    edit_json(folder / "dataset.json", change)


def write_fingerprint(preprocessed: Path) -> None:
    preprocessed.mkdir()
    statistics = {"mean": 50.0, "median": 50.0, "std": 100.0, "min": -500.0, "max": 900.0}
    fingerprint = {
        "spacings": [[16.0, 16.0, 16.0]] * 2,
        "shapes_after_crop": [[15, 14, 20]] * 2,
        "foreground_intensity_properties_per_channel": {
            str(channel): {**statistics, "percentile_00_5": -200.0, "percentile_99_5": 400.0} for channel in range(2)
        },
        "median_relative_size_after_cropping": 1.0,
    }
    (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


def test_what_is_done_and_whole_is_not_done_again(preprocessed, stock):
    run("-num_parts", 2, "-part_id", 0)
    folder = preprocessed / IDENTIFIER
    done = times(folder)
    assert len(done) == 9
    damaged, removed = folder / "torso_0000.b2nd", folder / "torso_0002.pkl"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    removed.unlink()
    run()
    assert_equal_to_stock(preprocessed, stock)
    kept = {name for name in done if times(folder)[name] == done[name]}
    assert kept == {name for name in done if name.startswith("torso_0004")}


def test_cases_are_done_again_if_they_or_what_matters_of_the_plans_change(raw, preprocessed):
    run()
    folder, plans_file = preprocessed / IDENTIFIER, preprocessed / "nnUNetPlans.json"
    done = times(folder)
    os.utime(raw / "imagesTr" / "torso_0001_0000.nii.gz")
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration.update(batch_size=7)
    plans_file.write_text(json.dumps(plans))
    run()
    again = times(folder)
    assert {name for name in done if done[name] != again[name]} == {
        name for name in done if name.startswith("torso_0001")
    }
    configuration.update(spacing=[20.0, 20.0, 20.0])
    plans_file.write_text(json.dumps(plans))
    run()
    assert all(again[name] != time for name, time in times(folder).items())


def test_added_cases_are_done_and_the_files_of_removed_ones_are_removed(raw, preprocessed, capsys):
    run()
    folder = preprocessed / IDENTIFIER
    done = times(folder)
    for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (raw / f"{kind}Tr" / f"torso_0000{ending}").rename(raw / f"{kind}Tr" / f"new{ending}")
    run()
    assert not list(folder.glob("torso_0000*"))
    assert len(list(folder.glob("new*"))) == 3
    kept = {name: time for name, time in done.items() if not name.startswith("torso_0000")}
    assert kept.items() <= times(folder).items()


def list_cases(raw: Path) -> None:
    """List the cases in dataset.json, as an import does: they belong to the dataset even if their files are gone."""

    def change(description: dict) -> None:
        description["dataset"] = {
            f"torso_{number:04d}": {
                "images": [f"imagesTr/torso_{number:04d}_0000.nii.gz"],
                "label": f"labelsTr/torso_{number:04d}.nii.gz",
            }
            for number in range(CASES)
        }

    edit_json(raw / "dataset.json", change)


def test_preprocessed_files_stay_while_the_raw_files_are_away(raw, preprocessed, stock):
    list_cases(raw)
    run()
    before = times(preprocessed / IDENTIFIER)
    (raw / "imagesTr").rename(raw / "unmounted")
    with pytest.raises(SystemExit, match="6 of 6 cases failed"):
        run()
    assert times(preprocessed / IDENTIFIER) == before
    (raw / "unmounted").rename(raw / "imagesTr")
    run()
    assert times(preprocessed / IDENTIFIER) == before


def test_a_case_of_another_part_that_has_changed_since_is_not_finished(raw, preprocessed, stock, capsys):
    run("-num_parts", 2, "-part_id", 0)
    (preprocessed / IDENTIFIER / "torso_0000.b2nd").unlink()
    os.utime(raw / "imagesTr" / "torso_0002_0000.nii.gz")
    run("-num_parts", 2, "-part_id", 1)
    assert "part 1 of 2 is finished; 2 cases of other parts are not" in capsys.readouterr().out
    run()
    assert_equal_to_stock(preprocessed, stock)


def test_removed_cases_are_removed_although_another_one_fails(raw, preprocessed, capsys):
    run()
    for path in (raw / "imagesTr" / "torso_0000_0000.nii.gz", raw / "labelsTr" / "torso_0000.nii.gz"):
        path.unlink()
    (raw / "imagesTr" / "torso_0003_0000.nii.gz").write_bytes(b"")
    with pytest.raises(SystemExit, match="1 of 5 cases failed"):
        run()
    assert "4 of 5 cases are preprocessed; 1 have failed" in capsys.readouterr().out
    assert {name[:10] for name in files(preprocessed / IDENTIFIER)} == {f"torso_000{number}" for number in (1, 2, 4, 5)}


def test_plans_that_were_moved_without_their_dataset_json_are_enough(preprocessed, stock):
    (preprocessed / "dataset.json").unlink()
    run()
    assert_equal_to_stock(preprocessed, stock)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bad": {"inherits_from": "gone"}}, "configuration 'bad' of the plans nnUNetPlans cannot be read: "),
        (
            {"bad": {"inherits_from": "3d_fullres", "preprocessor_name": "Own"}},
            "nnU-Net has no preprocessor Own, which",
        ),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(preprocessed, change, message):
    edit_json(preprocessed / "nnUNetPlans.json", lambda plans: plans["configurations"].update(change))
    with pytest.raises(SystemExit, match=message):
        run("-c", "bad")


def test_a_dataset_json_that_cannot_be_read_is_refused(raw, preprocessed):
    (raw / "dataset.json").write_text("{")
    with pytest.raises(SystemExit, match=r"dataset.json or its cases cannot be read: JSONDecodeError"):
        run()


def test_a_case_that_fails_is_named_and_left_out(raw, preprocessed, stock):
    (preprocessed / IDENTIFIER).mkdir()
    (preprocessed / IDENTIFIER / "torso_0003.b2nd").write_bytes(b"of an earlier preprocessing")
    damaged = raw / "imagesTr" / "torso_0003_0000.nii.gz"
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"1 of 6 cases failed, the first is torso_0003: RuntimeError.*mend or remove"):
        run()
    assert len(files(preprocessed / IDENTIFIER)) == 15
    damaged.write_bytes(content)
    run()
    assert_equal_to_stock(preprocessed, stock)


def test_a_killed_run_leaves_whole_cases_only_and_continues(preprocessed, stock):
    folder = preprocessed / IDENTIFIER
    command = [sys.executable, "-m", "nnunetv2_vf", "preprocess", "-d", str(DATASET_ID), "-np", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(folder.glob("*.b2nd")):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1)  # its worker ends with it
    for image in folder.glob("torso_000?.b2nd"):
        assert {image.with_suffix(".pkl").name, f"{image.stem}_seg.b2nd"} <= {*files(folder)}
        assert blosc2.open(str(image), mode="r")[:].size
    run()
    assert_equal_to_stock(preprocessed, stock)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "4d"], "the plans nnUNetPlans have no configuration '4d'; legal: .*3d_fullres"),
        (["-plans_name", "Other"], "no plans .*Other.json"),
        (["-np", "0"], "-np is 0"),
        (["-part_id", "1"], "--part_id is 1; with --num_parts 1"),
    ],
)
def test_illegal_values_are_refused(preprocessed, arguments, message):
    before = files(preprocessed)
    with pytest.raises(SystemExit, match=message):
        run(*arguments)
    assert files(preprocessed) == before


def test_a_dataset_without_raw_files_is_refused(raw, preprocessed):
    shutil.rmtree(raw)
    with pytest.raises(SystemExit, match=r"no raw dataset Dataset030_Raw: .*dataset.json does not exist"):
        run()
