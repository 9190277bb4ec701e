"""Checkpoints that cannot be lost: whole on the disk before they replace anything, checked before they are believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnunetv2_vf.durable_files import give_second_name, is_whole
from nnunetv2_vf.errors import UserError

# nnU-Net's names; the previous one is what LATEST was before it was last replaced.
LATEST, PREVIOUS, BEST, FINAL = (f"checkpoint_{name}.pth" for name in ("latest", "previous", "best", "final"))
STATE = "long_training"  # what is ours in a checkpoint, and not of its network: nnU-Net leaves it alone


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
    give_second_name(path, aside)
    if instead is None:
        path.unlink()
    else:
        give_second_name(instead, path)
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
