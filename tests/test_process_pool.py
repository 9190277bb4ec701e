from __future__ import annotations

import os
import signal
import time

import pytest

from nnunetv2_vf.process_pool import run_in_processes


def do_nothing() -> None:
    """The initializer of the processes."""


def square(item: int) -> int:
    if item < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return item * item


def raise_error(item: int) -> int:
    raise LookupError(f"no {item}")


def test_every_item_is_returned_with_its_result():
    assert dict(run_in_processes(square, range(20), 2, do_nothing, __name__)) == {
        item: item * item for item in range(20)
    }


def test_an_item_that_kills_its_process_has_no_result_and_all_others_have_theirs():
    items = [1, 2, -1, 3, 4, 5, -2, 6]
    expected = {item: item * item if item > 0 else None for item in items}
    assert dict(run_in_processes(square, items, 2, do_nothing, __name__)) == expected


def test_an_exception_of_the_function_is_raised_to_the_caller():
    with pytest.raises(LookupError, match="no 7"):
        list(run_in_processes(raise_error, [7], 1, do_nothing, __name__))


def test_items_are_taken_only_as_they_are_needed():
    taken = []
    items = (taken.append(item) or item for item in range(100))
    results = run_in_processes(square, items, 1, do_nothing, __name__)
    next(results)
    assert len(taken) < 10
    results.close()
