"""What PCT-Net and FMUNet have in common: modes, sizes, deep supervision, compiling, checkpointing, memory layout."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_vf.five_level_network import MODES, FiveLevelNetwork, total_stride
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.pct_net import PCTNet

FEATURES = (4, 8, 8, 16, 32)
SIZES = {0: (32, 32, 48), 1: (16, 32, 48), 2: (8, 32, 48)}
NO_DROPOUT = {
    PCTNet: {"dropout_per_stage": (0.0,) * 5, "drop_path": 0.0},
    FMUNet: {"dropout_per_stage": (0.0,) * 5},
}
networks = pytest.mark.parametrize("network_class", [PCTNet, FMUNet], ids=lambda network: network.__name__)


def new_network(
    network_class, mode: int = 0, classes: int = 3, deep_supervision: bool = True, channels: int = 1, **kwargs
) -> FiveLevelNetwork:
    torch.manual_seed(0)
    return network_class(channels, FEATURES, MODES[mode], classes, deep_supervision, **kwargs)


def volume(size: tuple[int, ...] = SIZES[0], channels: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def backward(network: nn.Module, x: torch.Tensor) -> None:
    outputs = network(x)
    sum(output.square().mean() for output in (outputs if isinstance(outputs, list) else [outputs])).backward()


@networks
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_nnunet_builds_the_network_from_a_plan(network_class, mode):
    kwargs = {"features_per_stage": list(FEATURES), "strides": [list(stride) for stride in MODES[mode]]}
    path = f"{network_class.__module__}.{network_class.__name__}"
    network = get_network_from_plans(path, kwargs, [], 2, 4, deep_supervision=True)
    outputs = network(volume(SIZES[mode], channels=2))
    scales = [total_stride(MODES[mode][: level + 1]) for level in range(4)]
    expected = [(2, 4, *(s // f for s, f in zip(SIZES[mode], scale, strict=True))) for scale in scales]
    assert [tuple(output.shape) for output in outputs] == expected

    network.decoder.deep_supervision = False
    network.eval()
    assert network(volume(SIZES[mode], channels=2)).shape == expected[0]


@pytest.mark.parametrize(
    ("network_class", "features", "millions"),
    [(PCTNet, (24, 48, 128, 256, 512), 44.3), (FMUNet, (32, 64, 128, 256, 512), 47.4)],
)
def test_the_published_networks_have_their_number_of_parameters(network_class, features, millions):
    with torch.device("meta"):
        network = network_class(1, features, MODES[0], 5)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.3)


@networks
@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 16, 16), (32, 16, 64), (48, 64, 112)])
def test_the_network_accepts_inputs_of_different_sizes(network_class, size):
    network = new_network(network_class).eval()
    assert network(volume(size))[0].shape[2:] == size


@networks
@torch.no_grad()
def test_evaluation_of_a_sample_does_not_depend_on_the_batch(network_class):
    network = new_network(network_class, mode=1).eval()
    x = volume((16, 64, 48))
    torch.testing.assert_close(network(x)[0][:1], network(x[:1])[0], rtol=1e-3, atol=1e-4)


@networks
def test_an_input_size_that_strides_do_not_divide_is_refused(network_class):
    with pytest.raises(ValueError, match=r"\(8, 40, 32\) voxels; .* each side must be a multiple of \(4, 16, 16\)"):
        new_network(network_class, mode=2)(volume((8, 40, 32)))


@networks
def test_strides_may_be_single_numbers(network_class):
    assert network_class(1, FEATURES, [1, 2, 2, 2, 2], 2).strides == MODES[0]


@networks
def test_with_deep_supervision_every_parameter_gets_a_gradient(network_class):
    network = new_network(network_class)
    backward(network, volume())
    assert [name for name, p in network.named_parameters() if p.grad is None] == []


@networks
def test_without_deep_supervision_the_auxiliary_layers_exist_but_need_no_gradient(network_class):
    network = new_network(network_class, deep_supervision=False)
    assert set(network.state_dict()) == set(new_network(network_class).state_dict())
    backward(network, volume())
    without_gradient = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert without_gradient == []
    network.decoder.deep_supervision = True
    backward(network, volume())
    assert all(p.grad is not None for p in network.parameters())


@networks
@pytest.mark.parametrize("deep_supervision", [True, False])
def test_distributed_training_takes_several_steps(network_class, deep_supervision, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        network = DistributedDataParallel(new_network(network_class, deep_supervision=deep_supervision))
        for _ in range(3):  # with an unused parameter the second step fails
            backward(network, volume())
    finally:
        dist.destroy_process_group()


@networks
def test_nnunet_transfers_all_weights_except_the_output_layers(network_class, tmp_path, capsys):
    source, target = new_network(network_class, classes=5), new_network(network_class, classes=2)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    torch.save({"network_weights": source.state_dict()}, tmp_path / "weights.pth")
    load_pretrained_weights(target, tmp_path / "weights.pth")
    loaded, pretrained = target.state_dict(), source.state_dict()
    fresh = {
        name
        for name in loaded
        if loaded[name].shape != pretrained[name].shape or (loaded[name] != pretrained[name]).any()
    }
    assert fresh
    assert all(".seg_layers." in name for name in fresh)


# aot_eager fails in the backward pass of a dropout whose gradient is a transposed view; eager and inductor do not
@networks
@pytest.mark.parametrize(
    ("mode", "backend", "dropout", "checkpointing"),
    [
        (0, "aot_eager", 0.0, False),
        pytest.param(1, "aot_eager", 0.0, True, marks=pytest.mark.slow),
        (2, "eager", 0.2, False),
        pytest.param(0, "inductor", 0.2, False, marks=pytest.mark.slow),
    ],
)
def test_the_network_compiles_into_one_graph(network_class, mode, backend, dropout, checkpointing):
    torch.compiler.reset()  # after another size in the same process, torch compiles for any size, where inductor fails
    options = {"dropout_per_stage": (dropout,) * 5}
    if network_class is PCTNet:
        options |= {"drop_path": dropout, "depths": (2, 1, 1)}
    network = new_network(network_class, mode, activation_checkpointing=checkpointing, **options).double()
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x = volume(SIZES[mode]).double()
    backward(compiled, x)
    assert all(p.grad is not None for p in network.parameters())
    if dropout == 0:
        reference = new_network(network_class, mode, **options).double()
        backward(reference, x)
        torch.testing.assert_close(network.state_dict(), reference.state_dict())  # batch statistics counted once
        expected = [p.grad for p in reference.parameters()]
        torch.testing.assert_close([p.grad for p in network.parameters()], expected, rtol=1e-6, atol=1e-12)


@networks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(network_class, dtype):
    network = new_network(network_class, mode=2)
    # 4x4x4 at the deepest level: on 2x2x3, torch 2.14's own bf16 Conv3d reads uninitialised memory in its backward pass
    with torch.autocast("cpu", dtype=dtype):
        outputs = network(100 * volume((16, 64, 64)))
        assert outputs[0].dtype == dtype
        sum(output.float().square().mean() for output in outputs).backward()
    assert all(torch.isfinite(output).all() for output in outputs)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize(
    ("network_class", "options"),
    [(PCTNet, {"norm_op": nn.BatchNorm3d}), (PCTNet, {"norm_op": nn.InstanceNorm3d}), (FMUNet, {})],
)
def test_activation_checkpointing_saves_memory_and_changes_no_result(network_class, options):
    def step(activation_checkpointing):
        network = new_network(network_class, activation_checkpointing=activation_checkpointing, **options)
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        torch.manual_seed(3)  # dropout
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network(volume())
        sum(output.square().mean() for output in outputs).backward()
        return kept, outputs, [p.grad for p in network.parameters()], network.state_dict()

    kept, *results = step(activation_checkpointing=False)
    kept_with, *results_with = step(activation_checkpointing=True)
    assert kept_with < kept / 3
    torch.testing.assert_close(results_with, results)


@networks
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_channels_last_changes_neither_outputs_nor_gradients(network_class, mode):
    def step(channels_last, dtype):
        options = {**NO_DROPOUT[network_class], "channels_last": channels_last}
        network = new_network(network_class, mode, **options).to(dtype)
        outputs = network(volume(SIZES[mode]).to(dtype))
        sum(output.square().mean() for output in outputs).backward()
        kernel = next(m for m in network.encoder.stages[0].modules() if isinstance(m, nn.Conv3d)).weight
        assert kernel.is_contiguous(memory_format=torch.channels_last_3d) == channels_last
        return outputs, [p.grad for p in network.parameters()]

    last, first = (step(channels_last, torch.float64) for channels_last in (True, False))
    torch.testing.assert_close(last, first, rtol=1e-5, atol=1e-12)
    # In single precision the kernels round differently, and a max-pool may send a gradient to another voxel.
    last, first = (step(channels_last, torch.float32)[0] for channels_last in (True, False))
    torch.testing.assert_close(last, first, rtol=1e-3, atol=1e-4)


@networks
def test_compute_conv_feature_map_size_counts_elements_and_keeps_the_mode(network_class):
    network = new_network(network_class, deep_supervision=False)
    assert network.training
    small, large = (network.compute_conv_feature_map_size(size) for size in ((32, 32, 32), (64, 32, 32)))
    assert network.training
    assert large == 2 * small
    stem, output = 4 * 32**3, 3 * 32**3
    assert small > stem + output
