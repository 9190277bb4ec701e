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

from nnunetv2_vf.cli import main

DATASET_ID, DATASET, CASES = 30, "Dataset030_Raw", 6
IDENTIFIER = "nnUNetPlans_3d_fullres"


def run(*arguments: object) -> None:
    main(["preprocess", "-d", str(DATASET_ID), "-c", "3d_fullres", "-np", "1", *map(str, arguments)])


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def assert_equal_to_stock(preprocessed: Path, stock: Path) -> None:
    ours, reference = (folder / IDENTIFIER for folder in (preprocessed, stock / "nnUNet_preprocessed" / DATASET))
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
        assert ("all 6 cases are preprocessed\nnext: nnUNetv2_train 30" in output) == (part == num_parts - 1)
    assert_equal_to_stock(preprocessed, stock)


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


def test_a_case_that_fails_is_named_and_left_out(raw, preprocessed, stock):
    (preprocessed / IDENTIFIER).mkdir()
    (preprocessed / IDENTIFIER / "torso_0003.b2nd").write_bytes(b"of an earlier preprocessing")
    damaged = raw / "imagesTr" / "torso_0003_0000.nii.gz"
    content = damaged.read_bytes()
    damaged.write_bytes(b"")
    with pytest.raises(SystemExit, match=r"1 of 6 cases failed, the first is torso_0003: RuntimeError.*left out"):
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
