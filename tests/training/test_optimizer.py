"""Optimisers and gradient clipping."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_vf.settings import FinetuneSettings, VFSettings
from nnunetv2_vf.training.optimizer import clip_gradients, make_optimizer


def new_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1.0)


KINDS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("name", KINDS)
def test_optimizers_use_their_settings(name):
    optimizer = make_optimizer(nn.Linear(2, 2).parameters(), FinetuneSettings(optimizer=name, weight_decay=0.1))
    assert type(optimizer) is KINDS[name]
    assert optimizer.defaults["weight_decay"] == 0.1


def test_sgd_equals_nnunets_optimizer():
    trainer = SimpleNamespace(network=nn.Linear(2, 2), initial_lr=1e-2, weight_decay=3e-5, num_epochs=1000)
    stock, _ = nnUNetTrainer.configure_optimizers(trainer)
    optimizer = make_optimizer(trainer.network.parameters(), FinetuneSettings())
    assert type(optimizer) is type(stock)
    assert optimizer.defaults == stock.defaults


@pytest.mark.parametrize("name", KINDS)
def test_fused_and_plain_optimizers_take_the_same_steps_and_exchange_states(name):
    settings = VFSettings(optimizer=name)
    networks = [nn.Linear(3, 3) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    plain, fused = (make_optimizer(n.parameters(), settings, fused=i == 1) for i, n in enumerate(networks))
    for step in range(4):
        for network, optimizer in zip(networks, (plain, fused), strict=True):
            optimizer.zero_grad()
            network(torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        if step == 1:  # each continues with the state of the other
            states = plain.state_dict(), fused.state_dict()
            plain.load_state_dict(copy.deepcopy(states[1]))
            fused.load_state_dict(copy.deepcopy(states[0]))
            assert [o.param_groups[0]["fused"] for o in (plain, fused)] == [None, True]
    torch.testing.assert_close(networks[0].state_dict(), networks[1].state_dict())


@pytest.mark.parametrize(("max_norm", "expected"), [(0.5, 0.5), (12.0, 30.0)])
def test_gradients_are_clipped_before_the_step(max_norm, expected):
    optimizer = new_optimizer()
    clip_gradients(optimizer, max_norm)  # a norm of 12 or more is left to nnU-Net
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.tensor([30.0, 0.0, 0.0])
    optimizer.step()
    assert parameter[0].item() == pytest.approx(1 - expected, abs=1e-4)
