"""Intensity augmentation: the paper's contrast, gamma and inversion; unchanged mean and standard deviation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunetv2_vf.pretext.augmentation import draw_augmentation, fit_intensity_transform
from nnunetv2_vf.settings import VFSettings

SPACE = (-3, -2, -1)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def augment(x: torch.Tensor, percentiles: torch.Tensor, gamma: torch.Tensor, invert: torch.Tensor) -> torch.Tensor:
    return fit_intensity_transform(x, percentiles, gamma, invert)(x)


def draw_batch(num_samples: int, num_channels: int) -> dict[str, torch.Tensor]:
    """Return the stacked parameters of several samples."""
    rng = np.random.default_rng(0)
    samples = [draw_augmentation(num_channels, VFSettings(), rng) for _ in range(num_samples)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


# ---------------------------------------------------------------- contrast, gamma and inversion


def reference_augmentation(x: np.ndarray, lower: float, upper: float, gamma: float, invert: bool) -> np.ndarray:
    """Return the augmentation of the paper's section "Volume Fusion" for one channel, mapped to [0, 1]."""
    v0, v1 = np.percentile(x, (lower, upper))
    u = np.interp(x, [x.min(), v0, v1, x.max()], [0, 0.1, 0.9, 1]) ** gamma
    return 1 - u if invert else u


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("gamma", [0.7, 1.5])
def test_intensities_equal_the_papers_up_to_mean_and_standard_deviation(gamma, invert):
    x = noise(10, 11, 12)
    augmented = augment(x, torch.tensor([2.0, 98.0]), torch.tensor(gamma), torch.tensor(invert)).numpy()
    expected = reference_augmentation(x.numpy().astype(float), 2, 98, gamma, invert)
    expected = (expected - expected.mean()) / expected.std() * x.numpy().std() + x.numpy().mean()
    np.testing.assert_allclose(augmented, expected, atol=2e-3)


@pytest.mark.parametrize(("invert", "sign"), [(False, 1), (True, -1)])
def test_the_order_of_intensities_is_kept_or_reversed(invert, sign):
    x = torch.linspace(-1, 4, 6**3).reshape(1, 6, 6, 6)
    augmented = augment(x, torch.tensor([[1.0, 99.0]]), torch.tensor([1.3]), torch.tensor([invert]))
    assert (sign * augmented.flatten().diff() > 0).all()


def test_neutral_parameters_change_nothing():
    x = noise(2, 2, 1, 6, 7, 8)
    settings = VFSettings(contrast_probability=0, gamma=(1, 1), invert_probability=0)
    sample = draw_augmentation(1, settings, np.random.default_rng(0))
    augmented = augment(x, **{name: torch.stack([value, value]) for name, value in sample.items()})
    torch.testing.assert_close(augmented, x, rtol=1e-5, atol=1e-5)


TWO_CHANNELS = torch.tensor([[1.0, 99.0]] * 2), torch.tensor([0.7, 1.5]), torch.tensor([False, True])


def test_a_constant_channel_does_not_change():
    constant = torch.full((2, 6, 6, 6), -3.0)
    torch.testing.assert_close(augment(constant, *TWO_CHANNELS), constant)


def test_equal_percentiles_give_finite_intensities():
    outlier = torch.zeros(2, 6, 6, 6)
    outlier[:, 0, 0, 0] = 1e6  # both percentiles equal the minimum
    assert augment(outlier, *TWO_CHANNELS).isfinite().all()


def test_the_transform_of_an_image_can_be_applied_in_slabs():
    x = noise(2, 2, 3, 7, 8, 9)
    transform = fit_intensity_transform(x, **draw_batch(2, 3))
    slabs = [transform(slab) for slab in x.split([3, 1, 3], dim=3)]
    assert torch.equal(torch.cat(slabs, dim=3), transform(x))


# ---------------------------------------------------------------- mean and standard deviation


def test_every_channel_of_every_subvolume_keeps_its_mean_and_standard_deviation():
    x = noise(3, 2, 4, 8, 9, 10) * torch.arange(1, 5).view(4, 1, 1, 1)
    augmented = augment(x, **draw_batch(3, 4))
    torch.testing.assert_close(augmented.mean(SPACE), x.mean(SPACE), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(augmented.std(SPACE), x.std(SPACE), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(augmented, x)


def test_large_channels_which_are_measured_on_a_subset_keep_them_approximately():
    x = noise(1, 48, 64, 56).pow(2)  # a skewed distribution
    augmented = augment(x, torch.tensor([[1.0, 99.0]]), torch.tensor([1.4]), torch.tensor([True]))
    torch.testing.assert_close(augmented.mean(SPACE), x.mean(SPACE), rtol=0.02, atol=0)
    torch.testing.assert_close(augmented.std(SPACE), x.std(SPACE), rtol=0.02, atol=0)


def rows_in_air(air: float) -> torch.Tensor:
    x = torch.full((1, 64, 128, 128), air)
    x[..., 125:, :] = noise(1, 64, 3, 128)
    return x


def slices_in_air(air: float) -> torch.Tensor:
    x = torch.full((1, 64, 128, 128), air)
    x[:, 61:] = noise(1, 3, 128, 128)
    return x


def lesion_in_air(air: float) -> torch.Tensor:
    x = torch.full((1, 64, 128, 128), air)
    x[:, 33:36, 65:68, 65:68] = 2.0  # a regular subset with every fourth or fifth voxel has at most one of these
    return x


@pytest.mark.parametrize("air", [-1.0, -1.4, 0.0, 7.3])
@pytest.mark.parametrize("image", [rows_in_air, slices_in_air, lesion_in_air])
def test_small_structures_in_much_air_keep_them_although_the_subset_misses_them(image, air):
    x = image(air)
    augmented = augment(x, torch.tensor([[1.0, 99.0]]), torch.tensor([1.4]), torch.tensor([False]))
    torch.testing.assert_close(augmented.mean(SPACE), x.mean(SPACE), rtol=0.02, atol=1e-3)
    torch.testing.assert_close(augmented.std(SPACE), x.std(SPACE), rtol=0.02, atol=1e-3)


def test_an_airy_neighbour_in_the_batch_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    ordinary = torch.randn((1, 64, 64, 64), generator=generator).cumsum(1)
    parameters = torch.tensor([[1.0, 99.0]]), torch.tensor([1.4]), torch.tensor([True])
    airy = lesion_in_air(-1.0)[:, :, 32:96, 32:96]
    both = augment(torch.stack([ordinary, airy]), *(torch.stack([values, values]) for values in parameters))
    torch.testing.assert_close(both[0], augment(ordinary, *parameters))
    torch.testing.assert_close(both[1], augment(airy, *parameters))


# ---------------------------------------------------------------- drawing parameters


def test_parameters_have_the_published_ranges_and_probabilities():
    drawn = draw_batch(2000, 2)
    percentiles, gamma = drawn["percentiles"], drawn["gamma"]
    assert drawn["invert"].float().mean().item() == pytest.approx(0.25, abs=0.04)
    for values, low, high in ((percentiles[..., 0], 0.1, 2), (percentiles[..., 1], 98, 99.9), (gamma, 0.7, 1.5)):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-4
        assert values.mean().item() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_the_contrast_is_changed_with_the_given_probability():
    settings = VFSettings(contrast_probability=0.5)
    rng = np.random.default_rng(0)
    unchanged = torch.stack([draw_augmentation(1, settings, rng)["percentiles"].isnan() for _ in range(1000)])
    assert torch.equal(unchanged[..., 0], unchanged[..., 1])
    assert unchanged.float().mean().item() == pytest.approx(0.5, abs=0.04)
