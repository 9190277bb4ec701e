"""Errors that the user can mend: one line on stderr and a failing exit status, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """What is wrong (with the offending value), what would be legal, and the command that mends it."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Leave the program with a :class:`UserError`'s message and exit status 1.

    For the places where a command enters our code: our own ``main`` and the trainer methods that stock nnU-Net
    commands call. Usable as a decorator.
    """
    try:
        yield
    except UserError as error:
        raise SystemExit(f"nnUNetv2_vf: error: {printable(str(error), limit=2000)}") from None


def printable(text: str, limit: int = 500) -> str:
    """One line of at most ``limit`` characters: what a file says of itself must not steer a terminal."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= limit else line[: limit - 3] + "..."
