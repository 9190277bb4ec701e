"""Batches of pretext samples: the sample indices of each rank, and the DataLoader."""

from __future__ import annotations

import faulthandler
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, default_collate

from nnunetv2_vf.pretext.dataset import PretextDataset

_PREFETCHED_BATCHES = 6  # that all workers together prepare in advance, if they are six or fewer; else one for each


class RankShare(NamedTuple):
    """A rank's share of the samples. All ranks together use the samples [t * batch, (t + 1) * batch) in step t.

    Attributes:
        batch: number of samples per step on all ranks together.
        first: position of this rank's first sample in the batch.
        size: number of samples per step on this rank.
    """

    batch: int
    first: int
    size: int

    def batches(self, steps: Iterable[int]) -> Iterator[range]:
        """Yield the indices of this rank's samples for each step."""
        for step in steps:
            start = step * self.batch + self.first
            yield range(start, start + self.size)


def describe_batches(dataset: PretextDataset, batches: Iterable[Sequence[int]]) -> dict[str, Any]:
    """Return indices and cases of the samples of batches, and the first batch itself, to look into a failure."""
    indices = [list(batch) for batch in batches]
    return {
        "sample_indices": indices,
        "cases": [[dataset[index].get("cases") for index in batch] for batch in indices],
        "first_batch": collate([dataset[index] for index in indices[0]]),
    }


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate samples of :class:`nnunetv2_vf.pretext.dataset.PretextDataset` to a batch.

    Returns:
        ``tensors``, the stacked tensors by name; ``cases``, the list of cases of each sample; ``rejected``, the
        rejected cases of all samples. If a sample could not be made, only ``rejected``.
    """
    rejected = [case for sample in samples for case in sample.pop("rejected")]
    if not all(samples):  # without ``rejected``, a sample that has no sub-volumes is empty
        return {"rejected": rejected}
    cases = [sample.pop("cases") for sample in samples]
    return {"tensors": default_collate(samples), "cases": cases, "rejected": rejected}


def make_loader(
    dataset: PretextDataset, batches: Iterable[Sequence[int]], workers: int, pin_memory: bool
) -> DataLoader:
    """Return a DataLoader over batches of sample indices.

    Args:
        workers: number of worker processes; 0: the samples are made in this process.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of sequences of indices works
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        prefetch_factor=math.ceil(_PREFETCHED_BATCHES / workers) if workers else None,
        worker_init_fn=_enable_crash_traceback,
        generator=torch.Generator(),  # otherwise the loader draws its base seed from the global random state
    )


def _enable_crash_traceback(_: int) -> None:
    """Let a worker that crashes in native code write Python's traceback to stderr."""
    faulthandler.enable()
