from __future__ import annotations

import os
import signal
import time

import pytest

from nnunetv2_vf.importing.process_pool import run_in_processes


def nothing() -> None:
    """For the start of a process."""


def work(item: int) -> int:
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return item * item


def fail(item: int) -> int:
    raise LookupError(f"no {item}")


def test_every_item_gets_its_result():
    assert dict(run_in_processes(work, range(20), 2, nothing)) == {item: item * item for item in range(20)}


def test_an_item_that_kills_its_process_costs_no_other_item():
    items = [1, 2, -1, 3, 4, 5, -2, 6]
    expected = {item: item * item if item > 0 else None for item in items}
    assert dict(run_in_processes(work, items, 2, nothing)) == expected


def test_what_the_job_raises_is_raised_here():
    with pytest.raises(LookupError, match="no 7"):
        list(run_in_processes(fail, [7], 1, nothing))


def test_items_are_taken_as_they_are_needed():
    """110,000 items do not wait in a queue."""
    taken = []
    items = (taken.append(item) or item for item in range(100))
    results = run_in_processes(work, items, 1, nothing)
    next(results)
    assert len(taken) < 10
    results.close()
