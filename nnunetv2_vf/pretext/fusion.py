"""The pretext task in pure tensors: draw a map of fusion coefficients, fuse two sub-volumes with it.

Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale
Unannotated Dataset", arXiv 2306.16925 (2023), section "Volume Fusion", and IEEE TIP 34 (2025).

    X = a * I_f + (1 - a) * I_b,   a in {0, 1/K, ..., 1},   Y = K * a

A fusion map holds Y: whole numbers 0..K, uint8, axes (D, H, W) in nnU-Net's order. Nothing here knows nnU-Net.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nnunetv2_vf.pretext.augmentation import IntensityMap, intensity_map
from nnunetv2_vf.settings import VFSettings

# Voxels of a piece that a CPU keeps in its cache through a dozen operations, instead of fetching them from memory for
# each: 12 ms instead of 19 for a pair of 64x128x128 voxels on one core.
_CACHED_VOXELS = 2**17


class FusedBatch(NamedTuple):
    """A batch as the network sees it."""

    fused: Tensor  # B, C, D, H, W
    fusion_map: Tensor  # B, D, H, W; uint8


def draw_fusion_map(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw the map that ``settings.fusion_map`` names; returns (D, H, W) uint8 with values 0..K."""
    draw = {"boxes": draw_boxes, "blocks": draw_blocks}[settings.fusion_map]
    return draw(patch_size, settings, rng)


def draw_boxes(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw overlapping boxes of random size and class on a ground of class 0 (the 2023 paper).

    Their number is uniform in ``box_count``; each side is uniform from ``box_min_side`` voxels to
    ``box_max_fraction`` of the patch (8..40 and 8..80 voxels for the paper's 64x128x128); the class is uniform in
    1..K; later boxes overwrite earlier ones.
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
    """Draw a regular grid of equal blocks on a ground of class 0 (the 2025 paper; PyMIC ``crop4vf.py``).

    The block's sides are uniform in ``block_side`` (cut to the patch), the grid of whole blocks lies at a random
    offset, a fraction ``block_foreground`` of the blocks gets a class uniform in 1..K, the others 0 (a fraction of a
    block is rounded at random, so that the share also holds where a small patch has room for few blocks).
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
    covered = tuple(slice(o, o + n) for o, n in zip(offset, grid * side, strict=True))
    fusion_map[covered] = blocks.repeat(side[0], 0).repeat(side[1], 1).repeat(side[2], 2)
    return torch.from_numpy(fusion_map)


def fuse(foreground: Tensor, background: Tensor, fusion_map: Tensor, coefficient_steps: int) -> Tensor:
    """Return X = a * foreground + (1 - a) * background with a = fusion_map / K.

    Args:
        foreground, background: (B, C, D, H, W), the same shape.
        fusion_map: (B, D, H, W), whole numbers 0..K; one map for all channels.
        coefficient_steps: K.
    """
    coefficients = fusion_map[:, None].to(background.dtype).div_(coefficient_steps)  # B, 1, D, H, W
    return torch.lerp(background, foreground, coefficients)


def fuse_batch(batch: Mapping[str, Tensor], coefficient_steps: int, device: torch.device) -> FusedBatch:
    """Augment and fuse a batch of :class:`nnunetv2_vf.pretext.sampling.FusionDataset` samples on ``device``.

    Nothing here waits for a GPU.
    """
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    foreground, background, fusion_map = batch["foreground"], batch["background"], batch["fusion_map"]
    adjust_foreground, adjust_background = intensity_maps(batch)
    fused = torch.empty_like(background)
    for start, stop in _pieces(fused):
        here = (slice(None), slice(None), slice(start, stop))
        pair = adjust_foreground(foreground[here]), adjust_background(background[here])
        fused[here] = fuse(*pair, fusion_map[:, start:stop], coefficient_steps)
    return FusedBatch(fused, fusion_map)


def intensity_maps(batch: Mapping[str, Tensor]) -> tuple[IntensityMap, IntensityMap]:
    """What was drawn for the intensities of the foregrounds and of the backgrounds of a batch."""
    foreground, background = (
        intensity_map(batch[name], *(batch[key][:, i] for key in ("percentiles", "gamma", "invert")))
        for i, name in enumerate(("foreground", "background"))
    )
    return foreground, background


def _pieces(image: Tensor) -> Iterator[tuple[int, int]]:
    """The slices [start, stop) of an image (B, C, D, H, W) that are made together."""
    depth = image.shape[2]
    step = max(1, _CACHED_VOXELS * depth // image.numel()) if image.device.type == "cpu" else depth
    for start in range(0, depth, step):
        yield start, min(start + step, depth)
