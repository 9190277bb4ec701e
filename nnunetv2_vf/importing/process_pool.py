"""Work through many items in processes of which any may be killed. Knows nothing of what the work is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def run_in_processes(
    job: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    initializer: Callable[[], None],
) -> Iterator[tuple[Item, Result | None]]:
    """Yield every item with its result, in the order they end; None for an item whose process died of it.

    When a process dies, the items that were in work are done again, each in a process of its own, so that the one that
    is to blame is found. The processes end with the one that calls, even if that is killed.

    Args:
        job: can be pickled; what it raises is raised here.
        initializer: run once in each process; can be pickled.
    """
    remaining = iter(items)
    while True:
        at_work: list[Item] = []
        pool = _pool(processes, initializer)
        try:
            futures: dict[Future[Result], Item] = {}
            while True:
                for item in islice(remaining, 2 * processes - len(at_work)):
                    at_work.append(item)
                    futures[pool.submit(job, item)] = item
                if not at_work:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    result, item = future.result(), futures.pop(future)
                    at_work.remove(item)
                    yield item, result
        except BrokenProcessPool:
            for suspect in at_work:
                yield suspect, _alone(job, suspect, initializer)
        finally:
            pool.shutdown(cancel_futures=True)


def _alone(job: Callable[[Item], Result], item: Item, initializer: Callable[[], None]) -> Result | None:
    try:
        with _pool(1, initializer) as pool:
            return pool.submit(job, item).result()
    except BrokenProcessPool:
        return None


def _pool(processes: int, initializer: Callable[[], None]) -> ProcessPoolExecutor:
    # spawn: the same on all systems, and no copy of this process's threads and memory
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (initializer,))


def _start(initializer: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that calls
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    initializer()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
