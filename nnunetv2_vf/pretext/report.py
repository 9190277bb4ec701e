"""Quality of the predictions: confusion matrix and Dice of the fusion classes, restored share; warnings, a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from torch import Tensor

from nnunetv2_vf.durable_files import replacing
from nnunetv2_vf.pretext.masking import restored_share
from nnunetv2_vf.pretext.pictures import class_names, draw_report, share_names

_COLLAPSED_SHARE = 0.99  # collapsed: at least this share of the voxels is predicted as one class
_RESTORED_NOTHING = 0.01  # at most this share of the variance of the hidden voxels
_SOLVED_DICE = 0.98  # solved: every class has at least this Dice


def count_confusion(prediction: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Count voxels by (true class, predicted class), on the device and without waiting for it.

    Args:
        prediction, target: classes (B, D, H, W).

    Returns:
        (num_classes, num_classes), whole numbers.
    """
    classes = torch.arange(num_classes, device=prediction.device).view(-1, 1)
    is_true, is_predicted = ((x.flatten(1)[:, None] == classes).float() for x in (target, prediction))  # B, K + 1, n
    # float32 counts the voxels of one sample exactly, up to 2**24.
    return torch.bmm(is_true, is_predicted.transpose(1, 2)).to(torch.int64).sum(0)


def dice_per_class(confusion: np.ndarray) -> np.ndarray:
    """Return the Dice of every class; NaN for a class that occurs neither in targets nor in predictions."""
    sizes = confusion.sum(axis=0) + confusion.sum(axis=1)
    return np.divide(2 * confusion.diagonal(), sizes, out=np.full(len(sizes), np.nan), where=sizes > 0)


def pretext_warnings(confusion: np.ndarray, share: np.ndarray) -> list[str]:
    """Return warnings if the network restores nothing, predicts almost only one class, or has nothing left to learn.

    Args:
        confusion: number of voxels by (true class, predicted class); without rows if the pretext has no fusion.
        share: the restored share of each channel; empty if the pretext has no mask.
    """
    warnings = []
    if len(share) and not np.nanmax(share, initial=0) > _RESTORED_NOTHING:
        warnings.append(
            "WARNING: the network restores nothing of the hidden blocks. This is normal in the first epochs; if it "
            "lasts, lower nnUNet_vf_initial_lr, or look at the volumes (nnUNetv2_vf preview)"
        )
    if not len(confusion):
        return warnings
    shares = confusion.sum(axis=0) / confusion.sum()
    worst = np.nanmin(dice_per_class(confusion))
    if shares.max() >= _COLLAPSED_SHARE:
        warnings.append(
            f"WARNING: the pretext task has collapsed: {shares.max():.1%} of the voxels are predicted as class "
            f"{shares.argmax()}. This is normal in the first epochs; if it lasts, lower nnUNet_vf_initial_lr, or look "
            "at the volumes (nnUNetv2_vf preview)"
        )
    elif worst >= _SOLVED_DICE:
        warnings.append(
            f"WARNING: the pretext task is solved: every class has a Dice of at least {worst:.3f}, so the network has "
            "nothing left to learn. End the training, or make the task harder (a larger nnUNet_vf_coefficient_steps)"
        )
    return warnings


def write_report(
    confusion: np.ndarray, sums: np.ndarray, samples: int, settings: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Write ``pretext_report.json`` and ``pretext_report.png``; return the content of the former.

    The score of a class or channel that does not occur is NaN, in the file null.

    Args:
        confusion: number of voxels by (true class, predicted class); without rows if the pretext has no fusion.
        sums: of :func:`nnunetv2_vf.pretext.masking.restoration_sums`; without rows if the pretext has no mask.
        samples: number of samples in the confusion matrix and the sums.
        settings: settings of the training, as plain JSON types.
    """
    dice = dice_per_class(confusion)
    names = class_names(len(confusion) - 1)
    share = restored_share(sums)
    report = {
        "mean_dice": float(np.nanmean(dice)) if len(dice) else None,
        "dice_per_class": dict(zip(names, map(float, dice), strict=True)),
        "restored_share": {f"channel_{channel}": float(value) for channel, value in enumerate(share)},
        "confusion_rows_are_the_truth": confusion.tolist(),
        "samples": samples,
        "settings": dict(settings),
    }
    with replacing(folder / "pretext_report.json") as unfinished:
        save_json({**report, **_without_nan(report)}, str(unfinished), sort_keys=False)
    draw_report(confusion, dice.tolist(), share.tolist(), folder / "pretext_report.png")
    return report


def _without_nan(report: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Return the scores of a report with None instead of NaN, which JSON does not have."""
    return {
        name: {key: None if np.isnan(value) else value for key, value in report[name].items()}
        for name in ("dice_per_class", "restored_share")
    }


def name_scores(dice: Sequence[float], share: Sequence[float]) -> dict[str, float]:
    """Return the Dice of the fusion classes and the restored shares of the channels by their names in the log."""
    names = [*(f"Dice, {name}" for name in class_names(len(dice) - 1)), *share_names(len(share))]
    return dict(zip(names, [*dice, *share], strict=True))
