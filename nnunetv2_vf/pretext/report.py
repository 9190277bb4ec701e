"""How well a network answers the pretext task: confusion of the fusion classes, a report, and whether to worry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from torch import Tensor

from nnunetv2_vf.pretext.pictures import class_names, draw_confusion

_ONE_CLASS = 0.99  # of the voxels answered with one class: collapsed
_SOLVED = 0.98  # Dice of every class


def count_confusion(answer: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count voxels by (true class, answered class), without asking the device; answer and truth (B, D, H, W).

    Returns:
        (num_classes, num_classes), whole numbers.
    """
    classes = torch.arange(num_classes, device=answer.device).view(-1, 1)
    is_true, is_answered = ((x.flatten(1)[:, None] == classes).float() for x in (truth, answer))  # B, classes, voxels
    # single precision counts the voxels of one sample exactly, up to 2**24
    return torch.bmm(is_true, is_answered.transpose(1, 2)).to(torch.int64).sum(0)


def dice_per_class(confusion: np.ndarray) -> np.ndarray:
    """Dice of every class; NaN for a class that is neither true nor answered anywhere."""
    marked = confusion.sum(axis=0) + confusion.sum(axis=1)
    return np.divide(2 * confusion.diagonal(), marked, out=np.full(len(marked), np.nan), where=marked > 0)


def pretext_warning(confusion: np.ndarray) -> str | None:
    """What is wrong with a network's answers, if anything is.

    Args:
        confusion: voxels by (true class, answered class).
    """
    answered = confusion.sum(axis=0) / confusion.sum()
    if answered.max() >= _ONE_CLASS:
        return (
            f"WARNING: the pretext has collapsed: {answered.max():.1%} of the voxels are answered with class "
            f"{answered.argmax()}. In the first epochs this passes; if it stays, lower nnUNet_vf_initial_lr, or look "
            "at the volumes (nnUNetv2_vf preview)"
        )
    worst = np.nanmin(dice_per_class(confusion))
    if worst >= _SOLVED:
        return (
            f"WARNING: the pretext is solved: every class has a Dice of at least {worst:.3f}, there is nothing left to "
            "learn. End here, or make it harder (a larger nnUNet_vf_coefficient_steps)"
        )
    return None


def write_report(confusion: np.ndarray, samples: int, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write ``pretext_report.json`` and ``pretext_report.png``; returns what the former holds.

    Args:
        samples: that were answered.
        settings: of the training.
    """
    dice = dice_per_class(confusion)
    names = class_names(settings["coefficient_steps"])
    report = {
        "mean_dice": float(np.nanmean(dice)),
        "dice_per_class": dict(zip(names, map(float, dice), strict=True)),
        "confusion_rows_are_the_truth": confusion.tolist(),
        "samples": samples,
        "settings": dict(settings),
    }
    save_json(report, str(folder / "pretext_report.json"), sort_keys=False)
    draw_confusion(confusion, dice.tolist(), folder / "pretext_report.png")
    return report
