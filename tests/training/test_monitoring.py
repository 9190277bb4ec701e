"""The time spent waiting for data is measured, and all monitored values reach the logs."""

from __future__ import annotations

import signal
import time

import pytest
import torch
from trainings import make_trainer, run_before_step, run_until_signal, sender_of

from nnunetv2_vf.training.monitoring import DataWaitTimer


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


@pytest.mark.pictures
def test_monitored_values_reach_the_log_the_progress_plot_and_nnunets_loggers(three_epochs, folder):
    trainer = make_trainer()
    backend = Backend()
    trainer.logger.loggers.append(backend)
    trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert log.count("samples/s, ") == log.count("cases in quarantine since the last start") == 3
    assert (folder / "progress.png").stat().st_size > 10_000
    for name in ("samples_per_second", "data_wait_share", "gpu_memory_gb", "skipped_steps", "quarantined_cases"):
        assert [step for step, _ in backend.logged[name]] == [0, 1, 2]
    assert all(value > 0 for _, value in backend.logged["samples_per_second"])
    assert all(0 < value < 1 for _, value in backend.logged["data_wait_share"])


def test_an_epoch_without_remaining_steps_has_no_speed(three_epochs, folder):
    trainer = make_trainer()
    run_before_step(trainer, trainer.num_iterations_per_epoch, sender_of(signal.SIGTERM))  # the first validation step
    assert run_until_signal(trainer)
    make_trainer(continue_training=True).run_training()
    log = max(folder.glob("training_log*.txt")).read_text()
    assert "all steps of this epoch were complete before the training was continued; 0 steps skipped" in log
    assert "nan" not in log


def test_a_collapsed_pretext_task_is_reported(two_epochs, folder):
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
