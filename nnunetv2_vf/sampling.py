"""The Dataset: sample i -> two sub-volumes of a case, a fusion map and the augmentation's parameters.

Sample i of a stream is a pure function of (cases, settings, stream, i): any number of workers, on any rank, after
any resume, gives the same sequence. Nothing is drawn from a global random state.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from nnunetv2_vf.augment import draw_augmentation
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.fusion import draw_fusion_map
from nnunetv2_vf.settings import VFSettings

# The two streams of samples; the validation stream ignores the seed setting, so that runs compare.
TRAINING, VALIDATION = 0, 1

_CROPS = 100  # drawn from a case before giving it up: enough where a fifth of a scan is not air
_CASES = 100  # tried for a sample before giving up


class FusionDataset(Dataset):
    """Pretext samples from the preprocessed cases of one nnU-Net dataset.

    A sample is a dict: the sub-volumes ``foreground`` and ``background`` (C, D, H, W) float32; ``fusion_map``
    (D, H, W) uint8; the parameters of :func:`nnunetv2_vf.augment.draw_augmentation`; ``cases``, the one or two
    cases it came from; ``rejected``, a list of (case, reason) met on the way. If none of
    100 cases can be used, the sample is only ``rejected``.

    Args:
        cases: nnU-Net's dataset; read through its own ``load_case``.
        patch_size: (D, H, W) in voxels.
        stream: TRAINING or VALIDATION.

    Raises:
        UserError: there are fewer cases than a sample needs.
    """

    def __init__(self, cases: nnUNetBaseDataset, patch_size: Sequence[int], settings: VFSettings, stream: int):
        needed = 2 if settings.pairing == "different" else 1
        if len(cases.identifiers) < needed:
            raise UserError(f"pairing {settings.pairing!r} needs at least {needed} cases, not {len(cases.identifiers)}")
        self.cases = cases
        depth, height, width = (int(n) for n in patch_size)
        self.patch_size = (depth, height, width)
        self.settings = settings
        self.stream = stream

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = self.settings.seed if self.stream == TRAINING else 0
        rng = np.random.default_rng((seed, self.stream, index))
        crops_per_case = 1 if self.settings.pairing == "different" else 2
        rejected: list[tuple[str, str]] = []
        subvolumes: list[Tensor] = []
        used: list[str] = []
        for case in itertools.islice(self._cases_in_random_order(rng), _CASES):
            crops = self._draw_crops(case, crops_per_case, rng, rejected)
            if crops:
                subvolumes += [resize(crop, self.patch_size) for crop in crops]
                used.append(case)
            if len(subvolumes) == 2:
                return {
                    "foreground": subvolumes[0],
                    "background": subvolumes[1],
                    "fusion_map": draw_fusion_map(self.patch_size, self.settings, rng),
                    **draw_augmentation(len(subvolumes[0]), self.settings, rng),
                    "cases": used,
                    "rejected": rejected,
                }
        return {"rejected": rejected}

    def _cases_in_random_order(self, rng: np.random.Generator) -> Iterator[str]:
        """Every case once; drawn one by one, since a permutation of 110,000 names takes longer than a crop."""
        drawn: set[int] = set()
        while len(drawn) < len(self.cases.identifiers):
            index = int(rng.integers(len(self.cases.identifiers)))
            if index not in drawn:
                drawn.add(index)
                yield self.cases.identifiers[index]

    def _draw_crops(
        self, case: str, count: int, rng: np.random.Generator, rejected: list[tuple[str, str]]
    ) -> list[Tensor]:
        """Crops (C, d, h, w) of a case, of random size and place, flipped at random; none if it cannot be used."""
        volume = self.cases.load_case(case)[0]  # (C, D, H, W), opened but not read
        crops: list[Tensor] = []
        for _ in range(_CROPS):
            box = self._draw_box(volume.shape[1:], rng)
            flip = rng.random(3) < self.settings.flip_probability
            # flipped while it is copied: that takes no pass over the voxels of its own
            flipped = np.flip(crop_and_pad_nd(volume, box, 0), tuple(1 + np.flatnonzero(flip)))
            crop = torch.from_numpy(np.array(flipped, np.float32, order="C"))
            extremes = [channel.aminmax() for channel in _without_padding(crop, box, flip, volume.shape[1:])]
            if not torch.tensor(extremes).isfinite().all():  # NaN and infinity show in the extremes
                rejected.append((case, "holds voxels that are not finite (NaN or infinite)"))
                return []
            if any(lowest < highest for lowest, highest in extremes):  # else it is air: draw another
                crops.append(crop)
            if len(crops) == count:
                return crops
        rejected.append((case, f"is constant or nearly so: of {_CROPS} crops, {len(crops)} hold more than one value"))
        return []

    def _draw_box(self, shape: Sequence[int], rng: np.random.Generator) -> list[list[int]]:
        """Draw where to crop: [start, end) per axis.

        An axis is the patch times a scale uniform in ``crop_scale`` long, but no longer than the volume; where the
        volume is shorter than that and than the patch, the crop is centred on it and padded with 0, as nnU-Net does.
        """
        box = []
        for length, patch, scale in zip(
            shape, self.patch_size, rng.uniform(*self.settings.crop_scale, size=3), strict=True
        ):
            size = min(max(1, round(patch * scale)), max(length, patch))
            start = int(rng.integers(0, length - size, endpoint=True)) if size <= length else -((size - length) // 2)
            box.append([start, start + size])
        return box


def _without_padding(crop: Tensor, box: list[list[int]], flip: np.ndarray, shape: Sequence[int]) -> Tensor:
    """The part of a crop, flipped along these axes, that lies in its volume of this shape."""
    z, y, x = (
        slice(max(0, end - length), end) if flipped else slice(max(0, -start), length - start)
        for (start, end), flipped, length in zip(box, flip, shape, strict=True)
    )
    return crop[:, z, y, x]


def resize(crop: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Resize (C, d, h, w) to (C, *size), trilinear: bilinear within the slices, then linear across them.

    On one CPU core that takes half the time of ``F.interpolate(mode="trilinear")``.
    """
    if crop.shape[2:] != size[1:]:
        crop = F.interpolate(crop, size[1:], mode="bilinear", align_corners=False)
    if crop.shape[1] != size[0]:
        crop = torch.matmul(_linear_weights(crop.shape[1], size[0]), crop.flatten(2)).unflatten(2, size[1:])
    return crop


@functools.lru_cache(maxsize=1024)
def _linear_weights(old: int, new: int) -> Tensor:
    """The matrix (new, old) of linear interpolation from one number of slices to another."""
    return F.interpolate(torch.eye(old)[None], new, mode="linear", align_corners=False)[0].T.contiguous()


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate to a batch; ``cases`` and ``rejected`` become lists over the samples.

    A batch with a sample that could not be made is only ``rejected``.
    """
    rejected = [pair for sample in samples for pair in sample.pop("rejected")]
    if not all(samples):
        return {"rejected": rejected}
    cases = [sample.pop("cases") for sample in samples]
    return {"tensors": default_collate(samples), "cases": cases, "rejected": rejected}


def sample_indices(first_step: int, last_step: int, global_batch: int, offset: int, batch: int) -> Iterator[range]:
    """The sample indices of this rank's batches for steps [first_step, last_step).

    Step t takes samples [t * global_batch, (t + 1) * global_batch); this rank takes ``batch`` of them from
    ``offset`` on.
    """
    for step in range(first_step, last_step):
        start = step * global_batch + offset
        yield range(start, start + batch)


def make_loader(dataset: FusionDataset, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over batches of sample indices, with real worker tracebacks and prefetching."""
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any sequence of indices will do
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=math.ceil(6 / workers) if workers else None,
        generator=torch.Generator(),  # the loader's own base seed must not come from the global random state
    )
