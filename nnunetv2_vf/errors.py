"""Errors that a user can correct: one line on stderr and a non-zero exit status, never a traceback."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class UserError(ValueError):
    """An error that the user can correct.

    The message names the offending value, the legal values and, where there is one, the command that solves the
    problem.
    """


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a :class:`UserError` into one line on stderr and exit status 1.

    Used where a command calls this package: our own ``main`` and the trainer methods that stock nnU-Net commands
    call. Works as a context manager and as a decorator.
    """
    try:
        yield
    except UserError as error:
        raise SystemExit(f"nnUNetv2_vf: error: {printable(str(error), limit=2000)}") from None


class OneLineArgumentParser(argparse.ArgumentParser):
    """An argument parser that reports an error as one line, without the usage text; exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def printable(text: str, limit: int = 500) -> str:
    """Return ``text`` as one line of at most ``limit`` printable characters.

    Text from a file may hold control characters, which could change what the terminal shows.
    """
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."
