"""Work through many items in processes of which any may be killed. Knows nothing of what the work is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
    waiting = deque(items)
    while waiting:
        running: dict[Future[Result], Item] = {}
        try:
            with _pool(processes, initializer) as pool:
                while waiting or running:
                    while waiting and len(running) < 2 * processes:
                        item = waiting.popleft()
                        running[pool.submit(job, item)] = item
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        result = future.result()
                        yield running.pop(future), result
        except BrokenProcessPool:
            for suspect in running.values():
                yield suspect, _alone(job, suspect, initializer)


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
