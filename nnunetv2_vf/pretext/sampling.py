"""The Dataset: sample i -> two sub-volumes of a case, a fusion map and the augmentation's parameters.

Sample i of a stream is a pure function of (cases, settings, stream, i): any number of workers, on any rank, after
any resume, gives the same sequence. Nothing is drawn from a global random state.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.pretext.augmentation import draw_augmentation
from nnunetv2_vf.pretext.fusion import draw_fusion_map
from nnunetv2_vf.settings import VFSettings

# The two streams of samples; the validation stream ignores the seed setting, so that runs compare.
TRAINING, VALIDATION = 0, 1

_CROPS = 100  # drawn from a case before giving it up: enough where a fifth of a scan is not air
_DOUBTS = 20  # of them in vain before all of a volume is read, to see whether it holds anything
_CASES = 100  # tried for a sample before giving up
_PAUSES = (1.0, 10.0)  # seconds until a read is tried again that failed for the file system
_NO_IMAGE = "holds nothing: all of its voxels are alike, NaN or infinite"


class PreprocessedCases(Protocol):
    """What is used of nnU-Net's ``nnUNetBaseDataset``."""

    identifiers: list[str]

    def load_case(self, identifier: str) -> Sequence[Any]:
        """The image (C, D, H, W), opened but not read, then what pretraining has no use for."""
        ...


class Rejected(NamedTuple):
    """A case that gave no sub-volumes; ``unusable`` if it never will."""

    case: str
    reason: str
    unusable: bool


class FusionDataset(Dataset):
    """Pretext samples from the preprocessed cases of one nnU-Net dataset.

    A sample is a dict: the sub-volumes ``foreground`` and ``background`` (C, D, H, W) float32; ``fusion_map``
    (D, H, W) uint8; the parameters of :func:`nnunetv2_vf.pretext.augmentation.draw_augmentation`;
    ``cases``, the one or two cases it came from; ``rejected``, a list of :class:`Rejected` met on the way. If none of
    100 cases can be used, the sample is only ``rejected``.

    Args:
        cases: nnU-Net's dataset; read through its own ``load_case``.
        patch_size: (D, H, W) in voxels.
        stream: TRAINING or VALIDATION.
        channels: that every case should have; None: whatever it has.

    Raises:
        UserError: there are fewer cases than a sample needs.
    """

    def __init__(
        self,
        cases: PreprocessedCases,
        patch_size: Sequence[int],
        settings: VFSettings,
        stream: int,
        channels: int | None = None,
    ):
        needed = 2 if settings.pairing == "different" else 1
        if len(cases.identifiers) < needed:
            raise UserError(f"pairing {settings.pairing!r} needs at least {needed} cases, not {len(cases.identifiers)}")
        self.cases = cases
        depth, height, width = (int(n) for n in patch_size)
        self.patch_size = (depth, height, width)
        self.settings = settings
        self.stream = stream
        self.channels = channels
        # What this process has found out about cases; it spares work, and changes no sample.
        self._unusable: set[str] = set()
        self._images: dict[str, bool] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = self.settings.seed if self.stream == TRAINING else 0
        rng = np.random.default_rng((seed, self.stream, index))
        crops_per_case = 1 if self.settings.pairing == "different" else 2
        rejected: list[Rejected] = []
        subvolumes: list[Tensor] = []
        used: list[str] = []
        for attempt, case in enumerate(itertools.islice(self._cases_in_random_order(rng), _CASES)):
            if case in self._unusable:
                continue
            crops = self._draw_crops(case, crops_per_case, np.random.default_rng((seed, self.stream, index, attempt)))
            if isinstance(crops, Rejected):
                rejected.append(crops)
                self._unusable |= {case} if crops.unusable else set()
                continue
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

    def _draw_crops(self, case: str, count: int, rng: np.random.Generator) -> list[Tensor] | Rejected:
        """Crops (C, d, h, w) of a case, of random size and place, flipped at random."""
        try:
            volume = _patiently(lambda: self.cases.load_case(case)[0])  # (C, D, H, W), opened but not read
            wrong = self._wrong_shape(volume.shape)
            return Rejected(case, wrong, True) if wrong else self._draw_usable_crops(case, volume, count, rng)
        except UnreadableError as error:
            return Rejected(case, f"cannot be read ({error})", True)

    def _wrong_shape(self, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 4 or min(shape) == 0 or self.channels not in (None, shape[0]):
            return f"has the shape {shape}, where {self.channels or 'some'} channels of (D, H, W) voxels were expected"
        return None

    def _draw_usable_crops(
        self, case: str, volume: np.ndarray, count: int, rng: np.random.Generator
    ) -> list[Tensor] | Rejected:
        crops: list[Tensor] = []
        for tried in range(_CROPS):
            if tried == _DOUBTS and not crops and not self._holds_an_image(case, volume):
                return Rejected(case, _NO_IMAGE, True)
            box = self._draw_box(volume.shape[1:], rng)
            flip = rng.random(3) < self.settings.flip_probability
            # flipped while it is copied: that takes no pass over the voxels of its own
            read = _patiently(functools.partial(crop_and_pad_nd, volume, box, 0))
            flipped = np.flip(read, tuple(1 + np.flatnonzero(flip)))
            crop = torch.from_numpy(np.array(flipped, np.float32, order="C"))
            extremes = [channel.aminmax() for channel in _without_padding(crop, box, flip, volume.shape[1:])]
            if not torch.tensor(extremes).isfinite().all():  # NaN and infinity show in the extremes
                if self._holds_an_image(case, volume):
                    return Rejected(case, "holds voxels that are not finite (NaN or infinite)", False)
                return Rejected(case, _NO_IMAGE, True)
            if any(lowest < highest for lowest, highest in extremes):  # else it is air: draw another
                crops.append(crop)
            if len(crops) == count:
                return crops
        nearly = f"is constant or nearly so: of {_CROPS} crops, {len(crops)} hold more than one value"
        return Rejected(case, nearly, False)

    def _holds_an_image(self, case: str, volume: np.ndarray) -> bool:
        """Whether there is a channel with two different finite values; reads all of the volume, once."""
        if case not in self._images:
            channels = _patiently(lambda: [np.asarray(volume[channel]) for channel in range(volume.shape[0])])
            numbers = (channel[np.isfinite(channel)] for channel in channels)
            self._images[case] = any(n.size > 0 and n.min() < n.max() for n in numbers)
        return self._images[case]

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


class UnreadableError(Exception):
    """A file that is damaged, or not there."""


def _patiently(read: Callable[[], Any]) -> Any:
    """Read; again after a while where it is the file system that fails and not the file.

    Raises:
        UnreadableError: it did not work.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # there is no telling what a reader makes of a damaged file
            if pause is None or not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
                raise UnreadableError(f"{type(error).__name__}: {printable(str(error), 200)}") from error
            time.sleep(pause)
    raise AssertionError("not reached")


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
    rejected = [case for sample in samples for case in sample.pop("rejected")]
    if not all(samples):
        return {"rejected": rejected}
    cases = [sample.pop("cases") for sample in samples]
    return {"tensors": default_collate(samples), "cases": cases, "rejected": rejected}


def sample_indices(steps: Iterable[int], global_batch: int, offset: int, batch: int) -> Iterator[range]:
    """The sample indices of this rank's batches for the steps with these numbers.

    Step t takes samples [t * global_batch, (t + 1) * global_batch); this rank takes ``batch`` of them from
    ``offset`` on.
    """
    for step in steps:
        start = step * global_batch + offset
        yield range(start, start + batch)


def _tell_where_it_crashed(_: int) -> None:
    """A worker that a library takes down with it leaves Python's traceback on stderr."""
    faulthandler.enable()


def make_loader(dataset: FusionDataset, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over batches of sample indices, with real worker tracebacks and prefetching."""
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any sequence of indices will do
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=math.ceil(6 / workers) if workers else None,
        worker_init_fn=_tell_where_it_crashed,
        generator=torch.Generator(),  # the loader's own base seed must not come from the global random state
    )
