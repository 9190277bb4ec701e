"""Intensities of sub-volumes: parameters are drawn per sample (NumPy), applied per batch (torch, any device).

Percentile contrast, gamma and joint inversion of arXiv 2306.16925 (implementation of the authors: PyMIC
``crop4vf.py``). The paper works on images in [0, 1]; nnU-Net's arrive z-scored or CT-normalised. So every channel of
every sub-volume is mapped to [0, 1] for these operations and then back to the mean and standard deviation it came
with: the network sees the statistics that it will see when it is fine-tuned.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nnunetv2_vf.settings import VFSettings

# Percentiles are read from a regular subset of at most this many voxels: to sort all 64x128x128 of a sub-volume would
# take 80 ms on one CPU core, more than everything else together. On the CPU, mean and standard deviation are too, which
# saves 5 of 27 ms, unless the subset deviates by less than this part of the extent of all voxels: then it may miss what
# little there is beside the air.
_SUBSET_VOXELS = 2**14
_SPARSE = 0.05
_DARKEST = 1e-6  # instead of 0, whose logarithm takes fifty times as long


def draw_augmentation(num_channels: int, settings: VFSettings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw the parameters of one sample: two sub-volumes (foreground, background) of C channels.

    Returns:
        ``percentiles`` (2, C, 2), lower and upper, NaN where the contrast is left alone; ``gamma`` (2, C);
        ``invert`` (2, C) bool, all alike.
    """
    per_channel = (2, num_channels)
    lower = rng.uniform(*settings.contrast_lower, size=per_channel)
    upper = rng.uniform(*settings.contrast_upper, size=per_channel)
    percentiles = np.stack([lower, upper], axis=-1)
    percentiles[rng.random(per_channel) >= settings.contrast_probability] = np.nan
    gamma = rng.uniform(*settings.gamma, size=per_channel)
    invert = rng.random() < settings.invert_probability
    return {
        "percentiles": torch.from_numpy(percentiles).float(),
        "gamma": torch.from_numpy(gamma).float(),
        "invert": torch.full(per_channel, bool(invert)),
    }


def adjust_intensity(x: Tensor, percentiles: Tensor, gamma: Tensor, invert: Tensor) -> Tensor:
    """The :func:`intensity_map` of x, applied to x (..., D, H, W)."""
    return intensity_map(x, percentiles, gamma, invert)(x)


@torch.no_grad()
def intensity_map(x: Tensor, percentiles: Tensor, gamma: Tensor, invert: Tensor) -> IntensityMap:
    """Percentile contrast, gamma and inversion, then back to the mean and standard deviation of each channel.

    The contrast is linear in three pieces: [min, v0] to [0, .1], [v0, v1] to [.1, .9], [v1, max] to [.9, 1], with
    v0 and v1 the lower and upper percentile, of a large channel those of a regular subset of its voxels. A constant
    channel stays as it is.

    Args:
        x: (..., D, H, W).
        percentiles: (..., 2) in [0, 100]; NaN leaves the contrast as it is.
        gamma, invert: (...).
    """
    channels = x.reshape(-1, *x.shape[-3:])  # M, D, H, W
    # both in one pass for each channel: 0.5 ms instead of 1.2 for a pair of 64x128x128 voxels on one CPU core
    lowest, highest = torch.tensor_split(torch.stack([torch.stack(c.aminmax()) for c in channels]), 2, dim=1)
    subset = _regular_subset(channels)  # M, at most _SUBSET_VOXELS
    v0, v1 = _knots(subset, lowest, highest, percentiles.reshape(-1, 2)).split(1, dim=1)
    curve = _Curve.through(lowest, v0, v1, highest, gamma.reshape(-1, 1))

    measured = channels.flatten(1) if _may_miss(subset, highest - lowest) else subset
    unit = curve(measured)
    mean, unit_mean = (v.mean(1, keepdim=True) for v in (measured, unit))
    std, unit_std = (v.std(1, keepdim=True) for v in (measured, unit))
    gain = torch.where(highest > lowest, std / unit_std, 0.0)
    gain = torch.where(invert.reshape(-1, 1), -gain, gain)  # u to 1 - u: a change of sign, about the mean
    return IntensityMap(curve, gain, offset=mean - gain * unit_mean)


class IntensityMap(NamedTuple):
    """gain * curve(x) + offset, voxel by voxel."""

    curve: _Curve
    gain: Tensor  # M, 1 for M channels
    offset: Tensor  # M, 1

    def __call__(self, x: Tensor) -> Tensor:  # (..., d, H, W) with M channels in all
        voxels = x.reshape(len(self.gain), -1)
        return self.curve(voxels).mul_(self.gain).add_(self.offset).view(x.shape)


class _Curve(NamedTuple):
    """Contrast and gamma: intensity to [0, 1]. Every field is (M, 1), for M channels.

    Two knees instead of three ramps: seen from ``v1``, in units of the middle piece, one knee bends what lies above
    ``v1``, the other what lies below ``v0``. Each is one pass over the voxels (PReLU); a clamped ramp takes four.
    """

    v1: Tensor
    scale: Tensor  # 1 / unit of the middle piece
    above: Tensor  # slope above v1, relative to the scale
    rise: Tensor  # of the middle piece
    below: Tensor  # slope below v0, relative to the scale
    start: Tensor  # value at v0
    gamma: Tensor

    @classmethod
    def through(cls, lowest: Tensor, v0: Tensor, v1: Tensor, highest: Tensor, gamma: Tensor) -> _Curve:
        """The curve through (lowest, 0), (v0, .1), (v1, .9) and (highest, 1), to the power of gamma.

        Where two knots coincide (more air than the lower percentile, say), the rise between them is left out: a
        constant, which the authors' rescaling to [0, 1] before the gamma removes, and our return to mean and
        standard deviation after it.
        """
        lower, middle, upper = _slope(0.1, lowest, v0), _slope(0.8, v0, v1), _slope(0.1, v1, highest)
        scale = torch.where(middle > 0, middle, 1 / (highest - lowest).clamp_min(torch.finfo(v0.dtype).tiny))
        return cls(
            v1=v1,
            scale=scale,
            above=upper / scale,
            rise=middle * (v1 - v0),
            below=lower / scale,
            start=lower * (v0 - lowest),
            gamma=gamma,
        )

    def __call__(self, x: Tensor) -> Tensor:  # (M, n)
        from_v1 = _knee(torch.sub(self.v1, x).mul_(self.scale), self.above)
        from_v0 = _knee(torch.sub(self.rise, from_v1, out=from_v1), self.below)
        # exp(gamma * log(u)) takes a fifth of the time of u ** gamma on a CPU, away from 0, where both are slow
        return from_v0.add_(self.start).clamp_(_DARKEST, 1).log_().mul_(self.gamma).exp_()


def _knee(x: Tensor, slope: Tensor) -> Tensor:
    """x where it is positive, slope * x where it is negative; x (M, n), slope (M, 1)."""
    return F.prelu(x[None], slope[:, 0])[0]


def _slope(rise: float, low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high > low, rise / (high - low).clamp_min(torch.finfo(low.dtype).tiny), 0.0)


def _knots(subset: Tensor, lowest: Tensor, highest: Tensor, percentiles: Tensor) -> Tensor:
    """v0 and v1 (M, 2): the percentiles, linear between ranks; where they are NaN those that change nothing."""
    # numpy sorts 16,384 numbers in a twentieth of the time that torch takes on a CPU: 0.04 ms
    ranked = torch.from_numpy(np.sort(subset.numpy(), 1)) if subset.device.type == "cpu" else subset.sort(1).values
    rank = percentiles.nan_to_num(50.0) / 100 * (ranked.shape[1] - 1)
    below, above = rank.floor(), rank.ceil()
    found = torch.lerp(ranked.gather(1, below.long()), ranked.gather(1, above.long()), rank - below)
    extent = highest - lowest
    unchanged = torch.cat([lowest + 0.1 * extent, lowest + 0.9 * extent], dim=1)
    return torch.where(percentiles.isnan(), unchanged, found)


def _may_miss(subset: Tensor, extent: Tensor) -> bool:
    """Whether mean and standard deviation are to be those of all voxels; a GPU has the time, and is not asked."""
    return subset.device.type != "cpu" or bool((subset.std(1, keepdim=True) < _SPARSE * extent).any())


def _regular_subset(channels: Tensor) -> Tensor:
    """Every n-th voxel along each axis, at most _SUBSET_VOXELS: (M, D, H, W) -> (M, n)."""
    step = max(1, math.ceil((math.prod(channels.shape[1:]) / _SUBSET_VOXELS) ** (1 / 3)))
    return channels[:, ::step, ::step, ::step].flatten(1)
