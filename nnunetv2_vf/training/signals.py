"""Leaving in time: a cluster says with a signal that a job is about to be killed, a user presses Ctrl-C."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_STATUS = 75  # sysexits.h, EX_TEMPFAIL: not done, try again
STOPPED = 128 + signal.SIGINT  # what shells make of Ctrl-C: a loop that tries again on 75 ends
# SLURM sends SIGTERM before it kills a job, and SIGUSR1 where a script asks for it (--signal), which Windows lacks.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
_ONE_CTRL_C = 1.0  # seconds: launchers pass on what the terminal has already sent
_ABOUT_CTRL_C = b"\nCtrl-C: saves before the next step and leaves; once more: leaves at once\n"


class Interruption:
    """Within it, SIGTERM, SIGUSR1 and a first Ctrl-C (SIGINT) are remembered instead of killing the process.

    Attributes:
        received: the signal's name, once it has come.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._asked_at = -math.inf
        self._process = os.getpid()
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python allows no other one to listen
            self._former = {number: signal.signal(number, self._remember) for number in self._heard()}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    @staticmethod
    def _heard() -> list[signal.Signals]:
        """All, but for a Ctrl-C that is not meant for this process: shells have it ignored in what runs behind &."""
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return [number for number in _SIGNALS if not (ignored and number == signal.SIGINT)]

    @property
    def by_ctrl_c(self) -> bool:
        """Whether it was a user who asked."""
        return self.received == signal.SIGINT.name

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker forked from this process
            if number == signal.SIGINT:  # the terminal asks all of them; the training ends its workers itself
                return
            signal.signal(number, signal.SIG_DFL)  # it must remain possible to end it
            os.kill(os.getpid(), number)
        if number == signal.SIGINT:
            self._ctrl_c(frame)
        elif not self.by_ctrl_c:  # whoever pressed Ctrl-C wants no new start
            self.received = signal.Signals(number).name

    def _ctrl_c(self, frame: FrameType | None) -> None:
        if not self.by_ctrl_c:
            self.received, self._asked_at = signal.SIGINT.name, time.monotonic()
            with contextlib.suppress(OSError):  # the terminal, or a pipe to tee, may be gone
                os.write(2, _ABOUT_CTRL_C)  # print may have been interrupted in the middle of a line
        elif time.monotonic() - self._asked_at > _ONE_CTRL_C:
            signal.default_int_handler(signal.SIGINT, frame)  # raises KeyboardInterrupt

    @staticmethod
    def defer_the_death_of_workers() -> None:
        """Hear of a worker that died when the next batch is asked for, and not wherever the training happens to be.

        Whoever signals a job signals its workers too, which end of it. torch's loader, once it has workers, listens for
        that and raises an error at any place, in the middle of a step for one.
        """
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
