"""Draw sub-volumes of a case: crops of random size and position, flipped at random, resized to the patch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnunetv2_vf.pretext.cases import (
    PreprocessedCases,
    RejectedCaseError,
    has_contrast,
    open_image,
    read_with_retries,
)
from nnunetv2_vf.settings import VFSettings

Box = list[list[int]]  # [start, end) in voxels for each axis

_MAX_CROPS = 100  # crops of one case before it is rejected; enough for scans that are four fifths air
_CROPS_BEFORE_FULL_READ = 20  # after so many crops without contrast, the whole image is checked once


class SubvolumeSampler:
    """Draws sub-volumes of preprocessed cases.

    Args:
        cases: nnU-Net's dataset; images are read with its own ``load_case``.
        patch_size: (D, H, W) in voxels; every sub-volume has this size.
        channels: required number of channels; None: any number.
    """

    def __init__(
        self, cases: PreprocessedCases, patch_size: Sequence[int], settings: VFSettings, channels: int | None = None
    ):
        depth, height, width = (int(length) for length in patch_size)
        self.patch_size = (depth, height, width)
        self.cases = cases
        self.settings = settings
        self.channels = channels
        self._has_contrast: dict[str, bool] = {}  # cases whose whole image this process has checked

    def draw(self, case: str, count: int, rng: np.random.Generator) -> list[Tensor]:
        """Draw ``count`` sub-volumes (C, D, H, W) of a case.

        A crop whose channels are all constant (air) is replaced by another one.

        Raises:
            RejectedCaseError: the case cannot be read or has another shape or number of channels; a crop has NaN or
                infinite voxels; or too few crops have contrast.
        """
        image = open_image(self.cases, case, self.channels)
        crops: list[Tensor] = []
        for attempt in range(_MAX_CROPS):
            if attempt == _CROPS_BEFORE_FULL_READ and not crops:
                self._require_contrast(case, image)
            crop, extremes = self._draw_crop(case, image, rng)
            if not extremes.isfinite().all():  # a NaN or infinite voxel is always an extreme
                self._require_contrast(case, image)
                raise RejectedCaseError("has voxels that are not finite (NaN or infinite)", unusable=False)
            if (extremes[:, 0] < extremes[:, 1]).any():
                crops.append(crop)
            if len(crops) == count:
                return [resize(crop, self.patch_size) for crop in crops]
        raise RejectedCaseError(
            f"is constant or nearly constant: only {len(crops)} of {_MAX_CROPS} crops have more than one value",
            unusable=False,
        )

    def _draw_crop(self, case: str, image: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return a crop (C, d, h, w) and the minimum and maximum (C, 2) of its channels, padding excluded."""
        shape = image.shape[1:]
        box = draw_box(shape, self.patch_size, self.settings.crop_scale, rng)
        is_flipped = rng.random(3) < self.settings.flip_probability
        voxels = read_with_retries(lambda: crop_and_pad_nd(image, box, 0), self.cases, case)
        flipped = np.flip(voxels, tuple(1 + np.flatnonzero(is_flipped)))
        # np.flip returns a view: this copy flips and converts in a single pass over the voxels.
        crop = torch.from_numpy(np.array(flipped, np.float32, order="C"))
        channels = _remove_padding(crop, box, is_flipped, shape)
        return crop, torch.stack([torch.stack(channel.aminmax()) for channel in channels])

    def _require_contrast(self, case: str, image: np.ndarray) -> None:
        """Raise RejectedCaseError unless a channel of the whole image has two different finite values."""
        if case not in self._has_contrast:
            self._has_contrast[case] = read_with_retries(lambda: has_contrast(image), self.cases, case)
        if not self._has_contrast[case]:
            raise RejectedCaseError("has no image content: all voxels are equal, NaN or infinite", unusable=True)


def draw_box(
    shape: Sequence[int], patch_size: Sequence[int], crop_scale: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw the box of a crop in an image of this shape (D, H, W).

    Along each axis the box is as long as the patch times a scale that is uniform in ``crop_scale``, but at most as long
    as the image or the patch, whichever is longer. A box that fits into the image has a random position. A longer one
    is centred on the image and extends beyond it, as nnU-Net's padding does.
    """
    box = []
    scales = rng.uniform(*crop_scale, size=3)
    for length, patch, scale in zip(shape, patch_size, scales, strict=True):
        size = min(max(1, round(patch * scale)), max(length, patch))
        start = int(rng.integers(0, length - size, endpoint=True)) if size <= length else -((size - length) // 2)
        box.append([start, start + size])
    return box


def _remove_padding(crop: Tensor, box: Box, is_flipped: np.ndarray, shape: Sequence[int]) -> Tensor:
    """Return the part of a crop that lies inside the image of this shape."""
    z, y, x = (
        slice(max(0, end - length), end) if flipped else slice(max(0, -start), length - start)
        for (start, end), flipped, length in zip(box, is_flipped, shape, strict=True)
    )
    return crop[:, z, y, x]


def resize(crop: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Resize (C, d, h, w) to (C, *size) with trilinear interpolation.

    The interpolation is bilinear within slices, then linear across them. On one CPU core this takes half the time of
    ``F.interpolate(mode="trilinear")``.
    """
    if crop.shape[2:] != size[1:]:
        crop = F.interpolate(crop, size[1:], mode="bilinear", align_corners=False)
    if crop.shape[1] != size[0]:
        crop = torch.matmul(_linear_weights(crop.shape[1], size[0]), crop.flatten(2)).unflatten(2, size[1:])
    return crop


@functools.lru_cache(maxsize=1024)
def _linear_weights(old: int, new: int) -> Tensor:
    """Return the matrix (new, old) that interpolates linearly from ``old`` to ``new`` slices."""
    return F.interpolate(torch.eye(old)[None], new, mode="linear", align_corners=False)[0].T.contiguous()
