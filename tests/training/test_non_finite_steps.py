"""Steps with a non-finite gradient are counted; too many in a row are an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunetv2_vf.training.non_finite_steps import NotFiniteError, StepMonitor

TAKEN, SKIPPED = torch.tensor(True), torch.tensor(False)


def new_monitor() -> StepMonitor:
    return StepMonitor(nn.BatchNorm1d(3))


def add_all(monitor: StepMonitor, flags: dict[int, torch.Tensor]) -> None:
    for step, taken in flags.items():
        monitor.add(step, taken)


def test_skipped_steps_are_counted():
    steps = new_monitor()
    for step in range(50):
        steps.add(step, SKIPPED if step in (3, 30, 31) else TAKEN)
    steps.check()
    assert steps.skipped == 3
    assert steps.in_a_row == []


@pytest.mark.parametrize("first", [0, 7, 19])
def test_the_twentieth_skipped_step_in_a_row_is_an_error(first):
    steps = new_monitor()
    with pytest.raises(NotFiniteError) as error:
        add_all(steps, {step: SKIPPED if step >= first else TAKEN for step in range(100)})
    assert error.value.steps == list(range(first, first + 20))


def test_nineteen_skipped_steps_in_a_row_are_no_error():
    steps = new_monitor()
    for step in range(200):
        steps.add(step, TAKEN if step % 20 == 0 else SKIPPED)
    steps.check()
    assert steps.skipped == 190


def test_skipped_steps_in_a_row_are_counted_across_an_interruption():
    before, after = new_monitor(), new_monitor()
    for step in range(15):
        before.add(step, SKIPPED)
    before.check()
    after.restore(before.skipped, before.in_a_row)
    with pytest.raises(NotFiniteError) as error:
        add_all(after, dict.fromkeys(range(15, 40), SKIPPED))
    assert error.value.steps == list(range(20))


def test_non_finite_running_statistics_are_restored():
    norm = nn.BatchNorm1d(3)
    steps = StepMonitor(norm)
    norm(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    steps.add(0, TAKEN)
    steps.check()
    good = norm.running_mean.clone()
    norm(torch.tensor([[0.0, 0, float("inf")]] * 4))
    steps.add(1, SKIPPED)
    steps.check()
    assert norm.running_mean.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert norm.running_mean[2] == good[2]
    assert norm.running_mean[0] == pytest.approx(0.9 * good[0].item())  # finite channels keep their update
