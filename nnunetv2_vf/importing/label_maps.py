"""Recognise label maps by their voxels: pretraining on segmentations instead of images would be useless."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnunetv2_vf.importing.body_mask import random_intensities

_MAX_VALUES = 512  # atlases of the brain have up to 200 labels
_SMALLEST_VALUES = (-1, 0, 1)  # 0 is the background, -1 marks voxels to ignore; some maps have no background
# A volume with more values is a label map if this share of the neighbours within its slices is equal. It is at least
# 0.82 in the label maps of the tests. It is at most 0.24 in MR images of left atrium and hippocampus, 0.56 in a CT of
# 16 grey levels, and 0.70 in one of 8 bits that was enlarged three times without interpolation.
_MIN_EQUAL_NEIGHBOURS = 0.75
_FEW_VALUES = 4  # no image has so few
_MAX_SLICES = 15


def describe_label_map(volume: np.ndarray) -> str:
    """Return why a volume looks like a label map, or an empty string if it looks like an image.

    A label map has few different values, all whole, the smallest of them -1, 0 or 1, and areas of one value.

    Args:
        volume: finite values, not all equal, (slices, rows, columns).
    """
    values, counts = np.unique(random_intensities(volume), return_counts=True)
    if not _can_be_labels(values):
        return ""
    background = values[counts.argmax()]
    slices = _slices_with_other_values(volume, background)
    values = np.unique(slices)
    if not _can_be_labels(values):
        return ""
    # An intensity window makes large areas of an image equal to its smallest or largest value.
    equal = _share_of_equal_neighbours(slices, not_counted=(background, values[0], values[-1]))
    if len(values) > _FEW_VALUES and equal < _MIN_EQUAL_NEIGHBOURS:
        return ""
    return f"looks like a segmentation: {len(values)} different values, all whole; {equal:.0%} of neighbours are equal"


def _can_be_labels(values: np.ndarray) -> bool:
    is_whole = np.array_equal(values, np.round(values))
    return values[0] in _SMALLEST_VALUES and len(values) <= _MAX_VALUES and is_whole


def _slices_with_other_values(volume: np.ndarray, background: float) -> np.ndarray:
    """Return up to 15 of the slices that do not consist of background only, evenly chosen."""
    numbers = np.flatnonzero((volume != background).any(axis=(1, 2)))
    chosen = np.unique(np.linspace(0, len(numbers) - 1, _MAX_SLICES).round().astype(int))
    return volume[numbers[chosen]]


def _share_of_equal_neighbours(slices: np.ndarray, not_counted: Sequence[float]) -> float:
    """Return the share of neighbours along a row that are equal; 1 if there are none.

    Args:
        not_counted: pairs with one of these values are left out.
    """
    is_counted = ~np.isin(slices, not_counted)
    left, right = slices[:, :, :-1], slices[:, :, 1:]
    pairs = is_counted[:, :, :-1] & is_counted[:, :, 1:]
    return float((left == right)[pairs].mean()) if pairs.any() else 1.0
