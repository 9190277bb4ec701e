"""Files that cannot be lost: whole on the disk before they replace anything, and read back before they are trusted."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch


def write_durably(content: Any, path: Path, previous: Path | None = None) -> None:
    """``torch.save``, but ``path`` is replaced only once the new file is on the disk and reads back as it was meant.

    The process may be killed and the machine may lose power at any time: what ``path`` held is there until then.

    Args:
        previous: another name under which to keep what ``path`` held.

    Raises:
        OSError: it could not be written, since the disk is full for example; nothing has changed.
    """
    unfinished = _unfinished(path)
    with io.BytesIO() as buffer:
        torch.save(content, buffer)
        try:
            with buffer.getbuffer() as data:
                _write_and_compare(unfinished, data)
            if previous is not None and path.is_file():
                give_second_name(path, previous)
            unfinished.replace(path)
            _flush_folder(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)
            if previous is not None:
                _unfinished(previous).unlink(missing_ok=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _write_and_compare(path: Path, data: memoryview) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):  # from the disk, not from what the system remembers of it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        position = 0
        while chunk := file.read(1 << 24):
            if data[position : position + len(chunk)] != chunk:
                raise OSError(f"{path} does not read back as it was written")
            position += len(chunk)
    if position != len(data):
        raise OSError(f"{path} does not read back as it was written: {position} bytes of {len(data)}")


def give_second_name(path: Path, name: Path) -> None:
    """``name`` is, at every moment, what it was or what ``path`` is."""
    unfinished = _unfinished(name)
    unfinished.unlink(missing_ok=True)
    try:
        unfinished.hardlink_to(path)
    except OSError:  # not every file system has hard links
        shutil.copy2(path, unfinished)
    unfinished.replace(name)


def _flush_folder(folder: Path) -> None:
    """Renaming is on the disk once the folder is; Windows has no such thing."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_whole(path: Path) -> bool:
    """Whether a file of ``torch.save`` is as it was written: every checksum in it holds.

    Raises:
        OSError: the file system does not give it, which says nothing about the file.
    """
    if not path.is_file():
        return False
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # there is no telling what zipfile makes of damage
        return False
