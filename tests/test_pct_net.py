from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.pct_net import PCTNet, PReLU

FEATURES = (4, 8, 8, 16, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": [[1, 1, 1]] + [[2, 1, 2]] * 4}, r"no resolution mode.*\[2, 1, 2\].*mode 2"),
        ({"strides": [1, 2, 2, 2]}, "no resolution mode"),
        ({"features_per_stage": (4, 8, 8, 16)}, "features_per_stage = .*legal: 5 values"),
        ({"features_per_stage": (4, 8, 8, 16, 30)}, "num_heads = .* must divide"),
        ({"depths": (2, 2)}, "depths = .*legal: 3 values"),
        ({"norm_op": nn.GroupNorm}, "norm_op = .*BatchNorm3d"),
        ({"window_sizes": (0, 6, 6)}, r"window_sizes = \[0, 6, 6\]; legal: 1 and more"),
        ({"num_heads": (0, 8, 16)}, r"num_heads = \[0, 8, 16\]; legal: 1 and more"),
        ({"drop_path": 1.0}, r"drop_path = 1.0; legal: from 0 to below 1"),
    ],
)
def test_illegal_arguments_are_refused_with_the_legal_values(arguments, message):
    legal = {"input_channels": 1, "features_per_stage": FEATURES, "strides": MODES[0], "num_classes": 2}
    with pytest.raises(ValueError, match=message):
        PCTNet(**{**legal, **arguments})


def test_a_plan_can_name_the_norm():
    kwargs = {
        "features_per_stage": list(FEATURES),
        "strides": [list(stride) for stride in MODES[0]],
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"affine": True},
    }
    network = get_network_from_plans("nnunetv2_vf.pct_net.PCTNet", kwargs, ["norm_op"], 2, 4, deep_supervision=True)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm3d | nn.InstanceNorm3d)]
    assert norms
    assert all(isinstance(norm, nn.InstanceNorm3d) for norm in norms)


@pytest.mark.parametrize("compiled", [False, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_prelu_has_the_values_and_gradients_of_torch(compiled):
    """In double precision; also at 0, where the slope of the gradient is a convention."""
    torch.manual_seed(0)
    ours, published = PReLU().double(), nn.PReLU().double()
    ours.load_state_dict(published.state_dict())
    if compiled:
        ours.compile(fullgraph=True, backend=compiled)
    x = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64)
    x[0, 0, 0] = 0
    results = []
    for prelu in (ours, published):
        inputs = x.clone().requires_grad_()
        output = prelu(inputs)
        output.square().mean().backward()
        results.append([output, inputs.grad, prelu.weight.grad])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("compiled", [False, True])
def test_prelu_keeps_the_precision_of_its_input(compiled):
    prelu = PReLU()
    if compiled:
        prelu.compile(fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert prelu(torch.randn(1, 2, 3, 3, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@torch.no_grad()
def test_with_batch_norm_the_deepest_level_may_have_a_single_voxel():
    network = PCTNet(1, FEATURES, MODES[0], 3)
    assert network.compute_conv_feature_map_size((16, 16, 16)) > 0
    assert network.eval()(torch.randn(2, 1, 16, 16, 16)).shape == (2, 3, 16, 16, 16)
