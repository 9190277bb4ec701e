"""Imports that are killed, interrupted or split into parts, full disks, and damaged journals."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from unlabelled_data import (
    DATASET,
    assert_consistent,
    assert_no_partial_case,
    ct,
    image_times,
    import_error,
    read_description,
    read_user_files,
    run_import,
    start_import,
    wait_until,
    write_rejected_volumes,
    write_volume,
)

from nnunetv2_vf.importing.case_files import CaseFiles
from nnunetv2_vf.importing.settings import ImportSettings
from nnunetv2_vf.importing.sources import Source, is_in_part
from nnunetv2_vf.importing.worker import import_source


@pytest.fixture
def other_dataset(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Switches ``nnUNet_raw`` to a second, empty folder; returns the folder of the dataset in it."""

    def switch() -> Path:
        (tmp_path / "other_raw").mkdir()
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "other_raw"))
        return tmp_path / "other_raw" / DATASET

    return switch


def count_images(dataset: Path) -> int:
    return len(list((dataset / "imagesTr").glob("*")))


def child_processes(process: subprocess.Popen) -> list[Path]:
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [Path("/proc", pid) for pid in pids]


# ---------------------------------------------------------------- interruptions


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc to find child processes")
def test_a_killed_import_leaves_no_partial_case_and_resumes_to_the_same_dataset(dataset, data, other_dataset):
    num_volumes = 30
    for number in range(num_volumes):
        write_volume(data / f"{number:02d}.nii.gz", ct(number, (48, 48, 48)))
    run_import(data, "-np", 2)
    killed_dataset = other_dataset()
    random_number = random.Random(0)
    kills, times = 0, {}
    while kills < 2 and count_images(killed_dataset) < num_volumes - 5:
        target = count_images(killed_dataset) + random_number.randrange(1, 5)
        process = start_import(data)
        wait_until(lambda target=target: count_images(killed_dataset) >= target)
        children = child_processes(process)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
        wait_until(lambda children=children: not any(child.exists() for child in children))
        assert_no_partial_case(killed_dataset)
        new_times = image_times(killed_dataset)
        # At most two images were in place, but not yet in the journal, when the process was killed.
        assert sum(new_times[path] != times[path] for path in times) <= 2
        times = new_times
    assert kills
    run_import(data)
    assert_consistent(killed_dataset)
    assert read_description(killed_dataset) == read_description(dataset)
    files, expected = read_user_files(killed_dataset), read_user_files(dataset)
    del files["dataset.json"], expected["dataset.json"]
    assert files == expected


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_prints_one_line_and_the_same_command_continues(dataset, data):
    for number in range(20):
        write_volume(data / f"{number:02d}.nii.gz", ct(number, (48, 48, 48)))
    # A job in the background ignores SIGINT unless it is told to handle it.
    handle_sigint = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = start_import(data, preexec_fn=handle_sigint)
    wait_until(lambda: count_images(dataset) > 0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.endswith("nnUNetv2_vf: error: interrupted; run the same command to continue\n")
    assert "Traceback" not in errors
    run_import(data)
    assert_consistent(dataset)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX limit on the size of files")
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_full_disk_is_reported_and_leaves_no_partial_case(dataset, data, ending):
    import resource

    write_volume(data / "1.nii.gz", ct(1, (16, 16, 16)))
    write_volume(data / "2.nii.gz", np.random.default_rng(0).integers(0, 30000, (64, 64, 64)).astype(np.int16))
    limit_bytes = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # noqa: E731
    process = start_import(data, "--channel", "CT", "--file-ending", ending, preexec_fn=limit_bytes)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "nnUNetv2_vf: error: cannot write to" in errors
    assert "Traceback" not in errors
    assert_no_partial_case(dataset)
    assert count_images(dataset) <= 1
    run_import(data, "--channel", "CT", "--file-ending", ending)
    assert_consistent(dataset)


# ---------------------------------------------------------------- parts


def test_two_parts_at_the_same_time_make_the_same_dataset_as_one_import(dataset, data, other_dataset):
    write_rejected_volumes(data)
    for number in range(4):
        write_volume(data / f"x{number}.nii.gz", ct(10 + number))
    write_volume(data / "y3.nii.gz", ct(13))  # a duplicate, which may be in the other part
    run_import(data)
    expected = read_user_files(dataset)
    parts_dataset = other_dataset()
    parts = [start_import(data, "--num_parts", 2, "--part_id", part) for part in range(2)]
    for part in parts:
        part.communicate(timeout=120)
    assert [part.returncode for part in parts] == [0, 0]
    assert_consistent(parts_dataset)
    assert read_user_files(parts_dataset) == expected
    run_import(data, "--num_parts", 2, "--part_id", 0)
    assert read_user_files(parts_dataset) == expected


def test_a_single_part_writes_no_dataset_and_a_run_without_parts_completes_it(dataset, data, capsys):
    for number in range(12):
        write_volume(data / f"{number}.nii.gz", ct(number))
    # The part depends on the path, and so on the temporary folder.
    (part,) = [part for part in range(3) if is_in_part(Source((str(data / "0.nii.gz"),), ""), part, 3)]
    run_import(data, "--num_parts", 3, "--part_id", part)
    assert f"part {part} of 3 is finished" in capsys.readouterr().out
    assert not (dataset / "dataset.json").exists()
    times = image_times(dataset)
    assert 0 < len(times) < 12
    run_import(data)
    assert_consistent(dataset)
    assert len(read_description(dataset)["dataset"]) == 12
    assert times.items() <= image_times(dataset).items()


def test_the_same_part_cannot_run_twice_at_the_same_time(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    with FileLock(dataset / "import_journals" / "part_0_of_1.lock"):
        assert "part_0_of_1 is already running" in import_error(data)


# ---------------------------------------------------------------- damaged journals


def test_a_truncated_journal_loses_only_its_last_source(dataset, data):
    for number in range(3):
        write_volume(data / f"{number}.nii.gz", ct(number))
    run_import(data)
    expected = read_user_files(dataset)
    journal = dataset / "import_journals" / "part_0_of_1.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    run_import(data)
    assert read_user_files(dataset) == expected
    assert len(journal.read_bytes().splitlines()) == 4


def test_a_journal_line_whose_case_leads_out_of_the_dataset_is_ignored(dataset, data):
    write_volume(data / "0.nii.gz", ct(0))
    run_import(data)
    expected = read_user_files(dataset)
    journal = dataset / "import_journals" / "part_0_of_1.jsonl"
    case = json.loads(journal.read_text().splitlines()[0])["rows"][0]["case"]
    journal.write_text(journal.read_text().replace(f'"{case}"', f'"../{case}"'))
    run_import(data)
    assert read_user_files(dataset) == expected


@pytest.mark.parametrize("content", ["", '["/data'])
def test_a_list_of_sources_that_a_power_failure_has_emptied_is_rebuilt(dataset, data, content):
    write_volume(data / "first" / "1.nii.gz", ct(1))
    write_volume(data / "second" / "2.nii.gz", ct(2))
    run_import(data / "first")
    (dataset / "import_journals" / "merged.json").write_text(content)
    run_import(data / "second")
    assert_consistent(dataset)
    assert read_description(dataset)["numTraining"] == 2


def test_cases_stay_if_a_power_failure_has_emptied_the_description_too(dataset, data):
    write_volume(data / "first" / "1.nii.gz", ct(1))
    write_volume(data / "second" / "2.nii.gz", ct(2))
    run_import(data / "first")
    for file in (dataset / "import_journals" / "merged.json", dataset / "dataset.json"):
        file.write_text("")
    assert "remove it and run the same command again" in import_error(data / "second")
    (dataset / "dataset.json").unlink()
    run_import(data / "second")
    assert_consistent(dataset)
    assert read_description(dataset)["numTraining"] == 2


def test_a_clock_that_was_ahead_does_not_block_later_imports(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    run_import(data)
    (journal,) = (dataset / "import_journals").glob("*.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text("".join(json.dumps({**line, "time": line["time"] + 1e6}) + "\n" for line in lines))
    write_volume(data / "1.nii.gz", ct(2, (22, 24, 28)))
    run_import(data)
    assert_consistent(dataset)
    times = image_times(dataset)
    run_import(data)
    assert image_times(dataset) == times


def test_the_files_that_a_killed_part_was_writing_are_removed_when_the_dataset_is_written(dataset, data):
    write_volume(data / "1.nii.gz", ct(1))
    scratch = dataset / "import_journals" / "part_3_of_4.scratch"
    scratch.mkdir(parents=True)
    (scratch / "half.nii.gz").touch()
    run_import(data)
    assert_consistent(dataset)  # asserts that there is no scratch folder


def test_a_source_whose_files_vanish_before_they_are_read_gets_a_row(tmp_path):
    settings = ImportSettings()
    case_files = CaseFiles(tmp_path, tmp_path, settings.file_ending, 1)
    (row,) = import_source(case_files, settings, Source((str(tmp_path),), "20 files 0"))
    assert row.reason == "unreadable: no DICOM file is left"
