"""Signals that stop a training: SIGTERM and SIGUSR1 from a cluster before it kills a job, Ctrl-C from a user."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_RESUBMIT = 75  # EX_TEMPFAIL in sysexits.h: the job is not done, start it again
EXIT_CTRL_C = 128 + signal.SIGINT  # the status of shells after Ctrl-C; scripts that restart on 75 do not restart
# SLURM sends SIGTERM before it kills a job, and SIGUSR1 if the script asks for it (--signal). Windows has no SIGUSR1.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]
# A launcher passes on the Ctrl-C that the terminal has already sent to all processes. Two within this time are one.
_SAME_CTRL_C_SECONDS = 1.0
_CTRL_C_MESSAGE = b"\nCtrl-C: saving before the next step, then exit; press it again to exit at once\n"


class StopSignals:
    """Context manager that records SIGTERM, SIGUSR1 and the first Ctrl-C (SIGINT) instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt.

    Attributes:
        received: the name of the signal; None if none came. Ctrl-C replaces an earlier signal.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._ctrl_c_at = -math.inf
        self._process = os.getpid()
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python handles signals in no other thread
            self._previous_handlers = {
                number: signal.signal(number, self._handle) for number in _SIGNALS if not _is_ignored(number)
            }
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    @property
    def by_ctrl_c(self) -> bool:
        """True if a user pressed Ctrl-C, also if a cluster's signal came later."""
        return self.received == signal.SIGINT.name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            _handle_in_worker(number)
        elif number == signal.SIGINT:
            self._handle_ctrl_c(frame)
        elif not self.by_ctrl_c:
            self.received = signal.Signals(number).name

    def _handle_ctrl_c(self, frame: FrameType | None) -> None:
        if not self.by_ctrl_c:
            self.received, self._ctrl_c_at = signal.SIGINT.name, time.monotonic()
            with contextlib.suppress(OSError):  # the terminal, or a pipe to tee, may be closed
                os.write(2, _CTRL_C_MESSAGE)  # print is not safe here: the signal may have interrupted another print
        elif time.monotonic() - self._ctrl_c_at > _SAME_CTRL_C_SECONDS:
            signal.default_int_handler(signal.SIGINT, frame)  # raises KeyboardInterrupt

    @staticmethod
    def report_dead_workers_at_next_batch() -> None:
        """Let torch report a dead data worker at the next request for a batch.

        By default, torch raises an error as soon as a worker dies, also in the middle of a step. A signal to a job ends
        its workers too.
        """
        is_main_thread = threading.current_thread() is threading.main_thread()
        if hasattr(signal, "SIGCHLD") and is_main_thread:  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _is_ignored(number: signal.Signals) -> bool:
    """True for a Ctrl-C that this process ignores: shells ignore it for commands that they start with ``&``."""
    return number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN


def _handle_in_worker(number: int) -> None:
    """Handle a signal in a data worker, which inherited the handler from the training process."""
    if number == signal.SIGINT:  # the terminal sends Ctrl-C to all processes; the training ends its workers itself
        return
    signal.signal(number, signal.SIG_DFL)  # SIGTERM must still be able to end a worker
    os.kill(os.getpid(), number)
