"""Pretrained kernels at the norm of new ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import PLANS_OF_NETWORKS
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from test_adapt import unet
from torch import nn

from nnunetv2_vf.kernel_norms import match_kernel_norms
from nnunetv2_vf.weights import read_artifact


def grown(network: nn.Module, factor: float = 3.0) -> nn.Module:
    """As if it had been trained for long."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("conv.weight", "conv.bias")):
                parameter.normal_().mul_(factor)
    return network


@pytest.mark.parametrize("residual", [False, True])
def test_kernels_get_the_norm_of_new_ones_and_the_network_does_the_same(residual):
    network, fresh = grown(unet(residual=residual).double()), unet(residual=residual)
    image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    before = network(image)
    factors = match_kernel_norms(network, fresh)
    assert all(factor < 1 for factor in factors)
    for (name, kernel), new in zip(network.named_parameters(), fresh.parameters(), strict=True):
        if name.endswith("conv.weight"):
            torch.testing.assert_close(kernel.norm().float(), new.norm())
    torch.testing.assert_close(network(image), before, atol=1e-3, rtol=1e-3)
    assert match_kernel_norms(network, fresh) == pytest.approx([1.0] * len(factors)), "once is enough"


def test_a_step_turns_a_kernel_as_far_whatever_norm_it_had():
    """Of SGD, whose gradient falls with the norm, so that the turn falls with its square."""

    def cosine_after_a_step(network: nn.Module) -> torch.Tensor:
        kernel = network.encoder.stages[0][0].convs[1].conv.weight
        before = kernel.detach().clone()
        image = torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        network(image)[0].square().mean().backward()
        torch.optim.SGD([kernel], lr=0.1).step()
        return torch.cosine_similarity(before.flatten(), kernel.detach().flatten(), dim=0)

    def with_norm(factor: float, matched: bool) -> nn.Module:
        torch.manual_seed(0)
        network, fresh = unet(), unet()
        for name, parameter in network.named_parameters():
            if name.endswith(("conv.weight", "conv.bias")):
                parameter.data *= factor
        if matched:
            match_kernel_norms(network, fresh)
        return network

    small, large = (cosine_after_a_step(with_norm(factor, matched=False)) for factor in (1.0, 4.0))
    assert 1 - large < (1 - small) / 50
    torch.testing.assert_close(cosine_after_a_step(with_norm(4.0, matched=True)), small, atol=1e-3, rtol=0.05)


@pytest.mark.parametrize("norms", ["fresh", "pretrained"])
@pytest.mark.parametrize("network", PLANS_OF_NETWORKS)
def test_fine_tuning_begins_with_the_norms_that_are_chosen(artifacts, tmp_path, monkeypatch, norms, network):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_vf_finetune_kernel_norms", norms)
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(artifacts[network])])
    trainer = get_trainer_from_args(
        "7", "3d_fullres", 0, "VFFinetuneTrainer", PLANS_OF_NETWORKS[network], device=torch.device("cpu")
    )
    trainer.initialize()
    fresh = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    load_pretrained_weights(trainer.network, str(artifacts[network]))
    trainer.on_train_start()
    trainer.on_train_end()

    pretrained = read_artifact(artifacts[network])["network_weights"]
    scaled = norms == "fresh" and network != "PCT-Net"
    assert ("scaled to the norm of new ones" in Path(trainer.log_file).read_text()) == scaled
    for name, tensor in trainer.network.state_dict().items():
        if name.endswith(".conv.weight") and scaled:
            torch.testing.assert_close(tensor.norm(), fresh[name].norm())
            torch.testing.assert_close(
                torch.cosine_similarity(tensor.flatten(), pretrained[name].flatten(), 0), torch.tensor(1.0)
            )
        elif ".seg_layers." not in name and not scaled:
            torch.testing.assert_close(tensor, pretrained[name], rtol=0, atol=0)
