from __future__ import annotations

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunetv2_vf.optimizer import WarmupPolyLRScheduler, adaptive_optimizer, clip_gradients, poly_decay
from nnunetv2_vf.settings import FinetuneSettings


def new_optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=1.0)


def rates(schedule, epochs: int) -> list[float]:
    values = []
    for epoch in range(epochs):
        schedule.step(epoch)
        values.append(schedule.optimizer.param_groups[0]["lr"])
        assert schedule.get_last_lr() == [values[-1]]
    return values


def test_without_warmup_it_is_nnunets_schedule():
    ours = rates(WarmupPolyLRScheduler(new_optimizer(), 0.1, 20), 20)
    assert ours == pytest.approx(rates(PolyLRScheduler(new_optimizer(), 0.1, 20), 20))


def test_the_rate_rises_to_its_highest_and_then_decays():
    values = rates(WarmupPolyLRScheduler(new_optimizer(), 0.1, 20, warmup_epochs=4), 20)
    assert values[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert values[4:] == sorted(values[4:], reverse=True)
    assert values[-1] > 0


def test_the_rate_is_a_function_of_the_epoch_alone():
    schedule = WarmupPolyLRScheduler(new_optimizer(), 0.1, 20, warmup_epochs=4)
    whole = rates(schedule, 20)
    for epoch in (13, 2, 19, 0):
        schedule.step(epoch)
        assert schedule.get_last_lr() == [whole[epoch]]


@pytest.mark.parametrize(
    ("epochs", "fraction", "expected"), [(1, 0.9, 1), (2, 0.05, 1), (1000, 0.05, 50), (10, 0.0, 0)]
)
def test_a_schedule_of_any_length_trains(epochs, fraction, expected):
    settings = FinetuneSettings(num_epochs=epochs, warmup_fraction=fraction)
    schedule = poly_decay(new_optimizer(), settings, settings.warmup_fraction)
    assert schedule.warmup_epochs == min(expected, epochs - 1)
    assert min(rates(schedule, epochs)) > 0


@pytest.mark.parametrize(("name", "kind"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adaptive_optimizers_take_their_settings(name, kind):
    optimizer = adaptive_optimizer(nn.Linear(2, 2), FinetuneSettings(optimizer=name, weight_decay=0.1))
    assert type(optimizer) is kind
    assert optimizer.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize(("max_norm", "expected"), [(0.5, 0.5), (12.0, 30.0)])
def test_gradients_are_clipped_before_the_step(max_norm, expected):
    optimizer = new_optimizer()
    clip_gradients(optimizer, max_norm)  # 12 and more: left to nnU-Net
    parameter = optimizer.param_groups[0]["params"][0]
    parameter.grad = torch.tensor([30.0, 0.0, 0.0])
    optimizer.step()
    assert parameter[0].item() == pytest.approx(1 - expected, abs=1e-4)
