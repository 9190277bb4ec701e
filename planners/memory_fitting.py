"""Choose the largest patch and batch whose training step fits into the GPU memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.network_topology import pad_shape

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.five_level_network import total_stride
from nnunetv2_vf.planners.step_memory import GIB, USABLE_FRACTION, StepMemory

_LARGEST_PATCH_VOXELS = 256**3  # as in nnU-Net
_MIN_BATCH_SIZE = 2  # as in nnU-Net
Patch = tuple[int, ...]  # D, H, W in voxels
MeasureStep = Callable[[Patch, int], StepMemory]  # patch and batch size -> memory of a training step


def patch_divisor(architecture: Mapping[str, Any]) -> Patch:
    """Return the number that each side of a patch must be a multiple of: the network's total stride per axis.

    Args:
        architecture: the entry ``architecture`` of a plan.
    """
    return total_stride(architecture["arch_kwargs"]["strides"])


def candidate_patches(spacing: Sequence[float], median_shape: Sequence[float], divisor: Patch) -> list[Patch]:
    """Return patches from the largest to the smallest; each is shorter than the one before along one axis.

    As in nnU-Net, the first patch is a cube in mm and has 256^3 voxels. No side is longer than the median shape,
    rounded up to a multiple of ``divisor``. The axis that shrinks is the one along which the patch covers the largest
    part of the median shape.

    Args:
        spacing: mm.
        median_shape: of the resampled cases, in voxels.
        divisor: each side of a patch is a multiple of it.
    """
    smallest = np.minimum(2, np.ceil(median_shape / np.array(divisor))).astype(int) * divisor
    if (smallest == divisor).all():  # a norm over the single voxel of the deepest level fails
        smallest *= 2
    voxels_per_mm = 1 / np.asarray(spacing, dtype=float)
    cube = np.round(voxels_per_mm * (_LARGEST_PATCH_VOXELS / np.prod(voxels_per_mm)) ** (1 / 3))
    patch = np.maximum(pad_shape(np.minimum(cube, np.ceil(median_shape)).astype(int), divisor), smallest)
    patches = [tuple(int(side) for side in patch)]
    while (patch > smallest).any():
        coverage = np.where(patch > smallest, patch / np.asarray(median_shape), -1)
        axis = int(np.argmax(coverage))
        patch[axis] -= divisor[axis]
        patches.append(tuple(int(side) for side in patch))
    return patches


def fit_patch(patches: Sequence[Patch], divisor: Patch, measure: MeasureStep, target_gb: float) -> Patch:
    """Return the largest patch whose training step with the smallest batch fits into the memory.

    Args:
        patches: from the largest to the smallest.
        target_gb: GPU memory in GB.

    Raises:
        UserError: not even the smallest patch fits.
    """

    def fits(patch: Patch) -> bool:
        return measure(patch, _MIN_BATCH_SIZE).total <= _usable_bytes(target_gb)

    if not fits(patches[-1]):
        needed = measure(patches[-1], _MIN_BATCH_SIZE).total / GIB / USABLE_FRACTION
        raise UserError(
            f"-gpu_memory_target {target_gb:g} is too small for this network, whose smallest patch is {patches[-1]}; "
            f"use at least {math.ceil(needed * 10) / 10:g} GB"
        )
    index = _first_guess(patches, divisor, measure, target_gb)
    while not fits(patches[index]):
        index += 1
    while index > 0 and fits(patches[index - 1]):
        index -= 1
    return patches[index]


def _first_guess(patches: Sequence[Patch], divisor: Patch, measure: MeasureStep, target_gb: float) -> int:
    """Return the index of the patch that should just fit, extrapolated from the memory of a small patch."""
    small = tuple(4 * d for d in divisor)
    voxels = math.prod(small) * measure(small, _MIN_BATCH_SIZE).growth_within(_usable_bytes(target_gb))
    return next((i for i, patch in enumerate(patches) if math.prod(patch) <= voxels), len(patches) - 1)


def fit_batch_size(patch: Patch, measure: MeasureStep, target_gb: float, limit: int) -> int:
    """Return the largest batch size that fits into the memory: at most ``limit``, but at least 2."""
    usable = _usable_bytes(target_gb)
    growth = measure(patch, _MIN_BATCH_SIZE).growth_within(usable)
    batch_size = max(_MIN_BATCH_SIZE, min(int(_MIN_BATCH_SIZE * growth), limit))
    while batch_size > _MIN_BATCH_SIZE and measure(patch, batch_size).total > usable:
        batch_size -= 1
    return batch_size


def _usable_bytes(target_gb: float) -> float:
    return USABLE_FRACTION * target_gb * GIB
