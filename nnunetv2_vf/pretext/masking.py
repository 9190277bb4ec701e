"""The masked pretext in pure tensors: hide blocks of a volume, measure how well a network restores them.

Masked autoencoding: He et al., arXiv 2111.06377 (2D, transformers); Tian et al., "SparK", arXiv 2301.03580
(convolutions); Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", arXiv 2410.23132. The
recipe of the latter in nnssl (``masked_image_modeling/BaseMAETrainer.py``) is the default here: cubes of 16 voxels,
three quarters of them hidden, squared error of the hidden voxels, no intensity augmentation.

A mask is bool with the axes (D, H, W), True where a voxel is hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nnunetv2_vf.settings import VFSettings

HIDDEN_INTENSITY = 0.0  # the mean of an image that nnU-Net has normalised


class HiddenVolume(NamedTuple):
    """What the network has to restore."""

    volume: Tensor  # B, C, D, H, W; before intensities were hidden
    mask: Tensor  # B, D, H, W


def draw_mask(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw a mask (D, H, W), bool: of a grid of cubes with ``mask_side`` voxels, ``mask_fraction`` are hidden.

    The grid starts at the first voxel and covers the patch; its last cubes are cut off where the patch ends. If the
    fraction is not a whole number of cubes, the number is rounded up or down at random, so that the fraction is right
    on average. At least one cube stays visible: from an input of one value, norms would make noise.
    """
    patch = np.asarray(patch_size)
    grid = -(-patch // settings.mask_side)
    count = int(grid.prod())
    num_hidden = min(int(count * settings.mask_fraction + rng.random()), count - 1)
    is_hidden = np.arange(count) < num_hidden
    mask = rng.permutation(is_hidden).reshape(grid)
    for axis in range(3):
        mask = mask.repeat(settings.mask_side, axis)
    return torch.from_numpy(mask[tuple(slice(0, side) for side in patch)].copy())


def hide(hidden: HiddenVolume) -> Tensor:
    """Return the volume (B, C, D, H, W) without the hidden intensities."""
    return hidden.volume.masked_fill(hidden.mask[:, None], HIDDEN_INTENSITY)


class RestorationLoss(nn.Module):
    """Mean squared error of the restored intensities of each sample: hidden voxels and, with less weight, visible ones.

    Args:
        visible_weight: of the mean over the visible voxels; that over the hidden voxels has weight 1.
    """

    def __init__(self, visible_weight: float):
        super().__init__()
        self.visible_weight = visible_weight

    def forward(self, restored: Tensor, hidden: HiddenVolume) -> Tensor:
        """Return the loss of one output of the network, a number.

        An output of deep supervision is smaller than the volume. It is compared with the mean intensity of each of its
        voxels, which counts as hidden to the share to which it is.

        Args:
            restored: (B, C, d, h, w).
        """
        size = restored.shape[2:]
        hidden_share = _shrink(hidden.mask[:, None].float(), size)
        error = (restored.float() - _shrink(hidden.volume, size)).square().mean(1, keepdim=True)
        loss = _mean_over_samples(error, hidden_share)
        if self.visible_weight:
            loss = loss + self.visible_weight * _mean_over_samples(error, 1 - hidden_share)
        return loss


def _shrink(x: Tensor, size: torch.Size) -> Tensor:
    depth, height, width = size
    return x if x.shape[2:] == size else F.adaptive_avg_pool3d(x, (depth, height, width))


def _mean_over_samples(x: Tensor, weights: Tensor) -> Tensor:
    """Return the mean over the samples of each sample's weighted mean, which is 0 if all its weights are 0.

    The mean of a batch on several ranks is therefore that of the whole batch.
    """
    sums = (x * weights).flatten(1).sum(1)
    return (sums / weights.flatten(1).sum(1).clamp_min(torch.finfo(sums.dtype).tiny)).mean()


def restoration_sums(restored: Tensor, hidden: HiddenVolume) -> Tensor:
    """Return sums over the hidden voxels of a batch, on the device and without waiting for it.

    Returns:
        (C, 4), float64: number of voxels, sum of their intensities, of the squared intensities, and of the squared
        errors. Sums of several batches can be added.
    """
    is_hidden = hidden.mask[:, None].to(torch.float64)
    volume = hidden.volume.to(torch.float64)
    error = (restored.to(torch.float64) - volume).square()
    columns = (torch.ones_like(volume), volume, volume.square(), error)
    return torch.stack([(column * is_hidden).sum((0, 2, 3, 4)) for column in columns], dim=1)


def restored_share(sums: np.ndarray) -> np.ndarray:
    """Return how much of the variance of the hidden voxels was restored, for each channel.

    1: all intensities are right; 0: no better than the mean of the hidden voxels; NaN: these have no variance.

    Args:
        sums: (C, 4), of :func:`restoration_sums`.
    """
    count, total, squares, errors = np.asarray(sums, float).T
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = squares - total**2 / count
        return np.where(deviations > 1e-9 * squares, 1 - errors / deviations, np.nan)
