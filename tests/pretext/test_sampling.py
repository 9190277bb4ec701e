from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pretext.sampling import (
    TRAINING,
    VALIDATION,
    FusionDataset,
    collate,
    make_loader,
    resize,
    sample_indices,
)
from nnunetv2_vf.settings import VFSettings

PATCH = (12, 14, 16)


def save_cases(folder: Path, **volumes: np.ndarray) -> nnUNetDatasetBlosc2:
    """Save (C, D, H, W) volumes with nnU-Net's own writer and open them with its own dataset."""
    for name, data in volumes.items():
        labels = np.zeros((1, *data.shape[1:]), np.int8)
        nnUNetDatasetBlosc2.save_case(
            data.astype(np.float32), labels, {}, str(folder / name), chunks=(1, 16, 16, 16), blocks=(1, 8, 8, 8)
        )
    return nnUNetDatasetBlosc2(str(folder))


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def cases(tmp_path: Path) -> nnUNetDatasetBlosc2:
    return save_cases(tmp_path, **{f"case_{i}": noise(2, 30, 31 + i, 32, seed=i) for i in range(4)})


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    same = a["cases"] == b["cases"] and a["rejected"] == b["rejected"]
    return same and all(torch.equal(a[name], b[name]) for name in a if name not in ("cases", "rejected"))


# ---------------------------------------------------------------- sample i is a pure function of (seed, i)


def test_a_sample_depends_on_seed_and_index_only(cases):
    first = FusionDataset(cases, PATCH, VFSettings(seed=1), TRAINING)
    again = FusionDataset(cases, PATCH, VFSettings(seed=1), TRAINING)
    _ = [again[i] for i in (5, 0, 9)]  # what was read before does not matter
    assert equal(first[3], again[3])
    assert not equal(first[3], first[4])
    assert not equal(first[3], FusionDataset(cases, PATCH, VFSettings(seed=2), TRAINING)[3])


def test_validation_samples_do_not_depend_on_the_seed_and_are_no_training_samples(cases):
    one, two = (FusionDataset(cases, PATCH, VFSettings(seed=seed), VALIDATION) for seed in (0, 1))
    assert equal(one[0], two[0])
    assert not equal(one[0], FusionDataset(cases, PATCH, VFSettings(seed=0), TRAINING)[0])


def test_batches_are_the_same_whatever_the_workers_and_after_a_resume(cases):
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING)

    def batches(workers: int, first: int) -> list[dict[str, Any]]:
        return list(make_loader(samples, sample_indices(range(first, 6), 2, 0, 2), workers, pin_memory=False))

    whole = batches(workers=0, first=0)
    for other in (batches(workers=2, first=0), whole[:4] + batches(workers=1, first=4)):
        assert len(other) == 6
        for a, b in zip(whole, other, strict=True):
            assert all(torch.equal(a["tensors"][name], b["tensors"][name]) for name in a["tensors"])


def test_ranks_share_every_global_batch(cases):
    whole = [list(batch) for batch in sample_indices(range(3, 6), 5, 0, 5)]
    parts = [list(sample_indices(range(3, 6), 5, offset, size)) for offset, size in ((0, 2), (2, 2), (4, 1))]
    assert whole == [[i for rank in step for i in rank] for step in zip(*parts, strict=True)]
    assert whole[0][0] == 15


def test_the_global_random_states_are_not_touched(cases):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING)
    list(make_loader(samples, sample_indices(range(2), 2, 0, 2), 0, pin_memory=False))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


# ---------------------------------------------------------------- what a sample is


@pytest.mark.parametrize("pairing", ["same", "different"])
def test_a_sample_has_two_subvolumes_of_one_or_two_cases(cases, pairing):
    samples = FusionDataset(cases, PATCH, VFSettings(pairing=pairing), TRAINING)
    for index in range(8):
        sample = samples[index]
        for name in ("foreground", "background"):
            assert sample[name].shape == (2, *PATCH)
            assert sample[name].dtype == torch.float32
        assert sample["fusion_map"].shape == PATCH
        assert len(sample["cases"]) == (2 if pairing == "different" else 1)
        assert not torch.equal(sample["foreground"], sample["background"])


def test_all_cases_are_drawn(cases):
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING)
    assert {name for i in range(40) for name in samples[i]["cases"]} == set(cases.identifiers)


def test_crops_are_cut_from_the_volume_and_resized(cases):
    """Without rescaling, a sub-volume is found, voxel by voxel, in its case."""
    samples = FusionDataset(cases, PATCH, VFSettings(crop_scale=(1, 1), flip_probability=0), TRAINING)
    sample = samples[0]
    volume = torch.from_numpy(cases.load_case(sample["cases"][0])[0][:])
    for crop in (sample["foreground"], sample["background"]):
        corners = (volume[0] == crop[0, 0, 0, 0]).nonzero()
        assert len(corners) == 1
        z, y, x = corners[0]
        assert torch.equal(crop, volume[:, z : z + PATCH[0], y : y + PATCH[1], x : x + PATCH[2]])


def test_flips_mirror_each_axis_of_each_crop_with_their_probability(tmp_path):
    """A ramp along each axis, one channel each, tells which way a crop lies."""
    ramps = np.stack(np.meshgrid(*(np.arange(30.0),) * 3, indexing="ij"))
    samples = FusionDataset(save_cases(tmp_path, ramps=ramps), PATCH, VFSettings(flip_probability=0.3), TRAINING)
    drawn = [samples[i][name] for i in range(300) for name in ("foreground", "background")]
    flipped = np.array([[crop[c].diff(dim=c).mean() < 0 for c in range(3)] for crop in drawn])
    np.testing.assert_allclose(flipped.mean(0), 0.3, atol=0.06)
    assert abs(np.corrcoef(flipped.T) - np.eye(3)).max() < 0.15  # independent of one another
    assert abs(np.corrcoef(flipped[::2, 0], flipped[1::2, 0])[0, 1]) < 0.15


@pytest.mark.parametrize("size", [(9, 14, 11), (6, 20, 7), (13, 9, 16), (1, 30, 8), (12, 14, 14), (12, 9, 17)])
def test_resizing_is_trilinear(size):
    crop = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(crop[None], PATCH, mode="trilinear", align_corners=False)[0]
    torch.testing.assert_close(resize(crop, PATCH), expected, rtol=1e-5, atol=1e-5)


def test_crop_sizes_span_the_scales(cases):
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING)
    rng = np.random.default_rng(0)
    boxes = np.array([samples._draw_box((100, 100, 100), rng) for _ in range(400)])
    sizes = (boxes[:, :, 1] - boxes[:, :, 0]) / PATCH
    assert sizes.min() == pytest.approx(0.7, abs=0.05)
    assert sizes.max() == pytest.approx(1.5, abs=0.05)
    assert sizes.mean() == pytest.approx(1.1, abs=0.03)
    assert boxes.min() >= 0
    assert boxes.max() <= 100


def test_small_volumes_are_centred_and_padded_with_zero_as_nnunet_does(tmp_path):
    cases = save_cases(tmp_path, small=1 + np.abs(noise(1, 6, 20, 16)))
    samples = FusionDataset(cases, PATCH, VFSettings(crop_scale=(1, 1)), TRAINING)
    subvolume = samples[0]["foreground"][0]
    assert (subvolume[:3] == 0).all()
    assert (subvolume[9:] == 0).all()
    assert (subvolume[3:9] > 0).all()


def test_crops_never_grow_beyond_the_volume_when_it_holds_a_patch(cases):
    samples = FusionDataset(cases, PATCH, VFSettings(crop_scale=(1.5, 1.5)), TRAINING)
    box = samples._draw_box((13, 100, 5), np.random.default_rng(0))
    assert box[0] == [0, 13]  # 18 wanted; 12 is the patch
    assert box[1][1] - box[1][0] == 21
    assert box[2][1] - box[2][0] == 16  # shorter than the patch: padded up to it, no further


def test_only_the_blocks_of_the_crop_are_read(cases):
    class Recorder:
        def __init__(self, volume: Any):
            self.volume, self.shape, self.voxels = volume, volume.shape, 0

        def __getitem__(self, where: Any) -> np.ndarray:
            read = self.volume[where]
            self.voxels += read.size
            return read

    class RecordingDataset(nnUNetDatasetBlosc2):
        def load_case(self, identifier: str) -> Any:
            data, *rest = super().load_case(identifier)
            opened.append(Recorder(data))
            return opened[-1], *rest

    opened: list[Recorder] = []
    samples = FusionDataset(RecordingDataset(cases.source_folder), PATCH, VFSettings(crop_scale=(1, 1)), TRAINING)
    _ = samples[0]
    (volume,) = opened  # both crops come from one case, opened once
    assert volume.voxels == 2 * 2 * np.prod(PATCH)


def test_resizing_keeps_a_linear_ramp_linear():
    ramp = torch.arange(20.0).view(1, 20, 1, 1).expand(1, 20, 4, 4)
    small = resize(ramp, (10, 4, 4))[0, :, 0, 0]
    torch.testing.assert_close(small.diff(), torch.full((9,), 2.0))
    assert resize(ramp, (20, 4, 4)) is ramp


# ---------------------------------------------------------------- bad volumes


def test_volumes_with_nan_and_constant_volumes_are_skipped_and_reported(tmp_path):
    holed = noise(1, 20, 20, 20)
    holed[:, ::3] = np.nan
    cases = save_cases(tmp_path, good=noise(1, 20, 20, 20), holed=holed, flat=np.full((1, 20, 20, 20), 7.0))
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING)
    drawn = [samples[i] for i in range(20)]
    assert all(sample["cases"] == ["good"] for sample in drawn)
    assert all(sample[name].isfinite().all() for sample in drawn for name in ("foreground", "background"))
    rejected = {case for sample in drawn for case in sample["rejected"]}
    assert rejected == {
        ("holed", "holds voxels that are not finite (NaN or infinite)", False),
        ("flat", "holds nothing: all of its voxels are alike, NaN or infinite", True),
    }


def test_air_is_drawn_again_without_a_word(tmp_path):
    mostly_air = np.full((1, 60, 20, 20), -1.0)
    mostly_air[:, :10] = noise(1, 10, 20, 20)
    samples = FusionDataset(save_cases(tmp_path, scan=mostly_air), PATCH, VFSettings(), TRAINING)
    drawn = [samples[i] for i in range(10)]
    assert all(sample[name].std() > 0 for sample in drawn for name in ("foreground", "background"))
    assert not any(sample["rejected"] for sample in drawn)


def test_a_volume_of_almost_nothing_but_air_is_skipped_and_reported(tmp_path):
    air = np.zeros((1, 200, 40, 40))
    air[:, 0, 0, 0] = 1
    cases = save_cases(tmp_path, air=air, good=noise(1, 20, 20, 20))
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING)
    drawn = [samples[i] for i in range(6)]
    assert all(sample["cases"] == ["good"] for sample in drawn)
    reasons = [case.reason for sample in drawn for case in sample["rejected"]]
    assert reasons
    assert all(reason.startswith("is constant or nearly so") for reason in reasons)


def test_a_small_constant_volume_is_no_image_because_of_its_padding(tmp_path):
    cases = save_cases(tmp_path, flat=np.full((1, 6, 7, 5), 5.0))
    for flip_probability in (0, 1):
        settings = VFSettings(flip_probability=flip_probability)
        assert "foreground" not in FusionDataset(cases, PATCH, settings, TRAINING)[0]


def test_a_batch_without_a_usable_volume_says_so(tmp_path):
    cases = save_cases(tmp_path, flat=np.zeros((1, 20, 20, 20)))
    batch = collate([FusionDataset(cases, PATCH, VFSettings(), TRAINING)[0]])
    assert set(batch) == {"rejected"}
    (rejected,) = set(batch["rejected"])
    assert rejected.case == "flat"
    assert rejected.unusable


def damage(folder: Path, case: str, how: str) -> None:
    """Make a case that nnU-Net wrote unusable."""
    file = folder / f"{case}.b2nd"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "deleted":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    else:
        for path in folder.glob(f"{case}*"):
            path.unlink()  # blosc2 replaces no file
        data = {"of NaN": np.full((1, 20, 20, 20), np.nan), "of other channels": noise(3, 20, 20, 20)}[how]
        save_cases(folder, **{case: data})


DAMAGES = ["truncated", "deleted", "empty", "of NaN", "of other channels"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_case_is_named_and_replaced_by_another_draw(tmp_path, how):
    cases = save_cases(
        tmp_path, **{f"good_{i}": noise(1, 20, 20, 20, seed=i) for i in range(3)}, bad=noise(1, 20, 20, 20)
    )
    damage(tmp_path, "bad", how)
    samples = FusionDataset(cases, PATCH, VFSettings(), TRAINING, channels=1)
    drawn = [samples[i] for i in range(20)]
    assert {case for sample in drawn for case in sample["cases"]} == {"good_0", "good_1", "good_2"}
    ((case, _, unusable),) = [rejected for sample in drawn for rejected in sample["rejected"]]  # once, then avoided
    assert (case, unusable) == ("bad", True)


@pytest.mark.parametrize("how", DAMAGES)
def test_samples_do_not_depend_on_what_is_known_of_damaged_cases(tmp_path, how):
    cases = save_cases(
        tmp_path, good=noise(1, 20, 20, 20), other=noise(1, 20, 20, 20, seed=1), bad=noise(1, 20, 20, 20)
    )
    damage(tmp_path, "bad", how)
    knowing = FusionDataset(cases, PATCH, VFSettings(), TRAINING, channels=1)
    for index in range(12):
        sample = knowing[index]
        fresh = FusionDataset(cases, PATCH, VFSettings(), TRAINING, channels=1)[index]
        assert equal({**sample, "rejected": []}, {**fresh, "rejected": []})


@pytest.mark.parametrize("pairing", ["same", "different"])
def test_one_usable_pair_among_many_bad_cases_is_always_found(tmp_path, pairing):
    bad = {f"bad_{i}": np.zeros((1, 20, 20, 20)) for i in range(12)}
    cases = save_cases(tmp_path, **bad, one=noise(1, 20, 20, 20), two=noise(1, 20, 20, 20, seed=1))
    samples = FusionDataset(cases, PATCH, VFSettings(pairing=pairing), TRAINING)
    assert all("foreground" in samples[i] for i in range(30))


def test_pairing_different_needs_two_cases(tmp_path):
    cases = save_cases(tmp_path, only=noise(1, 20, 20, 20))
    with pytest.raises(UserError, match="'different' needs at least 2 cases, not 1"):
        FusionDataset(cases, PATCH, VFSettings(pairing="different"), TRAINING)
