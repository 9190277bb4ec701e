from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from nnunetv2_vf.transfer.tensor_rules import fit_channels, fit_kernel, fit_position_bias
from nnunetv2_vf.window_attention import WindowAttention

# ---------------------------------------------------------------- input channels


@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 3), (2, 4), (4, 1), (3, 2), (1, 1), (5, 7)])
def test_a_convolution_with_other_channels_gives_the_same_output_for_equal_channels(old, new):
    weight = torch.randn(6, old, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 1, 7, 8, 9, dtype=torch.float64)
    before = F.conv3d(image.expand(1, old, -1, -1, -1), weight)
    after = F.conv3d(image.expand(1, new, -1, -1, -1), fit_channels(weight, new))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(("old", "new"), [(1, 4), (2, 3), (2, 6), (3, 4)])
def test_adding_channels_and_removing_them_restores_the_weight(old, new):
    weight = torch.randn(6, old, 3, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(fit_channels(fit_channels(weight, new), old), weight)


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 3, 5), (5, 5, 5)])
def test_a_longer_kernel_computes_the_same_convolution(kernel):
    weight = torch.randn(4, 2, 1, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 2, 7, 8, 9, dtype=torch.float64)
    longer = fit_kernel(weight, kernel)
    assert longer.shape[2:] == kernel
    torch.testing.assert_close(F.conv3d(image, longer, padding="same"), F.conv3d(image, weight, padding="same"))
    assert torch.equal(fit_kernel(longer, (1, 3, 3)), weight)


@pytest.mark.parametrize(("kernel", "axes"), [((1, 3, 3), (2,)), ((3, 1, 3), (3,)), ((1, 1, 1), (2, 3, 4))])
def test_a_shorter_kernel_computes_the_same_for_an_image_that_is_constant_along_the_axis(kernel, axes):
    weight = torch.randn(4, 2, 3, 3, 3, dtype=torch.float64)
    image = torch.randn(1, 2, 9, 9, 9, dtype=torch.float64)
    for axis in axes:
        image = image.mean(axis, keepdim=True).expand_as(image)
    without_border = (..., slice(2, -2), slice(2, -2), slice(2, -2))
    before = F.conv3d(image, weight, padding="same")[without_border]
    after = F.conv3d(image, fit_kernel(weight, kernel), padding="same")[without_border]
    torch.testing.assert_close(after, before)


def test_entries_that_are_cut_off_are_added_to_the_outermost_remaining_ones():
    weight = torch.tensor([1.0, 2, 3, 4, 5]).view(1, 1, 5, 1, 1)
    assert fit_kernel(weight, (3, 1, 1)).flatten().tolist() == [3, 3, 9]


# ---------------------------------------------------------------- position bias of window attention


def test_attention_with_another_window_computes_the_same_on_maps_that_fit_both_windows():
    small, large = (WindowAttention(8, 2, window, shifted=False) for window in (3, 5))
    large.load_state_dict({**small.state_dict(), "position_bias": fit_position_bias(small.position_bias, 9**3)})
    tokens = torch.randn(1, 3, 2, 3, 8)
    torch.testing.assert_close(large(tokens), small(tokens))


def test_offsets_outside_the_old_window_get_the_bias_of_the_nearest_offset():
    bias = torch.arange(27.0).view(27, 1)  # window 2: offsets -1, 0, 1
    larger = fit_position_bias(bias, 5**3).view(5, 5, 5)
    assert larger[1:4, 1:4, 1:4].flatten().tolist() == list(range(27))
    assert larger[0, 0, 0] == 0
    assert larger[4, 2, 2] == bias[22]
    assert larger[2, 4, 0] == bias[9 + 6]
