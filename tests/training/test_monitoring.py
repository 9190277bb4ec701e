"""Monitoring: non-finite steps, quarantined cases, time spent waiting for data."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn
from trainings import make_trainer

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.training.monitoring import DataWaitTimer
from nnunetv2_vf.training.non_finite_steps import NotFiniteError, StepMonitor
from nnunetv2_vf.training.quarantine import Quarantine

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


def test_a_quarantined_case_is_reported_once_and_too_many_are_an_error(tmp_path):
    quarantine = Quarantine(limit=0.05, file=tmp_path / "quarantine.json")
    line = "WARNING: case a cannot be read; quarantined, other cases are used"
    assert quarantine.add("a", "cannot be read") == line
    assert quarantine.add("a", "cannot be read") is None
    quarantine.require_below_limit(20)
    quarantine.add("b", "is empty")
    quarantine.require_below_limit(40)
    with pytest.raises(UserError, match=r"2 of 39 cases cannot be used, more than 5%.*: a cannot be read; b is empty"):
        quarantine.require_below_limit(39)
    assert json.loads((tmp_path / "quarantine.json").read_text()) == {"a": "cannot be read", "b": "is empty"}


def test_a_case_that_may_be_usable_later_is_reported_once_and_not_quarantined(tmp_path):
    quarantine = Quarantine(limit=0, file=tmp_path / "quarantine.json")
    line = "WARNING: case a is air here; such sub-volumes are skipped"
    assert quarantine.add("a", "is air here", unusable=False) == line
    assert quarantine.add("a", "is air here", unusable=False) is None
    quarantine.require_below_limit(1)


def test_the_time_spent_waiting_for_data_is_measured():
    def slow_batches():
        for i in range(3):
            time.sleep(0.02)
            yield i

    batches = DataWaitTimer(slow_batches())
    seen = []
    for batch in batches:
        seen.append(batch)
        time.sleep(0.05)
    assert seen == [0, 1, 2]
    assert batches.seconds >= 0.06


def test_a_busy_device_does_not_count_as_waiting():
    batches = DataWaitTimer((time.sleep(0.02) for _ in range(3)), is_device_idle=lambda: False)
    assert len(list(batches)) == 3
    assert batches.seconds == 0


class Backend:
    """A logger with the interface of nnU-Net's loggers, for example that of W&B."""

    def __init__(self) -> None:
        self.logged: dict[str, list] = {}

    def log(self, key: str, value, step: int) -> None:
        self.logged.setdefault(key, []).append((step, value))

    def log_summary(self, key: str, value) -> None:
        pass

    def update_config(self, config: dict) -> None:
        pass


def test_monitored_values_reach_the_log_the_progress_plot_and_nnunets_loggers(three_epochs, folder):
    trainer = make_trainer()
    backend = Backend()
    trainer.logger.loggers.append(backend)
    trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert log.count("samples/s, ") == log.count("cases quarantined") == 3
    assert (folder / "progress.png").stat().st_size > 10_000
    for name in ("samples_per_second", "data_wait_share", "gpu_memory_gb", "skipped_steps", "quarantined_cases"):
        assert [step for step, _ in backend.logged[name]] == [0, 1, 2]
    assert all(value > 0 for _, value in backend.logged["samples_per_second"])
    assert all(0 < value < 1 for _, value in backend.logged["data_wait_share"])


def test_a_collapsed_pretext_task_is_reported(tiny, folder):
    trainer = make_trainer()
    trainer.initialize()
    with torch.no_grad():
        for head in trainer.network.decoder.seg_layers:
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, 0, 50, 0, 0]))
    for group in trainer.optimizer.param_groups:
        group["params"] = group["params"][:1]  # the heads stay
    trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert "WARNING: the pretext task has collapsed: 100.0% of the voxels are predicted as class 2" in log
