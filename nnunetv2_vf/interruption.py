"""Leaving in time: a cluster says with a signal that a job is about to be killed."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 75  # sysexits.h, EX_TEMPFAIL: not done, try again
# SLURM sends SIGTERM before it kills a job, and SIGUSR1 where a script asks for it (--signal); Windows has but one.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class Interruption:
    """Within it, SIGTERM and SIGUSR1 are remembered instead of killing the process.

    Attributes:
        received: the signal's name, once it has come.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._process = os.getpid()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python allows no other one to listen
            self._former = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker forked from this process: it must remain possible to end it
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = signal.Signals(number).name

    @staticmethod
    def defer_the_death_of_workers() -> None:
        """Hear of a worker that died when the next batch is asked for, and not wherever the training happens to be.

        Whoever signals a job signals its workers too, which end of it. torch's loader, once it has workers, listens for
        that and raises an error at any place, in the middle of a step for one.
        """
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
