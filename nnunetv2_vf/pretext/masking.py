"""The masked pretext in pure tensors: hide blocks of a volume, measure how well a network restores them.

Masked autoencoding: He et al., arXiv 2111.06377 (2D, transformers); Tian et al., "SparK", arXiv 2301.03580
(convolutions); Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation", arXiv 2410.23132. The
recipe of the latter in nnssl (``masked_image_modeling/BaseMAETrainer.py``) gave the defaults: cubes of 16 voxels, three
quarters of them hidden, squared error of the hidden voxels, no intensity augmentation. Four things differ. There, a
fifth of the samples is scaled and a fifth is rotated; here, every crop is scaled along each axis, and none is rotated.
There, the error is the mean over the hidden voxels of a batch; here, over those of each sample. Here, the optimiser is
Adam, and the lower outputs of deep supervision count too.

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

# As published. It is the mean of an image after nnU-Net's z-score. After other normalisations it is another value: for
# CT the mean of the body, for intensities in [0, 1] that of air.
HIDDEN_INTENSITY = 0.0
_TINY = torch.finfo(torch.float32).tiny
_CONSTANT = 1e-5  # volumes whose variance is below this part of their mean square count as constant


class RestorationTarget(NamedTuple):
    """What the network has to restore."""

    volume: Tensor  # B, C, D, H, W; before intensities were hidden
    mask: Tensor  # B, D, H, W


def draw_mask(patch_size: Sequence[int], settings: VFSettings, rng: np.random.Generator) -> Tensor:
    """Draw a mask (D, H, W), bool: of a grid of cubes with ``mask_side`` voxels, ``mask_fraction`` are hidden.

    The grid starts at the first voxel and covers the patch; its last cubes are cut off where the patch ends. If the
    fraction is not a whole number of cubes, the number is rounded up or down at random, so that the fraction is right
    on average. Of two cubes or more, at least one is hidden, and one stays visible: from an input of one value, norms
    would make noise.
    """
    patch = np.asarray(patch_size)
    grid = -(-patch // settings.mask_side)
    count = int(grid.prod())
    num_hidden = min(max(int(count * settings.mask_fraction + rng.random()), 1), count - 1)
    is_hidden = np.arange(count) < num_hidden
    mask = rng.permutation(is_hidden).reshape(grid)
    for axis in range(3):
        mask = mask.repeat(settings.mask_side, axis)
    return torch.from_numpy(mask[tuple(slice(0, side) for side in patch)].copy())


def hide(target: RestorationTarget) -> Tensor:
    """Return the volume (B, C, D, H, W) without the hidden intensities."""
    return target.volume.masked_fill(target.mask[:, None], HIDDEN_INTENSITY)


class RestorationLoss(nn.Module):
    """Mean squared error of the restored intensities of each sample: hidden voxels and, with less weight, visible ones.

    Args:
        visible_weight: of the mean over the visible voxels; that over the hidden voxels has weight 1.
        scale_weights: of the outputs of deep supervision, the largest first; (1,) without deep supervision.
    """

    def __init__(self, visible_weight: float, scale_weights: Sequence[float] = (1,)):
        super().__init__()
        self.visible_weight = visible_weight
        self.scale_weights = scale_weights

    def forward(self, outputs: Sequence[Tensor], target: RestorationTarget) -> Tensor:
        """Return the loss, a number: the weighted sum over the outputs, each the mean over the samples.

        Args:
            outputs: of the network, (B, C, d, h, w) each, the largest first. The sides of each output must be whole
                multiples of the sides of the next.
        """
        hidden = target.mask[:, None].float()
        loss = self._part_loss(outputs, target.volume, hidden)
        if self.visible_weight:
            loss = loss + self.visible_weight * self._part_loss(outputs, target.volume, 1 - hidden)
        return loss

    def _part_loss(self, outputs: Sequence[Tensor], volume: Tensor, part: Tensor) -> Tensor:
        """Return the loss of a part of the voxels.

        A voxel of a smaller output is compared with the mean intensity of its voxels that belong to the part. Its
        weight is the share of these voxels.

        Args:
            part: (B, 1, D, H, W), 1 for the voxels of the part and 0 for others.
        """
        share, intensity = part, volume * part
        loss = volume.new_zeros(())
        for weight, output in zip(self.scale_weights, outputs, strict=True):
            if weight:  # nnU-Net gives the smallest output none
                share, intensity = _mean_to_size(share, output), _mean_to_size(intensity, output)
                loss = loss + weight * _weighted_error(output.float(), intensity / share.clamp_min(_TINY), share)
        return loss


def _mean_to_size(volume: Tensor, output: Tensor) -> Tensor:
    """Return the means of the blocks of voxels that each voxel of a smaller output covers."""
    if volume.shape[2:] == output.shape[2:]:
        return volume
    sides = zip(volume.shape[2:], output.shape[2:], strict=True)
    return F.avg_pool3d(volume, [large // small for large, small in sides])  # Apple GPUs have no adaptive pooling


def _weighted_error(restored: Tensor, intensity: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted mean squared error of each sample, averaged over the samples.

    Args:
        weight: (B, 1, D, H, W)
    """
    error = (restored - intensity).square().mean(1, keepdim=True) * weight
    return (error.flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(_TINY)).mean()


def restoration_sums(restored: Tensor, target: RestorationTarget) -> Tensor:
    """Return sums over the hidden voxels of a batch, on the device and without waiting for it.

    Returns:
        (C, 4), float32: number of voxels, sum of their intensities, of the squared intensities, and of the squared
        errors. Sums of several batches can be added.
    """
    hidden, volume = target.mask[:, None].float(), target.volume
    error = (restored.float() - volume).square()
    columns = (torch.ones_like(volume), volume, volume.square(), error)
    return torch.stack([(column * hidden).sum((0, 2, 3, 4)) for column in columns], dim=1)


def restored_share(sums: np.ndarray) -> np.ndarray:
    """Return how much of the variance of the hidden voxels was restored, for each channel.

    1: all intensities are right; 0: no better than the mean of the hidden voxels; NaN: these have no variance.

    Args:
        sums: (C, 4), of :func:`restoration_sums`.
    """
    count, total, squares, errors = np.asarray(sums, float).T
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = squares - total**2 / count
        return np.where(deviations > _CONSTANT * squares, 1 - errors / deviations, np.nan)
