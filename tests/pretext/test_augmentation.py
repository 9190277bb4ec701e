from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2_vf.pretext.augmentation import adjust_intensity, draw_augmentation, intensity_map
from nnunetv2_vf.settings import VFSettings

SPACE = (-3, -2, -1)


def volume(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def full(value: float | bool, *shape: int) -> torch.Tensor:
    return torch.full(shape, value)


def restated(x: np.ndarray, lower: float, upper: float, gamma: float, invert: bool) -> np.ndarray:
    """Section "Volume Fusion" of the paper in NumPy on one channel: contrast, gamma on [0, 1], inversion."""
    v0, v1 = np.percentile(x, (lower, upper))
    u = np.interp(x, [x.min(), v0, v1, x.max()], [0, 0.1, 0.9, 1]) ** gamma
    return 1 - u if invert else u


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_intensities_follow_the_paper_up_to_mean_and_standard_deviation(gamma, invert):
    x = volume(10, 11, 12)
    ours = adjust_intensity(x, torch.tensor([2.0, 98.0]), torch.tensor(gamma), torch.tensor(invert)).numpy()
    theirs = restated(x.numpy().astype(float), 2, 98, gamma, invert)
    theirs = (theirs - theirs.mean()) / theirs.std() * x.numpy().std() + x.numpy().mean()
    np.testing.assert_allclose(ours, theirs, atol=2e-3)


def test_every_channel_of_every_subvolume_keeps_its_mean_and_standard_deviation():
    x = volume(3, 2, 4, 8, 9, 10) * torch.arange(1, 5).view(4, 1, 1, 1)
    settings, rng = VFSettings(), np.random.default_rng(0)
    drawn = [draw_augmentation(4, settings, rng) for _ in range(3)]
    y = adjust_intensity(x, **{name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]})
    torch.testing.assert_close(y.mean(SPACE), x.mean(SPACE), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y.std(SPACE), x.std(SPACE), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y, x)


def test_large_channels_keep_them_nearly():
    """They are measured on a regular subset."""
    x = volume(1, 48, 64, 56).pow(2)  # skewed
    y = adjust_intensity(x, torch.tensor([[1.0, 99.0]]), torch.tensor([1.4]), torch.tensor([True]))
    torch.testing.assert_close(y.mean(SPACE), x.mean(SPACE), rtol=0.02, atol=0)
    torch.testing.assert_close(y.std(SPACE), x.std(SPACE), rtol=0.02, atol=0)


def rows_in_air(air: float) -> torch.Tensor:
    x = full(air, 1, 64, 128, 128)
    x[..., 125:, :] = volume(1, 64, 3, 128)
    return x


def slices_in_air(air: float) -> torch.Tensor:
    x = full(air, 1, 64, 128, 128)
    x[:, 61:] = volume(1, 3, 128, 128)
    return x


def lesion_in_air(air: float) -> torch.Tensor:
    x = full(air, 1, 64, 128, 128)
    x[:, 33:36, 65:68, 65:68] = 2.0  # none of its voxels on a grid of every fourth or fifth but one
    return x


@pytest.mark.parametrize("air", [-1.0, -1.4, 0.0, 7.3])
@pytest.mark.parametrize("scene", [rows_in_air, slices_in_air, lesion_in_air])
def test_little_in_much_air_keeps_them_too(scene, air):
    """A regular subset may hold next to nothing of it: what it tells of mean and deviation is noise."""
    x = scene(air)
    y = adjust_intensity(x, torch.tensor([[1.0, 99.0]]), torch.tensor([1.4]), torch.tensor([False]))
    torch.testing.assert_close(y.mean(SPACE), x.mean(SPACE), rtol=0.02, atol=1e-3)
    torch.testing.assert_close(y.std(SPACE), x.std(SPACE), rtol=0.02, atol=1e-3)


def test_slices_are_those_of_the_whole():
    x = volume(2, 2, 3, 7, 8, 9)
    drawn = [draw_augmentation(3, VFSettings(), np.random.default_rng(seed)) for seed in range(2)]
    adjust = intensity_map(x, **{name: torch.stack([sample[name] for sample in drawn]) for name in drawn[0]})
    assert torch.equal(torch.cat([adjust(piece) for piece in x.split([3, 1, 3], dim=3)], dim=3), adjust(x))


def test_nothing_drawn_is_nothing_done():
    x = volume(2, 2, 1, 6, 7, 8)
    settings = VFSettings(contrast_probability=0, gamma=(1, 1), invert_probability=0)
    drawn = draw_augmentation(1, settings, np.random.default_rng(0))
    y = adjust_intensity(x, **{name: torch.stack([value, value]) for name, value in drawn.items()})
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


def test_a_constant_channel_stays_and_outliers_make_no_nan():
    constant = full(-3.0, 2, 6, 6, 6)
    args = torch.tensor([[1.0, 99.0]] * 2), torch.tensor([0.7, 1.5]), torch.tensor([False, True])
    torch.testing.assert_close(adjust_intensity(constant, *args), constant)
    spike = torch.zeros(2, 6, 6, 6)
    spike[:, 0, 0, 0] = 1e6  # both percentiles coincide with the minimum
    assert adjust_intensity(spike, *args).isfinite().all()


def test_the_order_of_intensities_survives_or_is_reversed():
    x = torch.linspace(-1, 4, 6**3).reshape(1, 6, 6, 6)
    args = torch.tensor([[1.0, 99.0]]), torch.tensor([1.3])
    upright = adjust_intensity(x, *args, torch.tensor([False])).flatten().diff()
    inverted = adjust_intensity(x, *args, torch.tensor([True])).flatten().diff()
    assert (upright > 0).all()
    assert (inverted < 0).all()


def test_parameters_have_the_published_ranges_and_probabilities():
    rng = np.random.default_rng(0)
    drawn = [draw_augmentation(2, VFSettings(), rng) for _ in range(2000)]
    percentiles = torch.stack([d["percentiles"] for d in drawn])
    gamma = torch.stack([d["gamma"] for d in drawn])
    inverted = torch.stack([d["invert"] for d in drawn]).float()
    assert inverted.mean().item() == pytest.approx(0.25, abs=0.04)
    for values, low, high in ((percentiles[..., 0], 0.1, 2), (percentiles[..., 1], 98, 99.9), (gamma, 0.7, 1.5)):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-4
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_the_contrast_can_be_left_alone():
    settings = VFSettings(contrast_probability=0.5)
    rng = np.random.default_rng(0)
    skipped = torch.stack([draw_augmentation(1, settings, rng)["percentiles"].isnan() for _ in range(1000)])
    assert torch.equal(skipped[..., 0], skipped[..., 1])
    assert skipped.float().mean().item() == pytest.approx(0.5, abs=0.04)
