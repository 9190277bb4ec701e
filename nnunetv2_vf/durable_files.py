"""Write files that survive crashes, power loss and full disks; check that a file is undamaged.

A new file replaces the old one only after it is completely on the disk and reads back correctly.
"""

from __future__ import annotations

import errno
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def write_durably(content: Any, path: Path, previous: Path | None = None) -> None:
    """Save ``content`` with ``torch.save``; replace ``path`` only after the new file is on the disk and reads back.

    If the process is killed or the machine loses power, ``path`` holds either the old or the new file.

    Args:
        previous: another path that keeps the old file of ``path``.

    Raises:
        OSError: the file could not be written, for example because the disk is full. ``path`` holds the old or the new
            file, whole.
    """
    unfinished = _unfinished(path)
    with io.BytesIO() as buffer:
        torch.save(content, buffer)
        try:
            with buffer.getbuffer() as data:
                _write_and_compare(unfinished, data)
            if previous is not None and path.is_file():
                link_or_copy(path, previous)
            unfinished.replace(path)
            _flush_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
            if previous is not None:  # left over if previous is a hard link to path already
                _unfinished(previous).unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to ``path`` if the block ends without an error, else remove it.

    Raises:
        IsADirectoryError: ``path`` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    unfinished = _unfinished(path)
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _write_and_compare(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # read from the disk, not from the system's cache
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        position = 0
        while chunk := file.read(1 << 24):
            if data[position : position + len(chunk)] != chunk:
                raise OSError(f"{path} differs from what was written")
            position += len(chunk)
    if position != len(data):
        raise OSError(f"{path} differs from what was written: it has {position} bytes of {len(data)}")


def link_or_copy(source: Path, destination: Path) -> None:
    """Replace ``destination`` by ``source``, in one step: at any time it is either the old or the new file."""
    unfinished = _unfinished(destination)
    unfinished.unlink(missing_ok=True)
    try:
        unfinished.hardlink_to(source)
    except OSError:  # not every file system has hard links
        shutil.copy2(source, unfinished)
    unfinished.replace(destination)


def _flush_folder(folder: Path) -> None:
    """Write a renaming in this folder to the disk. Windows cannot flush folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_undamaged(path: Path) -> bool:
    """True if a file of ``torch.save`` exists and all checksums in it are correct.

    Raises:
        OSError: the file system cannot read the file; the file itself may be undamaged.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:  # errors of the file system must not be taken for damage below
        while file.read(1 << 24):
            pass
    try:
        torch.serialization.get_unsafe_globals_in_checkpoint(path)  # reads what zipfile ignores; runs nothing
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # both raise many kinds of errors on damaged files
        return False
