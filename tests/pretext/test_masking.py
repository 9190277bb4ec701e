"""The masked pretext: sizes and shares of hidden blocks, what reaches the input, what the loss compares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunetv2_vf.pretext.masking import (
    RestorationLoss,
    RestorationTarget,
    draw_mask,
    hide,
    restoration_sums,
    restored_share,
)
from nnunetv2_vf.settings import VFSettings


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def volumes(channels: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(3, channels, 16, 8, 24, generator=torch.Generator().manual_seed(seed))


def masks(**settings) -> Tensor:
    settings = VFSettings(pretext="masked", mask_side=4, **settings)
    return torch.stack([draw_mask((16, 8, 24), settings, rng(seed)) for seed in range(3)])


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize(("side", "fraction"), [(16, 0.75), (8, 0.3), (4, 0.6)])
def test_whole_cubes_are_hidden_and_their_share_is_the_fraction(side, fraction):
    mask = draw_mask((64, 32, 48), VFSettings(mask_side=side, mask_fraction=fraction), rng())
    assert mask.dtype == torch.bool
    cubes = mask.unfold(0, side, side).unfold(1, side, side).unfold(2, side, side).flatten(3)
    assert torch.equal(cubes.all(-1), cubes.any(-1))
    assert abs(mask.float().mean() - fraction) <= 1 / cubes[..., 0].numel()


def test_a_share_of_few_cubes_is_right_on_average():
    settings = VFSettings(mask_side=16, mask_fraction=0.3)  # of 8 cubes
    shares = [draw_mask((32, 32, 32), settings, rng(seed)).float().mean() for seed in range(2000)]
    assert abs(np.mean(shares) - 0.3) < 0.01


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_cube_is_hidden_and_a_cube_is_visible(fraction):
    settings = VFSettings(mask_side=8, mask_fraction=fraction)
    masks = [draw_mask((8, 8, 16), settings, rng(seed)) for seed in range(20)]
    assert all(mask.any() and not mask.all() for mask in masks)


@pytest.mark.parametrize("patch", [(5, 16, 20), (40, 7, 33)])
def test_a_patch_that_is_no_multiple_of_the_side_is_covered(patch):
    is_ever_hidden = sum(draw_mask(patch, VFSettings(mask_side=8), rng(seed)).int() for seed in range(50))
    assert is_ever_hidden.shape == patch
    assert (is_ever_hidden > 0).all()


def test_hidden_intensities_do_not_reach_the_input():
    mask, volume = masks(), volumes()
    changed = torch.where(mask[:, None], volume + 100, volume)
    assert torch.equal(hide(RestorationTarget(volume, mask)), hide(RestorationTarget(changed, mask)))
    visible = ~mask[:, None].expand_as(volume)
    assert torch.equal(hide(RestorationTarget(volume, mask))[visible], volume[visible])


# ---------------------------------------------------------------- the loss


def test_only_hidden_voxels_count_without_a_visible_weight():
    mask, volume, restored = masks(), volumes(), volumes(seed=1)
    loss = RestorationLoss(0.0)
    elsewhere = torch.where(mask[:, None], restored, restored + 100)
    assert torch.equal(
        loss([restored], RestorationTarget(volume, mask)), loss([elsewhere], RestorationTarget(volume, mask))
    )
    errors = (restored - volume).square().mean(1)
    expected = torch.stack([error[hidden].mean() for error, hidden in zip(errors, mask, strict=True)]).mean()
    torch.testing.assert_close(loss([restored], RestorationTarget(volume, mask)), expected)


def test_a_copy_of_the_input_has_no_error_on_visible_and_a_known_one_on_hidden_voxels():
    mask, volume = masks(), volumes()
    copied = hide(RestorationTarget(volume, mask))
    intensities = volume.square().mean(1)  # hidden intensities are 0 in the input
    expected = torch.stack([values[hidden].mean() for values, hidden in zip(intensities, mask, strict=True)]).mean()
    for weight in (0.0, 0.1, 1.0):
        torch.testing.assert_close(RestorationLoss(weight)([copied], RestorationTarget(volume, mask)), expected)


def test_visible_voxels_count_with_their_weight():
    mask, volume = masks(), volumes()
    restored = torch.where(mask[:, None], volume, volume + 2)
    torch.testing.assert_close(
        RestorationLoss(0.25)([restored], RestorationTarget(volume, mask)), torch.tensor(0.25 * 2**2)
    )


def test_smaller_outputs_are_compared_with_mean_intensities():
    mask, volume = masks(), volumes()
    small = torch.nn.functional.avg_pool3d(volume, (1, 2, 2))
    assert RestorationLoss(0.5)([small], RestorationTarget(volume, mask)) < 1e-12
    torch.testing.assert_close(RestorationLoss(0.0)([small + 3], RestorationTarget(volume, mask)), torch.tensor(9.0))


def test_each_output_counts_with_its_weight():
    target = RestorationTarget(volumes(), masks())
    sizes = [(16, 8, 24), (16, 4, 12), (8, 2, 6), (4, 1, 3)]
    outputs = [torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0)) for size in sizes]
    single = [RestorationLoss(0.1)([output], target) for output in outputs]
    together = RestorationLoss(0.1, (0.6, 0.3, 0.1, 0))(outputs, target)
    torch.testing.assert_close(together, 0.6 * single[0] + 0.3 * single[1] + 0.1 * single[2])
    assert len({float(loss) for loss in single}) == len(single)


def test_hidden_voxels_do_not_reach_the_visible_part_of_smaller_outputs():
    """Also where a voxel of the smaller output has hidden and visible voxels."""
    mask, volume, restored = masks(), volumes(), torch.zeros(3, 2, 2, 1, 3)  # the cubes have a side of 4 voxels
    changed = torch.where(mask[:, None], volume + 100, volume)

    def visible_part(volume: Tensor) -> Tensor:
        target = RestorationTarget(volume, mask)
        return RestorationLoss(1.0)([restored], target) - RestorationLoss(0.0)([restored], target)

    torch.testing.assert_close(visible_part(changed), visible_part(volume), rtol=0, atol=2e-3)  # of errors of 10,000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_in_half_precision_are_compared_in_single_precision(dtype):
    target, restored = RestorationTarget(volumes(), masks()), volumes(seed=1).to(dtype)
    loss, sums = RestorationLoss(0.1)([restored], target), restoration_sums(restored, target)
    assert loss.dtype == sums.dtype == torch.float32
    torch.testing.assert_close(loss, RestorationLoss(0.1)([restored.float()], target))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_batch_with_everything_visible_or_hidden_has_a_finite_loss(share):
    mask = torch.full((3, 16, 8, 24), bool(share))
    loss = RestorationLoss(0.1)([volumes(seed=1)], RestorationTarget(volumes(), mask))
    assert loss.isfinite()


# ---------------------------------------------------------------- the restored share


def test_the_restored_share_is_that_of_the_hidden_voxels():
    mask, volume = masks(), volumes()
    hidden = [volume[:, channel][mask] for channel in (0, 1)]
    restored = volume.clone()
    restored[:, 1] = hidden[1].mean()  # no better than the mean
    share = restored_share(restoration_sums(restored, RestorationTarget(volume, mask)).numpy())
    np.testing.assert_allclose(share, [1, 0], atol=1e-6)
    half = restored_share(restoration_sums(volume + hidden[0].std() / 2**0.5, RestorationTarget(volume, mask)).numpy())
    assert half[0] == pytest.approx(0.5, abs=0.01)


def test_sums_of_batches_add_up_and_constant_volumes_have_no_share():
    mask, volume, restored = masks(), volumes(), volumes(seed=1)
    parts = sum(
        restoration_sums(restored[i : i + 1], RestorationTarget(volume[i : i + 1], mask[i : i + 1])) for i in range(3)
    )
    torch.testing.assert_close(parts, restoration_sums(restored, RestorationTarget(volume, mask)))
    constant = torch.full_like(volume, 7.3)
    assert np.isnan(restored_share(restoration_sums(restored, RestorationTarget(constant, mask)).numpy())).all()
    assert restored_share(np.zeros((0, 4))).shape == (0,)
