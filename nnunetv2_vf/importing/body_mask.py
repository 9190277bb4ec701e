"""Where the body is in a volume, and whether intensities are Hounsfield units. Arrays only; axes (D, H, W)."""

from __future__ import annotations

from collections.abc import Sequence

import cc3d
import numpy as np

_SAMPLE = 128  # voxels a side of the coarse copy on which the body is looked for
_AIR_HU, _LEAST_BODY = -500, 0.01
_LABELS = 16


def is_hu_like(volume: np.ndarray) -> bool:
    """Whether intensities look like Hounsfield units: air or fat, much soft tissue besides, nothing extreme."""
    sample = _thin(_sample(volume))
    low, high = np.percentile(sample, (0.5, 99.5))
    if not (-4100 <= low <= -80 and high <= 10_000):
        return False
    tissue = sample[sample > _AIR_HU]
    return bool(tissue.size and np.mean((tissue > -200) & (tissue < 300)) > 0.2)


def segmentation_note(volume: np.ndarray) -> str:
    """A note if intensities are few whole numbers, as labels are; else empty."""
    values = np.unique(_thin(_sample(volume))[:2000])
    few = len(values) <= _LABELS and np.array_equal(values, np.round(values))
    return f"labels: {len(values)} different values, all whole; is it a segmentation?" if few else ""


def body_mask(volume: np.ndarray, hu_like: bool) -> tuple[np.ndarray, str]:
    """Find the body: above a threshold, the largest connected part, its holes filled. Returns the mask and a note.

    The threshold is -500 HU, or where intensities are not in HU the 2nd percentile plus a tenth of the way to the 98th
    (as in Smith, Fast robust automated brain extraction, Human Brain Mapping 17, 2002). Holes are filled slice by
    slice: lungs are open to the outside through the airways, but enclosed in almost every slice. The search runs on
    every n-th voxel, at most 128 a side, so that edges are n voxels coarse. If it finds less than 1 % of the voxels,
    the mask is all voxels above the lowest, and the note says so.

    Args:
        volume: intensities, (D, H, W).
        hu_like: whether they are in HU.

    Returns:
        uint8, (D, H, W): 1 is body; and a note, empty if all went well.
    """
    sample = _sample(volume)
    if hu_like:
        threshold = float(_AIR_HU)
    else:
        low, high = np.percentile(_thin(sample), (2, 98))
        threshold = low + 0.1 * (high - low)
    body = _without_holes(_largest_part(sample > threshold))
    if body.mean() < _LEAST_BODY:
        note = f"mask: the threshold {threshold:g} found {body.mean():.1%} of the voxels; all above the lowest instead"
        return (volume > volume.min()).astype(np.uint8), note
    nearest = [
        np.minimum((np.arange(n) + step // 2) // step, m - 1)
        for n, m, step in zip(volume.shape, sample.shape, _steps(volume.shape), strict=True)
    ]
    return body.astype(np.uint8)[np.ix_(*nearest)], ""


def _steps(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // _SAMPLE) for n in shape)


def _sample(volume: np.ndarray) -> np.ndarray:
    return volume[tuple(slice(None, None, step) for step in _steps(volume.shape))]


def _thin(sample: np.ndarray) -> np.ndarray:
    """Some 20,000 of the intensities, which is enough for percentiles; the same for the same volume.

    At random: every n-th would be a few columns if n divides the length of a row.
    """
    return sample.ravel()[np.random.default_rng(0).integers(sample.size, size=min(sample.size, 20_000))]


def _largest_part(mask: np.ndarray) -> np.ndarray:
    labels = cc3d.connected_components(mask, connectivity=6)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax() if sizes.any() else mask


def _without_holes(mask: np.ndarray) -> np.ndarray:
    """Fill what is enclosed within a slice: one plane of all slices, a row apart, saves a call for each of them."""
    slices, rows, columns = mask.shape
    plane = np.ones((slices, rows + 1, columns), dtype=bool)
    plane[:, :rows] = mask
    labels = cc3d.connected_components(~plane.reshape(-1, columns), connectivity=4)
    labels = labels.reshape(plane.shape)[:, :rows]
    outside = np.zeros(labels.max() + 1, dtype=bool)
    for side in (labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]):
        outside[side] = True
    outside[0] = False  # that is the mask itself
    return ~outside[labels]
