from __future__ import annotations

import pytest

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNet

FEATURES = (4, 8, 8, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": [1, 2, 2, 2]}, "no resolution mode"),
        ({"features_per_stage": (4, 8, 8, 16)}, "features_per_stage = .*legal: 5 values"),
        ({"depth": 0}, r"depth = \[0\]; legal: 1 and more"),
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
