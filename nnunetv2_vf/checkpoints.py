"""Checkpoints that cannot be lost: whole on the disk before they replace anything, checked before they are believed."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunetv2_vf.errors import UserError

# nnU-Net's names; the previous one is what LATEST was before it was last replaced.
LATEST, PREVIOUS, BEST, FINAL = (f"checkpoint_{name}.pth" for name in ("latest", "previous", "best", "final"))
STATE = "long_training"  # what is ours in a checkpoint, and not of its network: nnU-Net leaves it alone


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
                _give_second_name(path, previous)
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


def _give_second_name(path: Path, name: Path) -> None:
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


def newest_whole(asked: Path, report: Callable[[str], None]) -> Path:
    """The checkpoint to continue from: of the one asked for and those beside it that are not damaged, the furthest.

    What is damaged is renamed to ``NAME.damaged``, and the chosen one gets the name that was asked for beside its own:
    the next checkpoint must not keep what is damaged in the place of a whole one.

    Args:
        asked: nnU-Net takes the latest one where there is one, even if the best one is further.
        report: told what is damaged, and what is used instead.

    Raises:
        UserError: all are damaged, or one cannot be read.
    """
    beside = [path for name in (FINAL, LATEST, BEST, PREVIOUS) if (path := asked.with_name(name)) != asked]
    there = [asked, *(path for path in beside if path.is_file())]
    try:
        whole = [path for path in there if is_whole(path)]
    except OSError as error:
        raise UserError(f"a checkpoint in {asked.parent} cannot be read: {error}; try again") from error
    if not whole:
        raise UserError(f"all checkpoints in {asked.parent} are damaged; move them away and train anew without --c")
    stages = {path: _stage(path) for path in whole}
    # a file may be left of a training before this one; copies of a folder do not keep the order of times
    run = stages[max(whole, key=lambda path: path.stat().st_mtime)][0]
    chosen = max((path for path in whole if stages[path][0] == run), key=lambda path: stages[path][1])
    for path in there:
        if path not in whole:
            aside = _put_aside(path, instead=chosen if path == asked else None)
            report(f"WARNING: {path} is damaged, now {aside.name}")
    if chosen != asked:
        report(f"Going on from {chosen.name} instead of {asked.name}")
    return chosen


def _put_aside(path: Path, instead: Path | None) -> Path:
    """Rename a file; nnU-Net, on another rank for example, finds one in its place at every moment if there is to be."""
    aside = path.with_name(f"{path.name}.damaged")
    _give_second_name(path, aside)
    if instead is None:
        path.unlink()
    else:
        _give_second_name(instead, path)
    return aside


def _stage(path: Path) -> tuple[str, tuple[int, int]]:
    """Which training a checkpoint is of, and how far that had come: epochs, and steps of the next one."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get(STATE, {})
    return state.get("run", ""), (checkpoint["current_epoch"], len(state.get("losses", ())))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of a training of one's own; tensors stay on the disk until they are looked at.

    Raises:
        UserError: the file is damaged or no checkpoint of nnU-Net.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        _ = checkpoint["trainer_name"], checkpoint["init_args"]["plans"], checkpoint["current_epoch"]
    except Exception as error:
        raise UserError(
            f"{path} is damaged or no nnU-Net checkpoint ({type(error).__name__}); move it away, and "
            "nnUNetv2_train --c takes the next best one of its folder"
        ) from error
    return checkpoint
