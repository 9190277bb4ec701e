"""Recognise label maps by their voxels: pretraining on segmentations instead of images would be useless."""

from __future__ import annotations

import numpy as np

from nnunetv2_vf.importing.body_mask import random_intensities

_MAX_VALUES = 512  # atlases of the brain have up to 200 labels
# A volume with more values is a label map if this share of the neighbours within its slices is equal, not counting
# pairs of background. It is at least 0.73 in the label maps of left atrium, hippocampus and phantoms, and at most 0.25
# in their images, of which the ones of the left atrium have 38 to 245 values; 0.37 in a CT of 16 grey levels.
_MIN_EQUAL_NEIGHBOURS = 0.6
_FEW_VALUES = 4  # no image has so few; thin vessels as labels have few equal neighbours
_MAX_SLICES = 15


def describe_label_map(volume: np.ndarray) -> str:
    """Return why a volume looks like a label map, or an empty string if it looks like an image.

    A label map has few different values, all whole and none negative, and large areas of one value.

    Args:
        volume: finite values, not all equal, (slices, rows, columns).
    """
    values, counts = np.unique(random_intensities(volume), return_counts=True)
    if values[0] < 0 or len(values) > _MAX_VALUES or not np.array_equal(values, np.round(values)):
        return ""
    background = values[counts.argmax()]
    slices = _slices_with_other_values(volume, background)
    values = np.unique(slices)
    if values[0] < 0 or len(values) > _MAX_VALUES or not np.array_equal(values, np.round(values)):
        return ""
    equal = _share_of_equal_neighbours(slices, background)
    if len(values) > _FEW_VALUES and equal < _MIN_EQUAL_NEIGHBOURS:
        return ""
    return f"looks like a segmentation: {len(values)} different values, all whole; {equal:.0%} of neighbours are equal"


def _slices_with_other_values(volume: np.ndarray, background: float) -> np.ndarray:
    """Return up to 15 of the slices that do not consist of background only, evenly chosen."""
    numbers = np.flatnonzero((volume != background).any(axis=(1, 2)))
    chosen = np.unique(np.linspace(0, len(numbers) - 1, _MAX_SLICES).round().astype(int))
    return volume[numbers[chosen]]


def _share_of_equal_neighbours(slices: np.ndarray, background: float) -> float:
    """Return the share of neighbours along a row that are equal, of those that are not both background."""
    left, right = slices[:, :, :-1], slices[:, :, 1:]
    is_counted = (left != background) | (right != background)
    return float(((left == right) & is_counted).sum() / max(1, is_counted.sum()))
