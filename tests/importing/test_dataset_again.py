"""``nnUNetv2_vf import`` again: more volumes, changed ones, interrupted runs, and parts at the same time."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
from unlabelled_data import (
    DATASET,
    check_consistent,
    check_whole,
    children,
    content,
    ct,
    description,
    error_of,
    mr,
    reasons,
    report,
    run,
    start,
    wait_until,
    write,
    write_rejected,
)


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
