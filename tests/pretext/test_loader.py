"""Batches: the same for any number of workers and after a resume, and shared among ranks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from preprocessed_cases import save_cases

from nnunetv2_vf.pretext.dataset import TRAINING, PretextDataset
from nnunetv2_vf.pretext.loader import RankShare, collate, make_loader
from nnunetv2_vf.settings import VFSettings

PATCH = (12, 14, 16)


@pytest.fixture
def samples(cases) -> PretextDataset:
    return PretextDataset(cases, PATCH, VFSettings(), TRAINING)


def load_batches(samples: PretextDataset, steps: range, workers: int) -> list[dict[str, Any]]:
    indices = RankShare(batch=2, first=0, size=2).batches(steps)
    return list(make_loader(samples, indices, workers, pin_memory=False))


def test_batches_do_not_depend_on_workers_or_on_a_resume(samples):
    batches = load_batches(samples, range(6), workers=0)
    with_two_workers = load_batches(samples, range(6), workers=2)
    resumed = batches[:4] + load_batches(samples, range(4, 6), workers=1)
    for others in (with_two_workers, resumed):
        assert len(others) == 6
        for batch, other in zip(batches, others, strict=True):
            assert batch["cases"] == other["cases"]
            assert all(torch.equal(batch["tensors"][name], other["tensors"][name]) for name in batch["tensors"])


def test_ranks_share_every_global_batch():
    global_batches = [list(batch) for batch in RankShare(5, 0, 5).batches(range(3, 6))]
    shares = [list(RankShare(5, first, size).batches(range(3, 6))) for first, size in ((0, 2), (2, 2), (4, 1))]
    assert global_batches == [[i for share in step for i in share] for step in zip(*shares, strict=True)]
    assert global_batches[0] == [15, 16, 17, 18, 19]


def test_loading_does_not_touch_the_global_random_states(samples):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    load_batches(samples, range(2), workers=0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_a_batch_with_an_incomplete_sample_has_rejected_cases_only(tmp_path, samples):
    cases = save_cases(tmp_path, constant=np.zeros((1, 20, 20, 20)))
    incomplete = PretextDataset(cases, PATCH, VFSettings(), TRAINING)[0]
    batch = collate([samples[0], incomplete])
    assert set(batch) == {"rejected"}
    assert [(case.case, case.unusable) for case in batch["rejected"]] == [("constant", True)]
