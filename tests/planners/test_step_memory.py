from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.pct_net import PCTNet
from nnunetv2_vf.planners.step_memory import measure_step

ARGUMENTS = (1, (4, 8, 16, 32, 64), MODES[0], 3)
build = functools.partial(PCTNet, *ARGUMENTS, deep_supervision=True)
PATCH = (32, 48, 32)
networks = pytest.mark.parametrize("network", [PCTNet, FMUNet])


def test_parameters_are_weights_gradients_and_two_states_of_adam():
    weights = sum(p.numel() * 4 for p in build().parameters())
    assert measure_step(build, 1, PATCH, 2).parameters == 4 * weights


@networks
def test_memory_grows_with_batch_and_patch(network):
    build = functools.partial(network, *ARGUMENTS, deep_supervision=True)
    one, two, three = (measure_step(build, 1, PATCH, batch).activations for batch in (1, 2, 3))
    assert one < two < three
    assert three - two == pytest.approx(two - one, rel=0.02)
    assert measure_step(build, 1, (32, 64, 48), 2).total > measure_step(build, 1, PATCH, 2).total


@networks
def test_recomputing_activations_saves_memory(network):
    build = functools.partial(network, *ARGUMENTS, deep_supervision=True)
    lean = functools.partial(build, activation_checkpointing=True)
    assert measure_step(lean, 1, PATCH, 2).activations < 0.5 * measure_step(build, 1, PATCH, 2).activations


def test_a_convolution_keeps_its_input_and_its_weight_in_half_precision():
    def convolutions(count: int) -> nn.Module:
        hidden = [nn.Conv3d(8, 8, 3, padding=1, bias=False) for _ in range(count)]
        return nn.Sequential(nn.Conv3d(1, 8, 1), *hidden, nn.Conv3d(8, 3, 1))

    few, more = (measure_step(lambda count=count: convolutions(count), 1, PATCH, 2).activations for count in (1, 2))
    half = 2  # bytes
    assert more - few == half * (2 * 8 * math.prod(PATCH) + 8 * 8 * 27)


def test_a_measurement_leaves_torch_as_it_was():
    measure_step(build, 1, PATCH, 2)
    assert not torch.is_autocast_enabled("cpu")
    q = torch.randn(1, 1, 4, 8)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), (q @ q.mT / 8**0.5).softmax(-1) @ q)
    assert build()(torch.zeros(2, 1, *PATCH))[0].device.type == "cpu"
