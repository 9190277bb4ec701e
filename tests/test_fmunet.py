from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNet

FEATURES = (4, 8, 8, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": [1, 2, 2, 2]}, "no resolution mode"),
        ({"features_per_stage": (4, 8, 8, 16)}, "features_per_stage = .*legal: 5 values"),
        ({"depth": 0}, "depth = 0; legal: 1 and more"),
        ({"dropout_per_stage": (0, 0, 0, 0, 1.0)}, "dropout_per_stage = .*legal: from 0 to below 1"),
    ],
)
def test_illegal_arguments_are_refused_with_the_legal_values(arguments, message):
    legal = {"input_channels": 1, "features_per_stage": FEATURES, "strides": MODES[0], "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        FMUNet(**{**legal, **arguments})


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_levels_above_the_first_halving_of_the_slices_have_flat_kernels(mode):
    network = FMUNet(1, FEATURES, MODES[mode], 2)
    kernels = [stage.convs[0][3].kernel_size for stage in network.encoder.stages]
    assert kernels == [(1, 3, 3)] * mode + [(3, 3, 3)] * (5 - mode)
    assert [layer[3].kernel_size for layer in network.decoder.seg_layers] == kernels[3::-1]


def test_initial_weights_are_those_of_he():
    network = FMUNet(1, (16, 16, 16, 16, 16), MODES[0], 5)
    for conv in (module for module in network.modules() if isinstance(module, nn.Conv3d)):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (1 + 0.01**2) / fan_in), rel=0.2)
        assert not conv.bias.any()


def test_the_three_deeper_levels_have_dropout():
    network = FMUNet(1, FEATURES, MODES[0], 2)
    blocks = [*network.encoder.stages, network.decoder.bottom, *network.decoder.stages]
    assert [block.convs[0][2].p for block in blocks] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0]
    others = [*network.encoder.downs, *network.decoder.seg_layers, *(up.conv for up in network.decoder.ups)]
    assert {layer[2].p for layer in others} == {0.0}


@torch.no_grad()
def test_the_network_computes_what_the_paper_describes():
    """The same network written as functions of its parameters."""
    torch.manual_seed(0)
    network = FMUNet(1, FEATURES, MODES[0], 2, deep_supervision=True).eval()
    for parameter in network.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    image = torch.randn(2, 1, 32, 16, 16)

    def layer(name: str, x: torch.Tensor, **options) -> torch.Tensor:
        norm, conv = (network.get_submodule(f"{name}.{i}") for i in (0, 3))
        x = F.leaky_relu(F.instance_norm(x, weight=norm.weight, bias=norm.bias), 0.01)
        return F.conv3d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2, **options)

    def block(name: str, x: torch.Tensor) -> torch.Tensor:
        for i in (0, 1):
            x = layer(f"{name}.convs.{i}", x) + x
        return x

    stem = network.encoder.stem
    maps = [block("encoder.stages.0", F.conv3d(image, stem.weight, stem.bias, padding=1))]
    for level in range(1, 5):
        down = layer(f"encoder.downs.{level - 1}", maps[-1], stride=2)
        maps.append(block(f"encoder.stages.{level}", down))
    x, outputs = block("decoder.bottom", maps[4]), []
    for i, skip in enumerate(maps[3::-1]):
        up = F.interpolate(layer(f"decoder.ups.{i}.up.0", x), scale_factor=2, mode="trilinear", align_corners=True)
        x = block(f"decoder.stages.{i}", layer(f"decoder.ups.{i}.conv", torch.cat([skip, up], 1)))
        outputs.insert(0, layer(f"decoder.seg_layers.{i}", x))
    torch.testing.assert_close(network(image), outputs, rtol=1e-4, atol=1e-4)


def test_an_input_that_is_one_voxel_in_the_deepest_level_is_refused():
    network = FMUNet(1, FEATURES, MODES[1], 2).eval()
    with pytest.raises(ValueError, match=r"\(8, 16, 16\) voxels, .*make one side twice as long"):
        network(torch.zeros(1, 1, 8, 16, 16))
    assert network(torch.zeros(1, 1, 8, 32, 16)).shape == (1, 2, 8, 32, 16)
