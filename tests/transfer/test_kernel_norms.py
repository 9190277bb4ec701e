"""Pretrained kernels are scaled to the norm of freshly initialised ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PLANS_OF_NETWORKS
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from networks import unet
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from torch import nn

from nnunetv2_vf.network_parts import part_of
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.kernel_norms import kernel_factors, scale_kernels

BOTH = ("encoder", "decoder")
KERNEL = "encoder.stages.0.0.convs.1.conv.weight"


def new_unet(residual: bool = False, factor: float = 1.0) -> nn.Module:
    """Return a U-Net in double precision with its kernels multiplied by a factor and nearly no epsilon in its norms."""
    torch.manual_seed(0)
    network = unet(residual=residual).double()
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            module.eps = 1e-12
        if isinstance(module, ConvDropoutNormReLU):
            module.conv.weight.data *= factor
    return network


def make_image() -> torch.Tensor:
    return torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)


@pytest.mark.parametrize("residual", [False, True])
def test_kernels_get_the_norm_of_new_ones_and_the_output_stays_the_same(residual):
    network, fresh = new_unet(residual, factor=3.0), new_unet(residual)
    before, others = network(make_image()), {k: v.clone() for k, v in network.state_dict().items()}
    factors = kernel_factors(network, fresh, BOTH)
    scale_kernels(network, factors)
    assert [*factors.values()] == pytest.approx([1 / 3] * len(factors))
    torch.testing.assert_close(network(make_image()), before, atol=1e-8, rtol=1e-8)
    scaled = {f"{name}.weight" for name in factors}
    for name, parameter in network.named_parameters():
        expected = fresh.get_parameter(name) if name in scaled else others[name]
        torch.testing.assert_close(parameter, expected, msg=name)
    assert not [name for name in scaled if "seg_layers" in name or "transpconvs" in name]


@pytest.mark.parametrize("parts", [["encoder"], ["decoder"]])
def test_only_the_requested_parts_are_scaled(parts):
    factors = kernel_factors(new_unet(factor=2.0), new_unet(), parts)
    assert factors
    assert {part_of(name) for name in factors} == {*parts}


def test_zero_kernels_and_kernels_without_a_direct_instance_norm_are_not_scaled():
    network, fresh = new_unet(), new_unet()
    everything = {*kernel_factors(network, fresh, BOTH)}
    network.get_parameter(KERNEL).data.zero_()
    assert {*kernel_factors(network, fresh, BOTH)} == everything - {KERNEL.removesuffix(".weight")}

    options = {"norm_op": nn.InstanceNorm3d, "nonlin": nn.ELU, "nonlin_first": True}
    nonlinear_first = nn.ModuleDict({"encoder": ConvDropoutNormReLU(nn.Conv3d, 1, 2, 3, 1, **options)})
    assert kernel_factors(nonlinear_first, nonlinear_first, BOTH) == {}

    options = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"track_running_stats": True}}
    with_running_statistics = nn.ModuleDict({"encoder": ConvDropoutNormReLU(nn.Conv3d, 1, 2, 3, 1, **options)})
    assert kernel_factors(with_running_statistics, with_running_statistics, BOTH) == {}


@pytest.mark.parametrize(
    ("optimizer", "rate", "slower"), [(torch.optim.SGD, 300.0, 4.0), (torch.optim.Adam, 1e-3, 2.0)]
)
def test_a_step_turns_a_kernel_of_twice_the_norm_less_than_a_scaled_one(optimizer, rate, slower):
    def angle_of_a_step(network: nn.Module) -> float:
        kernel = network.get_parameter(KERNEL)
        before = kernel.detach().clone()
        network(make_image())[0].square().mean().backward()
        optimizer([kernel], lr=rate).step()
        cosine = torch.cosine_similarity(before.flatten(), kernel.detach().flatten(), dim=0)
        return float(torch.acos(cosine))

    scaled = new_unet(factor=2.0)
    scale_kernels(scaled, kernel_factors(scaled, new_unet(), BOTH))
    new = angle_of_a_step(new_unet())
    assert new > 1e-4, "smaller angles are rounding errors"
    assert new / angle_of_a_step(new_unet(factor=2.0)) == pytest.approx(slower, rel=0.1)
    assert angle_of_a_step(scaled) == pytest.approx(new, rel=1e-3)


@pytest.mark.parametrize("schedule", ["full", "frozen_encoder"])
@pytest.mark.parametrize("network", PLANS_OF_NETWORKS)
def test_fine_tuning_starts_with_scaled_kernels(artifacts, tmp_path, monkeypatch, network, schedule):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_vf_finetune_kernel_norms", "fresh")
    monkeypatch.setenv("nnUNet_vf_finetune_schedule", schedule)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(artifacts[network])])
    trainer = get_trainer_from_args(
        "7", "3d_fullres", 0, "VFFinetuneTrainer", PLANS_OF_NETWORKS[network], device=torch.device("cpu")
    )
    trainer.initialize()
    fresh = {name: parameter.detach().clone() for name, parameter in trainer.network.named_parameters()}
    load_pretrained_weights(trainer.network, str(artifacts[network]))
    trainer.on_train_start()
    trainer.on_train_end()

    log, pretrained = Path(trainer.log_file).read_text(), read_artifact(artifacts[network])["network_weights"]
    has_scaled_kernels = network in ("U-Net", "ResEnc-M")
    assert ("pretrained kernels scaled to the norm of new" in log) == has_scaled_kernels
    for name, parameter in trainer.network.named_parameters():
        frozen = schedule == "frozen_encoder" and part_of(name) == "encoder"
        if name.endswith(".conv.weight") and has_scaled_kernels and not frozen:
            torch.testing.assert_close(parameter.norm(), fresh[name].norm())
        elif part_of(name) != "heads":
            torch.testing.assert_close(parameter, pretrained[name], rtol=0, atol=0)
