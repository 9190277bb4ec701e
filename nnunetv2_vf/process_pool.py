"""Run a function on many items in several processes, and survive the death of any process."""

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
    function: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    initializer: Callable[[], None],
    preload: str,
) -> Iterator[tuple[Item, Result | None]]:
    """Yield every item with its result, in the order in which they finish.

    If a process dies, each item that was in progress runs again in a process of its own. An item whose process dies
    again has the result None. The processes end with the calling process, even if that one is killed.

    Args:
        function: must be picklable. Its exceptions are raised here.
        items: taken only as they are needed.
        initializer: runs once in each process; must be picklable.
        preload: name of the module that the function needs. It is imported once, and the processes are forks of the
            process that has imported it: importing torch in each of 16 processes would take longer than their work on
            a small dataset. They have the environment variables of the first call.
    """
    remaining = iter(items)
    while True:
        in_progress: list[Item] = []
        pool = _create_pool(processes, initializer, preload)
        try:
            futures: dict[Future[Result], Item] = {}
            while True:
                for item in islice(remaining, 2 * processes - len(in_progress)):
                    in_progress.append(item)  # before submit(), which raises if a process has died
                    futures[pool.submit(function, item)] = item
                if not in_progress:
                    return
                for future in wait(futures, return_when=FIRST_COMPLETED).done:
                    result, item = future.result(), futures.pop(future)
                    in_progress.remove(item)
                    yield item, result
        except BrokenProcessPool:
            for item in in_progress:
                yield item, _run_alone(function, item, initializer, preload)
        finally:
            pool.shutdown(cancel_futures=True)


def _run_alone(
    function: Callable[[Item], Result], item: Item, initializer: Callable[[], None], preload: str
) -> Result | None:
    try:
        with _create_pool(1, initializer, preload) as pool:
            return pool.submit(function, item).result()
    except BrokenProcessPool:
        return None


def _create_pool(processes: int, initializer: Callable[[], None], preload: str) -> ProcessPoolExecutor:
    # Neither method copies this process's threads and memory. Windows has only the second one.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload([preload])
    return ProcessPoolExecutor(processes, context, _start_process, (initializer,))


def _start_process(initializer: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the calling process handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    initializer()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
