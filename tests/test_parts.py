"""Locks of the parts of a work that several machines share."""

from __future__ import annotations

import errno
import os

import pytest

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.parts import PartJournals


def test_a_part_that_runs_cannot_be_started_again(tmp_path):
    with (
        PartJournals(tmp_path, "part_0_of_1").lock_part(),
        pytest.raises(UserError, match="part_0_of_1 is already running"),
        PartJournals(tmp_path, "part_0_of_1").lock_part(),
    ):
        pass


@pytest.mark.skipif(os.name != "posix", reason="flock is a function of POSIX systems")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_on_a_file_system_without_locks_nothing_is_locked_and_no_lock_remains(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    for _ in range(2):  # the first one is killed: it does not release its lock
        with PartJournals(tmp_path, "part_0_of_1").lock_part(), PartJournals(tmp_path, "part_0_of_1").lock_part():
            pass
    (tmp_path / "part_1_of_2.scratch").mkdir()  # perhaps of a part that runs
    PartJournals(tmp_path, "part_0_of_2").remove_leftover_scratch_folders()
    assert (tmp_path / "part_1_of_2.scratch").is_dir()


def test_only_the_scratch_folders_of_parts_that_run_stay(tmp_path):
    for part in (0, 1):
        (tmp_path / f"part_{part}_of_2.scratch").mkdir()
    with PartJournals(tmp_path, "part_0_of_2").lock_part():
        PartJournals(tmp_path, "part_1_of_2").remove_leftover_scratch_folders()
    assert [folder.name for folder in tmp_path.glob("*.scratch")] == ["part_0_of_2.scratch"]
