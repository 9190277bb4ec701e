"""Pretext samples: each is a pure function of settings and index; unusable cases are rejected and replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preprocessed_cases import noise, save_cases

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pretext.dataset import TRAINING, VALIDATION, PretextDataset, _case_generator
from nnunetv2_vf.settings import VFSettings

PATCH = (12, 14, 16)


def are_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return True if two samples have the same cases and the same tensors."""
    tensors = [name for name in a if name not in ("cases", "rejected")]
    return a["cases"] == b["cases"] and all(torch.equal(a[name], b[name]) for name in tensors)


# ---------------------------------------------------------------- a sample is a function of settings and index


def test_a_sample_depends_on_seed_and_index_only(cases):
    first = PretextDataset(cases, PATCH, VFSettings(seed=1), TRAINING)
    second = PretextDataset(cases, PATCH, VFSettings(seed=1), TRAINING)
    _ = [second[i] for i in (5, 0, 9)]  # samples drawn before must not matter
    assert are_equal(first[3], second[3])
    assert not are_equal(first[3], first[4])
    assert not are_equal(first[3], PretextDataset(cases, PATCH, VFSettings(seed=2), TRAINING)[3])


def test_crops_and_fusion_map_are_drawn_independently():
    """NumPy fills short seeds up with zeros: the generators of the sample and of its first case must differ."""
    key = (0, TRAINING, 3)
    of_sample, of_case = np.random.default_rng(key), _case_generator(key, attempt=0)
    assert not np.array_equal(of_sample.random(4), of_case.random(4))


def test_validation_samples_do_not_depend_on_the_seed(cases):
    one, two = (PretextDataset(cases, PATCH, VFSettings(seed=seed), VALIDATION) for seed in (0, 1))
    assert are_equal(one[0], two[0])


def test_validation_samples_differ_from_training_samples(cases):
    training, validation = (
        PretextDataset(cases, PATCH, VFSettings(seed=0), stream) for stream in (TRAINING, VALIDATION)
    )
    assert not are_equal(training[0], validation[0])


# ---------------------------------------------------------------- content of a sample


@pytest.mark.parametrize(("pairing", "num_cases"), [("same", 1), ("different", 2)])
def test_a_sample_has_two_subvolumes_from_one_or_two_cases(cases, pairing, num_cases):
    samples = PretextDataset(cases, PATCH, VFSettings(pairing=pairing), TRAINING)
    for index in range(8):
        sample = samples[index]
        for name in ("foreground", "background"):
            assert sample[name].shape == (2, *PATCH)
            assert sample[name].dtype == torch.float32
        assert sample["fusion_map"].shape == PATCH
        assert len(set(sample["cases"])) == num_cases
        assert not torch.equal(sample["foreground"], sample["background"])


def test_samples_come_from_all_cases(cases):
    samples = PretextDataset(cases, PATCH, VFSettings(), TRAINING)
    assert {name for i in range(40) for name in samples[i]["cases"]} == set(cases.identifiers)


def test_pairing_different_needs_two_cases(tmp_path):
    cases = save_cases(tmp_path, only=noise(1, 20, 20, 20))
    with pytest.raises(UserError, match="'different' needs at least 2 cases, not 1"):
        PretextDataset(cases, PATCH, VFSettings(pairing="different"), TRAINING)


# ---------------------------------------------------------------- rejected cases


def test_cases_with_nan_and_constant_cases_are_rejected_with_a_reason(tmp_path):
    partly_nan = noise(1, 20, 20, 20)
    partly_nan[:, ::3] = np.nan
    cases = save_cases(
        tmp_path, good=noise(1, 20, 20, 20), partly_nan=partly_nan, constant=np.full((1, 20, 20, 20), 7.0)
    )
    samples = PretextDataset(cases, PATCH, VFSettings(), TRAINING)
    drawn = [samples[i] for i in range(20)]
    assert all(sample["cases"] == ["good"] for sample in drawn)
    assert all(sample[name].isfinite().all() for sample in drawn for name in ("foreground", "background"))
    assert {case for sample in drawn for case in sample["rejected"]} == {
        ("partly_nan", "has voxels that are not finite (NaN or infinite)", False),
        ("constant", "has no image content: all voxels are equal, NaN or infinite", True),
    }


def test_a_case_that_is_almost_all_air_is_rejected_again_in_every_sample(tmp_path):
    air = np.zeros((1, 200, 40, 40))
    air[:, 0, 0, 0] = 1
    samples = PretextDataset(save_cases(tmp_path, air=air, good=noise(1, 20, 20, 20)), PATCH, VFSettings(), TRAINING)
    drawn = [samples[i] for i in range(6)]
    assert all(sample["cases"] == ["good"] for sample in drawn)
    rejected = [case for sample in drawn for case in sample["rejected"]]
    assert len(rejected) > 1
    assert {(case.case, case.unusable) for case in rejected} == {("air", False)}


def test_a_sample_without_a_usable_case_has_rejected_cases_only(tmp_path):
    cases = save_cases(tmp_path, constant=np.zeros((1, 20, 20, 20)))
    sample = PretextDataset(cases, PATCH, VFSettings(), TRAINING)[0]
    assert set(sample) == {"rejected"}
    assert [(case.case, case.unusable) for case in sample["rejected"]] == [("constant", True)]


@pytest.mark.parametrize("pairing", ["same", "different"])
def test_two_usable_cases_among_many_unusable_ones_are_always_found(tmp_path, pairing):
    unusable = {f"unusable_{i}": np.zeros((1, 20, 20, 20)) for i in range(12)}
    cases = save_cases(tmp_path, **unusable, one=noise(1, 20, 20, 20), two=noise(1, 20, 20, 20, seed=1))
    samples = PretextDataset(cases, PATCH, VFSettings(pairing=pairing), TRAINING)
    assert all("foreground" in samples[i] for i in range(30))


# ---------------------------------------------------------------- damaged files


def damage(folder: Path, case: str, kind: str) -> None:
    """Make a case unusable that nnU-Net has written."""
    file = folder / f"{case}.b2nd"
    if kind == "truncated":
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
    elif kind == "deleted":
        file.unlink()
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        for path in folder.glob(f"{case}*"):
            path.unlink()  # blosc2 does not overwrite files
        data = {"all NaN": np.full((1, 20, 20, 20), np.nan), "other channels": noise(3, 20, 20, 20)}[kind]
        save_cases(folder, **{case: data})


KINDS_OF_DAMAGE = ["truncated", "deleted", "empty", "all NaN", "other channels"]


@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_a_damaged_case_is_reported_once_and_replaced(tmp_path, kind):
    good = {f"good_{i}": noise(1, 20, 20, 20, seed=i) for i in range(3)}
    cases = save_cases(tmp_path, **good, bad=noise(1, 20, 20, 20))
    damage(tmp_path, "bad", kind)
    samples = PretextDataset(cases, PATCH, VFSettings(), TRAINING, channels=1)
    drawn = [samples[i] for i in range(20)]
    assert {case for sample in drawn for case in sample["cases"]} == set(good)
    (rejected,) = [case for sample in drawn for case in sample["rejected"]]
    assert (rejected.case, rejected.unusable) == ("bad", True)


@pytest.mark.parametrize("kind", KINDS_OF_DAMAGE)
def test_samples_do_not_depend_on_which_damaged_cases_are_known(tmp_path, kind):
    cases = save_cases(
        tmp_path, good=noise(1, 20, 20, 20), other=noise(1, 20, 20, 20, seed=1), bad=noise(1, 20, 20, 20)
    )
    damage(tmp_path, "bad", kind)
    samples = PretextDataset(cases, PATCH, VFSettings(), TRAINING, channels=1)
    for index in range(12):
        assert are_equal(samples[index], PretextDataset(cases, PATCH, VFSettings(), TRAINING, channels=1)[index])
