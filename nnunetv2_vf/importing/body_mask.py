"""Find the body in a volume, and recognise Hounsfield units (HU). All arrays have axes (slices, rows, columns)."""

from __future__ import annotations

import cc3d
import numpy as np

_MAX_SIDE = 128  # voxels per side of the subsampled volume in which the body is searched
_AIR_HU = -500  # lower values are air
_MIN_BODY_FRACTION = 0.01


def is_hu_like(volume: np.ndarray) -> bool:
    """True if the intensities look like HU: they include air or fat and much soft tissue, and nothing extreme."""
    intensities = random_intensities(_subsample(volume))
    low, high = np.percentile(intensities, (0.5, 99.5))
    if not (-4100 <= low <= -80 and high <= 10_000):
        return False
    tissue = intensities[intensities > _AIR_HU]
    return bool(tissue.size and np.mean((tissue > -200) & (tissue < 300)) > 0.2)


def find_body(volume: np.ndarray, hu_like: bool) -> tuple[np.ndarray, str]:
    """Return a mask of the body: threshold the volume, keep the largest connected component, fill its holes.

    The threshold is -500 HU. If the intensities are not HU, it is a tenth of the way from the 2nd to the 98th
    percentile (Smith, Fast robust automated brain extraction, Human Brain Mapping 17, 2002). Holes are filled slice by
    slice: the airways connect the lungs to the outside, but almost every slice encloses them. The search runs on every
    n-th voxel, with at most 128 voxels per side, so the edge of the mask is n voxels coarse.

    Args:
        volume: intensities, (slices, rows, columns).
        hu_like: True if the intensities are HU.

    Returns:
        The mask, uint8, of the volume's shape, 1 in the body; and a note, which is empty if the search succeeded. If
        the body has less than 1 % of the voxels, the mask has all voxels above the minimum instead.
    """
    subsampled = _subsample(volume)
    if hu_like:
        threshold = float(_AIR_HU)
    else:
        low, high = np.percentile(random_intensities(subsampled), (2, 98))
        threshold = low + 0.1 * (high - low)
    body = _fill_holes(_largest_component(subsampled > threshold))
    if body.mean() < _MIN_BODY_FRACTION:
        note = f"mask: threshold {threshold:g} found {body.mean():.1%} of the voxels; took all above the minimum"
        return (volume > volume.min()).astype(np.uint8), note
    return _upsample(body.astype(np.uint8), volume.shape), ""


def _subsampling_steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(-(-length // _MAX_SIDE) for length in shape)


def _subsample(volume: np.ndarray) -> np.ndarray:
    return volume[tuple(slice(None, None, step) for step in _subsampling_steps(volume.shape))]


def _upsample(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo :func:`_subsample` with the nearest voxel."""
    nearest = [
        np.minimum((np.arange(length) + step // 2) // step, subsampled_length - 1)
        for length, subsampled_length, step in zip(shape, mask.shape, _subsampling_steps(shape), strict=True)
    ]
    return mask[np.ix_(*nearest)]


def random_intensities(volume: np.ndarray) -> np.ndarray:
    """Return about 20,000 intensities, which is enough for percentiles; always the same for the same volume.

    They are drawn at random because every n-th voxel would lie in a few columns if n divided the row length.
    """
    return volume.ravel()[np.random.default_rng(0).integers(volume.size, size=min(volume.size, 20_000))]


def _largest_component(mask: np.ndarray) -> np.ndarray:
    labels = cc3d.connected_components(mask, connectivity=6)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # the background
    return labels == sizes.argmax() if sizes.any() else mask


def _fill_holes(mask: np.ndarray) -> np.ndarray:
    """Fill the holes that are enclosed within a slice.

    All slices are put into one tall 2D image with a separating row after each, because one labelling call for the
    whole image is faster than one call for each slice.
    """
    slices, rows, columns = mask.shape
    stacked = np.ones((slices, rows + 1, columns), dtype=bool)
    stacked[:, :rows] = mask
    background = cc3d.connected_components(~stacked.reshape(-1, columns), connectivity=4)
    background = background.reshape(stacked.shape)[:, :rows]
    is_outside = np.zeros(background.max() + 1, dtype=bool)
    for edge in (background[:, 0], background[:, -1], background[:, :, 0], background[:, :, -1]):
        is_outside[edge] = True
    is_outside[0] = False  # label 0 is the mask itself
    return ~is_outside[background]
