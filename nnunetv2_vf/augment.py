"""Augmentation of sub-volumes: parameters are drawn per sample (NumPy), applied per batch (torch, any device).

Flip, percentile contrast, gamma and joint inversion of arXiv 2306.16925 (implementation of the authors: PyMIC
``crop4vf.py``). The paper works on images in [0, 1]; nnU-Net's arrive z-scored or CT-normalised. So every channel
of every sub-volume is mapped to [0, 1] for these operations and then back to the mean and standard deviation it
came with: the network sees the statistics that it will see when it is fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nnunetv2_vf.settings import VFSettings

_SPACE = (-3, -2, -1)
# Percentiles are read from a regular subset of at most this many voxels: sorting them costs
# 1 ms instead of 80 (64x128x128 voxels, one CPU core).
_PERCENTILE_VOXELS = 2**14


def draw_augmentation(num_channels: int, settings: VFSettings, rng: np.random.Generator) -> dict[str, Tensor]:
    """Draw the parameters of one sample: two sub-volumes (foreground, background) of C channels.

    Returns:
        ``flip`` (2, 3) bool, per axis; ``percentiles`` (2, C, 2), lower and upper, NaN where the contrast is left
        alone; ``gamma`` (2, C); ``invert`` () bool, common to both.
    """
    per_channel = (2, num_channels)
    flip = rng.random((2, 3)) < settings.flip_probability
    lower = rng.uniform(*settings.contrast_lower, size=per_channel)
    upper = rng.uniform(*settings.contrast_upper, size=per_channel)
    percentiles = np.stack([lower, upper], axis=-1)
    percentiles[rng.random(per_channel) >= settings.contrast_probability] = np.nan
    gamma = rng.uniform(*settings.gamma, size=per_channel)
    invert = rng.random() < settings.invert_probability
    return {
        "flip": torch.from_numpy(flip),
        "percentiles": torch.from_numpy(percentiles).float(),
        "gamma": torch.from_numpy(gamma).float(),
        "invert": torch.tensor(bool(invert)),
    }


@torch.no_grad()
def augment(subvolumes: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Apply what :func:`draw_augmentation` drew, collated to a batch.

    Args:
        subvolumes: (B, 2, C, D, H, W), finite.
        parameters: ``flip`` (B, 2, 3), ``percentiles`` (B, 2, C, 2), ``gamma`` (B, 2, C), ``invert`` (B,); all
            on the device of ``subvolumes`` but ``flip``, on the CPU.
    """
    invert = parameters["invert"][:, None, None].expand_as(parameters["gamma"])
    adjusted = adjust_intensity(subvolumes, parameters["percentiles"], parameters["gamma"], invert)
    return flip(adjusted, parameters["flip"])


def flip(x: Tensor, axes: Tensor) -> Tensor:
    """Mirror the spatial axes of x (B, 2, C, D, H, W) where ``axes`` (B, 2, 3) is true.

    ``axes`` stays on the CPU, whatever the device of x: reading it must not wait for a GPU.
    """
    mirrored = torch.empty_like(x)
    for index in np.ndindex(*axes.shape[:2]):
        mirrored[index] = x[index].flip([dim for dim, yes in zip(_SPACE, axes[index].tolist(), strict=True) if yes])
    return mirrored


def adjust_intensity(x: Tensor, percentiles: Tensor, gamma: Tensor, invert: Tensor) -> Tensor:
    """Percentile contrast, gamma and inversion, then back to the mean and standard deviation of each channel.

    The contrast is linear in three pieces: [min, v0] to [0, .1], [v0, v1] to [.1, .9], [v1, max] to [.9, 1], with
    v0 and v1 the lower and upper percentile. A constant channel stays as it is.

    Args:
        x: (..., D, H, W).
        percentiles: (..., 2) in [0, 100]; NaN leaves the contrast as it is.
        gamma, invert: (...).
    """
    lowest, highest = x.amin(_SPACE), x.amax(_SPACE)
    extent = highest - lowest
    unchanged = torch.stack([lowest + 0.1 * extent, lowest + 0.9 * extent], dim=-1)
    knots = torch.where(percentiles.isnan(), unchanged, _percentile(x, percentiles.nan_to_num(50.0)))
    v0, v1 = knots.unbind(-1)

    unit = _ramp(x, lowest, v0, 0.1).add_(_ramp(x, v0, v1, 0.8)).add_(_ramp(x, v1, highest, 0.1))
    unit.clamp_(0, 1).pow_(_spatial(gamma))
    unit.sub_(unit.mean(_SPACE, keepdim=True))

    # Norms about the mean: std_mean takes ten times as long on a CPU. Inverting u to 1 - u is a change of sign here.
    mean = x.mean(_SPACE, keepdim=True)
    norm, unit_norm = (torch.linalg.vector_norm(v, dim=_SPACE, keepdim=True) for v in (x - mean, unit))
    gain = torch.where(unit_norm > 0, norm / unit_norm, 0.0) * torch.where(_spatial(invert), -1.0, 1.0)
    return unit.mul_(gain).add_(mean)


def _ramp(x: Tensor, low: Tensor, high: Tensor, rise: float) -> Tensor:
    """0 below ``low``, ``rise`` above ``high``, linear in between; 0 everywhere where they coincide.

    Coinciding knots (more air than the lower percentile, say) leave out a constant; the authors' rescaling to
    [0, 1] before the gamma, and our return to mean and standard deviation after it, remove it in any case.
    """
    low, high = _spatial(low), _spatial(high)
    slope = torch.where(high > low, rise / (high - low).clamp_min(torch.finfo(x.dtype).tiny), 0.0)
    return torch.clamp(x, low, high).sub_(low).mul_(slope)


def _percentile(x: Tensor, percentiles: Tensor) -> Tensor:
    """Percentiles (..., P) of x (..., D, H, W), linear between ranks, from a regular subset of the voxels."""
    step = max(1, math.ceil((x.shape[-3] * x.shape[-2] * x.shape[-1] / _PERCENTILE_VOXELS) ** (1 / 3)))
    ranked = x[..., ::step, ::step, ::step].flatten(-3).sort(-1).values
    rank = percentiles / 100 * (ranked.shape[-1] - 1)
    below = rank.floor()
    above = rank.ceil()
    return torch.lerp(ranked.gather(-1, below.long()), ranked.gather(-1, above.long()), rank - below)


def _spatial(x: Tensor) -> Tensor:
    return x[..., None, None, None]
