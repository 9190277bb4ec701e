"""Choose the checkpoint to continue from: the furthest one that is not damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.durable_files import is_undamaged, link_or_copy
from nnunetv2_vf.errors import UserError

# nnU-Net's names; PREVIOUS is ours: the LATEST before the current one.
LATEST, PREVIOUS, BEST, FINAL = (f"checkpoint_{name}.pth" for name in ("latest", "previous", "best", "final"))
STATE = "long_training"  # our entry in a checkpoint, which nnU-Net ignores


class Progress(NamedTuple):
    """How far a training had come: complete epochs, and completed steps of the next epoch."""

    epochs: int
    steps: int


def newest_undamaged(requested: Path, report: Callable[[str], None]) -> Path:
    """Return the furthest undamaged checkpoint among the requested one and those beside it.

    A damaged checkpoint is renamed to ``NAME.damaged``. If the requested one is damaged, the chosen one is also stored
    as LATEST, so that every rank finds a checkpoint; never as FINAL, which says that the training is finished.

    Args:
        requested: the checkpoint that nnU-Net would load: the final one, else the latest, else the best.
        report: is called with a line for each damaged file, and with the choice if it is not the requested one.

    Raises:
        UserError: all are damaged, or one cannot be read.
    """
    others = [path for name in (FINAL, LATEST, BEST, PREVIOUS) if (path := requested.with_name(name)) != requested]
    candidates = [requested, *(path for path in others if path.is_file())]
    try:
        undamaged = [path for path in candidates if is_undamaged(path)]
    except OSError as error:
        raise UserError(f"a checkpoint in {requested.parent} cannot be read: {error}; try again") from error
    if not undamaged:
        raise UserError(
            f"all checkpoints in {requested.parent} are damaged; move them to another folder and train again "
            "without --c"
        )
    chosen = _furthest(undamaged)
    damaged = [path for path in candidates if path not in undamaged]
    for path in damaged:
        moved_to = path.with_name(f"{path.name}.damaged")
        link_or_copy(path, moved_to)
        report(f"WARNING: {path} is damaged, renamed to {moved_to.name}")
    if requested in damaged and chosen.name != LATEST:
        latest = requested.with_name(LATEST)
        link_or_copy(chosen, latest)
        damaged = [path for path in damaged if path != latest]
    for path in damaged:  # only now: at every moment, other ranks find a checkpoint
        path.unlink()
    if chosen != requested:
        report(f"Continuing from {chosen.name} instead of {requested.name}")
    return chosen


def _furthest(paths: list[Path]) -> Path:
    """Return the checkpoint with the most progress in the run that wrote the newest file.

    The folder may hold files of an earlier run. Among files of one run progress counts, not the file's time: copying
    a folder changes times.
    """
    runs = {path: _run_and_progress(path) for path in paths}
    newest_run = runs[max(paths, key=lambda path: path.stat().st_mtime)][0]
    return max((path for path in paths if runs[path][0] == newest_run), key=lambda path: runs[path][1])


def _run_and_progress(path: Path) -> tuple[str, Progress]:
    checkpoint = read_checkpoint(path)
    state = checkpoint.get(STATE, {})
    return state.get("run", ""), Progress(checkpoint["current_epoch"], len(state.get("losses", ())))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of the user's own training. Tensors stay on the disk until they are used (mmap).

    Raises:
        UserError: the file is damaged, or not an nnU-Net checkpoint.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        _ = checkpoint["trainer_name"], checkpoint["init_args"]["plans"], checkpoint["current_epoch"]
    except Exception as error:
        raise UserError(
            f"{path} is damaged or not an nnU-Net checkpoint ({type(error).__name__}); move it to another folder, then "
            "nnUNetv2_train --c continues from another checkpoint of this folder"
        ) from error
    return checkpoint


def require_same_plans(recorded: PlansManager, current: PlansManager, configuration_name: str, file: Path) -> None:
    """Raise UserError if a checkpoint's dataset or configuration is not the current one."""
    is_known = configuration_name in recorded.available_configurations
    before = recorded.get_configuration(configuration_name).configuration if is_known else {}
    now = current.get_configuration(configuration_name).configuration
    changed = [name for name in sorted({*now, *before}) if now.get(name) != before.get(name)]
    if recorded.dataset_name != current.dataset_name or changed:
        raise UserError(
            f"{file} was trained on {recorded.dataset_name} with other plans (different: "
            f"{', '.join(changed) or 'the dataset'}); restore them, or train again without --c"
        )
