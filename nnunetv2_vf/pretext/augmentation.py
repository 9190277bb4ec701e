"""Intensity augmentation: draw parameters for a sample (NumPy), apply them to a batch (torch, any device).

Percentile contrast, gamma correction and joint inversion of arXiv 2306.16925 (the authors' implementation: PyMIC
``crop4vf.py``). The paper works on images in [0, 1], but nnU-Net's images are z-scored or CT-normalised. So each
channel of each sub-volume is mapped to [0, 1] for these operations, and then back to the mean and standard deviation
that it had before. The network thus sees the intensity statistics that it also sees in fine-tuning.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from nnunetv2_vf.settings import VFSettings

# Percentiles are those of a regular subset with at most this many voxels. Sorting all 64x128x128 voxels of a sub-volume
# takes 80 ms on one CPU core, more than all other operations together. On a CPU, mean and standard deviation are those
# of the subset too, which saves 5 of 27 ms.
_SUBSET_VOXELS = 2**14
# If the standard deviation of the subset is below this fraction of the range of all voxels, almost all of the image is
# air. The subset may then miss the rest, so all voxels are measured.
_MIN_RELATIVE_STD = 0.05
_MIN_BASE = 1e-6  # smallest base of a power: the logarithm of 0 takes fifty times as long


def draw_augmentation(num_channels: int, settings: VFSettings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw the parameters of one sample: two sub-volumes (foreground, background) with C channels each.

    Returns:
        ``percentiles`` (2, C, 2), lower and upper percentile, NaN for channels whose contrast is not changed;
        ``gamma`` (2, C), the exponents; ``invert`` (2, C), bool, the same for all channels of both sub-volumes.
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


@torch.no_grad()
def fit_intensity_transform(x: Tensor, percentiles: Tensor, gamma: Tensor, invert: Tensor) -> IntensityTransform:
    """Return the transform that augments x: percentile contrast, gamma, inversion, then back to mean and deviation.

    The contrast maps intensities linearly in three ranges: [min, v0] to [0, .1], [v0, v1] to [.1, .9], [v1, max] to
    [.9, 1], where v0 and v1 are the lower and the upper percentile. The result u is raised to the power gamma.
    Inversion replaces u by 1 - u. Constant channels do not change.

    Args:
        x: (..., D, H, W).
        percentiles: (..., 2), in [0, 100]; NaN: no change of contrast.
        gamma, invert: (...).
    """
    channels = x.reshape(-1, *x.shape[-3:])  # M, D, H, W
    # aminmax finds both extremes in one pass: 0.5 ms instead of 1.2 for a pair of 64x128x128 voxels on one CPU core.
    lowest, highest = torch.tensor_split(torch.stack([torch.stack(c.aminmax()) for c in channels]), 2, dim=1)
    subset = _regular_subset(channels)  # M, at most _SUBSET_VOXELS
    v0, v1 = _contrast_knots(subset, lowest, highest, percentiles.reshape(-1, 2)).split(1, dim=1)
    curve = _Curve.through(lowest, v0, v1, highest, gamma.reshape(-1, 1))

    if x.device.type == "cpu":
        statistics = _measure(curve, subset)
        is_airy = subset.std(1) < _MIN_RELATIVE_STD * (highest - lowest)[:, 0]
        if is_airy.any():  # these channels only: a sample must not depend on the others of its batch
            statistics[:, is_airy] = _measure(curve.of_channels(is_airy), channels.flatten(1)[is_airy])
    else:  # a GPU is fast enough, and reading a result from it would make the CPU wait
        statistics = _measure(curve, channels.flatten(1))
    mean, std, unit_mean, unit_std = statistics
    gain = torch.where(highest > lowest, std / unit_std, 0.0)
    gain = torch.where(invert.reshape(-1, 1), -gain, gain)  # 1 - u: the mean is restored anyway
    return IntensityTransform(curve, gain, offset=mean - gain * unit_mean)


class IntensityTransform(NamedTuple):
    """The function gain * curve(x) + offset of each voxel, for M channels."""

    curve: _Curve
    gain: Tensor  # M, 1
    offset: Tensor  # M, 1

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the transform to x (..., d, H, W), whose leading axes hold the M channels."""
        voxels = x.reshape(len(self.gain), -1)
        return self.curve(voxels).mul_(self.gain).add_(self.offset).view(x.shape)


class _Curve(NamedTuple):
    """Contrast and gamma: the function from intensities to [0, 1]. Every field is (M, 1), for M channels.

    The contrast has three linear pieces. They are computed with two PReLUs, each of which bends the line at one knot:
    the first one above v1, the second one below v0. A PReLU takes one pass over the voxels; a clamped linear piece
    would take four.
    """

    v1: Tensor
    scale: Tensor  # slope of the middle piece, or 1 / (highest - lowest) if that piece is empty
    slope_above: Tensor  # slope above v1, divided by scale
    middle_rise: Tensor  # rise of the middle piece, from v0 to v1
    slope_below: Tensor  # slope below v0, divided by scale
    value_at_v0: Tensor
    gamma: Tensor

    @classmethod
    def through(cls, lowest: Tensor, v0: Tensor, v1: Tensor, highest: Tensor, gamma: Tensor) -> _Curve:
        """Return the curve through (lowest, 0), (v0, .1), (v1, .9) and (highest, 1), to the power of gamma.

        If two knots coincide (for example because there is more air than the lower percentile), the rise between them
        is left out. This shifts the curve by a constant. The authors remove it when they rescale to [0, 1] before the
        gamma; here the return to mean and standard deviation removes it.
        """
        lower, middle, upper = _slope(0.1, lowest, v0), _slope(0.8, v0, v1), _slope(0.1, v1, highest)
        scale = torch.where(middle > 0, middle, 1 / (highest - lowest).clamp_min(torch.finfo(v0.dtype).tiny))
        return cls(
            v1=v1,
            scale=scale,
            slope_above=upper / scale,
            middle_rise=middle * (v1 - v0),
            slope_below=lower / scale,
            value_at_v0=lower * (v0 - lowest),
            gamma=gamma,
        )

    def of_channels(self, chosen: Tensor) -> _Curve:
        """Return the functions of some channels; chosen (M), bool."""
        return _Curve(*(values[chosen] for values in self))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the values of x (M, n)."""
        below_v1 = _prelu(torch.sub(self.v1, x).mul_(self.scale), self.slope_above)
        above_v0 = _prelu(torch.sub(self.middle_rise, below_v1, out=below_v1), self.slope_below)
        # On a CPU, exp(gamma * log(u)) takes a fifth of the time of u ** gamma. Near 0 both are slow.
        return above_v0.add_(self.value_at_v0).clamp_(_MIN_BASE, 1).log_().mul_(self.gamma).exp_()


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    """Return x where it is positive, slope * x where it is negative; x (M, n), slope (M, 1)."""
    return F.prelu(x[None], slope[:, 0])[0]


def _slope(rise: float, low: Tensor, high: Tensor) -> Tensor:
    """Return rise / (high - low), or 0 where both are equal."""
    return torch.where(high > low, rise / (high - low).clamp_min(torch.finfo(low.dtype).tiny), 0.0)


def _contrast_knots(subset: Tensor, lowest: Tensor, highest: Tensor, percentiles: Tensor) -> Tensor:
    """Return v0 and v1 (M, 2): the percentiles, or the knots that leave the contrast as it is where those are NaN."""
    # On a CPU, NumPy sorts 16,384 numbers in 0.04 ms, a twentieth of torch's time.
    ranked = torch.from_numpy(np.sort(subset.numpy(), 1)) if subset.device.type == "cpu" else subset.sort(1).values
    rank = percentiles.nan_to_num(50.0) / 100 * (ranked.shape[1] - 1)
    below, above = rank.floor(), rank.ceil()
    knots = torch.lerp(ranked.gather(1, below.long()), ranked.gather(1, above.long()), rank - below)
    extent = highest - lowest
    unchanged = torch.cat([lowest + 0.1 * extent, lowest + 0.9 * extent], dim=1)
    return torch.where(percentiles.isnan(), unchanged, knots)


def _measure(curve: _Curve, voxels: Tensor) -> Tensor:
    """Return mean and standard deviation of the channels' voxels (M, n), before and after the curve: (4, M, 1)."""
    unit = curve(voxels)
    return torch.stack([f(1, keepdim=True) for f in (voxels.mean, voxels.std, unit.mean, unit.std)])


def _regular_subset(channels: Tensor) -> Tensor:
    """Return every n-th voxel along each axis, at most _SUBSET_VOXELS: (M, D, H, W) to (M, n)."""
    step = max(1, math.ceil((math.prod(channels.shape[1:]) / _SUBSET_VOXELS) ** (1 / 3)))
    return channels[:, ::step, ::step, ::step].flatten(1)
