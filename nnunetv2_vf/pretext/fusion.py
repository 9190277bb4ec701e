"""The pretext task in pure tensors: draw a map of fusion coefficients, fuse two sub-volumes with it.

Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale
Unannotated Dataset", arXiv 2306.16925 (2023), section "Volume Fusion", and IEEE TIP 34 (2025).

    X = a * I_f + (1 - a) * I_b,   a in {0, 1/K, ..., 1},   Y = K * a

The network sees the fused volume X and predicts the class Y of every voxel. A fusion map holds Y: whole numbers 0..K,
uint8, axes (D, H, W) in nnU-Net's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nnunetv2_vf.pretext.augmentation import IntensityTransform, fit_intensity_transform
from nnunetv2_vf.settings import VFSettings

# A CPU fuses a batch in slabs of this many voxels. A slab stays in the cache through a dozen operations; without slabs,
# each operation reads it from memory again: 19 ms instead of 12 for a pair of 64x128x128 voxels on one core.
_SLAB_VOXELS = 2**17


def draw_fusion_map(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw a fusion map of the kind that ``settings.fusion_map`` names; return (D, H, W), uint8, values 0..K."""
    draw = {"boxes": draw_boxes, "blocks": draw_blocks}[settings.fusion_map]
    return draw(patch_size, settings, rng)


def draw_boxes(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw overlapping boxes of random size and class on a background of class 0 (the 2023 paper).

    The number of boxes is uniform in ``box_count``. Each side is uniform from ``box_min_side`` voxels to
    ``box_max_fraction`` of the patch: 8..40 and 8..80 voxels for the paper's patch of 64x128x128. The class is uniform
    in 1..K. Later boxes overwrite earlier ones.
    """
    patch = np.asarray(patch_size)
    shortest = np.minimum(settings.box_min_side, patch)
    longest = np.maximum((settings.box_max_fraction * patch).astype(int), shortest)

    count = rng.integers(*settings.box_count, endpoint=True)
    sides = rng.integers(shortest, longest, size=(count, 3), endpoint=True)
    starts = rng.integers(0, patch - sides, endpoint=True)
    classes = rng.integers(1, settings.coefficient_steps, size=count, endpoint=True)

    fusion_map = np.zeros(patch, dtype=np.uint8)
    for (z, y, x), (d, h, w), label in zip(starts, sides, classes, strict=True):
        fusion_map[z : z + d, y : y + h, x : x + w] = label
    return torch.from_numpy(fusion_map)


def draw_blocks(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw a regular grid of equal blocks on a background of class 0 (the 2025 paper; PyMIC ``crop4vf.py``).

    The sides of a block are uniform in ``block_side``, but not longer than the patch. The grid consists of whole
    blocks and has a random offset. A fraction ``block_foreground`` of the blocks gets a class that is uniform in 1..K,
    the others get 0. If this fraction is not a whole number of blocks, the number is rounded up or down at random, so
    that the fraction is right on average even for a small patch with few blocks.
    """
    patch = np.asarray(patch_size)
    shortest, longest = (np.minimum(side, patch) for side in settings.block_side)
    side = rng.integers(shortest, longest, endpoint=True)
    offset = rng.integers(0, patch % side, endpoint=True)
    grid = patch // side

    count = int(grid.prod())
    classes = rng.integers(1, settings.coefficient_steps, size=count, endpoint=True).astype(np.uint8)
    classes[int(count * settings.block_foreground + rng.random()) :] = 0
    blocks = rng.permutation(classes).reshape(grid)

    fusion_map = np.zeros(patch, dtype=np.uint8)
    covered = tuple(slice(start, start + length) for start, length in zip(offset, grid * side, strict=True))
    fusion_map[covered] = blocks.repeat(side[0], 0).repeat(side[1], 1).repeat(side[2], 2)
    return torch.from_numpy(fusion_map)


def fuse(foreground: Tensor, background: Tensor, fusion_map: Tensor, coefficient_steps: int) -> Tensor:
    """Return X = a * foreground + (1 - a) * background with a = fusion_map / K.

    Args:
        foreground, background: (B, C, D, H, W), of the same shape.
        fusion_map: (B, D, H, W), whole numbers 0..K; one map for all channels.
        coefficient_steps: K.
    """
    coefficients = fusion_map[:, None].to(background.dtype).div_(coefficient_steps)  # B, 1, D, H, W
    return torch.lerp(background, foreground, coefficients)


def fuse_batch(batch: Mapping[str, Tensor], coefficient_steps: int) -> Tensor:
    """Augment and fuse a batch, without waiting for a GPU; return the fused volumes (B, C, D, H, W).

    Args:
        batch: ``tensors`` of :func:`nnunetv2_vf.pretext.loader.collate`, on any device; they are not changed.
        coefficient_steps: K.
    """
    foreground, background, fusion_map = batch["foreground"], batch["background"], batch["fusion_map"]
    transform_foreground, transform_background = fit_intensity_transforms(batch)
    fused = torch.empty_like(background)
    for start, stop in _slabs(fused):
        slab = (slice(None), slice(None), slice(start, stop))
        pair = transform_foreground(foreground[slab]), transform_background(background[slab])
        fused[slab] = fuse(*pair, fusion_map[:, start:stop], coefficient_steps)
    return fused


def fit_intensity_transforms(batch: Mapping[str, Tensor]) -> tuple[IntensityTransform, IntensityTransform]:
    """Return the augmentations of the foregrounds and of the backgrounds, from the parameters drawn for a batch."""
    foreground, background = (
        fit_intensity_transform(batch[name], *(batch[key][:, i] for key in ("percentiles", "gamma", "invert")))
        for i, name in enumerate(("foreground", "background"))
    )
    return foreground, background


def _slabs(image: Tensor) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, stop) of slices of an image (B, C, D, H, W); on a GPU one range with all slices."""
    depth = image.shape[2]
    step = max(1, _SLAB_VOXELS * depth // image.numel()) if image.device.type == "cpu" else depth
    for start in range(0, depth, step):
        yield start, min(start + step, depth)
