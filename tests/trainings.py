"""Helpers for trainings in the process of the test: make, interrupt and compare them."""

from __future__ import annotations

import itertools
import os
import signal

import numpy as np
import torch
from conftest import DATASET_ID
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunetv2_vf.training.signals import EXIT_RESUBMIT

CPU = torch.device("cpu")
LOGGED = ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs", "skipped_steps", "quarantined_cases")


def make_trainer(
    name: str = "VFPretrainTrainer",
    plans: str = "nnUNetPlans",
    continue_training: bool = False,
    fold: int | str = 0,
    configuration: str = "3d_fullres",
):
    """Make a trainer as nnUNetv2_train does; with ``continue_training``, load its checkpoint."""
    trainer = get_trainer_from_args(str(DATASET_ID), configuration, fold, name, plans, continue_training, CPU)
    maybe_load_checkpoint(trainer, continue_training, validation_only=False)
    return trainer


def run_before_step(trainer, number: int, action) -> None:
    """Run an action before a training or validation step; steps count from 0 in this process."""
    original, steps = trainer.between_steps, itertools.count()

    def between_steps() -> None:
        if next(steps) == number:
            action()
        original()

    trainer.between_steps = between_steps


def run_until_signal(trainer) -> bool:
    """Run a training; return True if it exits for a restart."""
    try:
        trainer.run_training()
    except SystemExit as exit_:
        return exit_.code == EXIT_RESUBMIT
    return False


def sender_of(number: signal.Signals):
    """Return a function that sends a signal to this process."""
    return lambda: os.kill(os.getpid(), number)


def assert_same_optimizer(one: dict, other: dict) -> None:
    assert one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][number][name])), name


def assert_same_training(one: dict, other: dict) -> None:
    for name, tensor in one["network_weights"].items():
        assert torch.equal(tensor, other["network_weights"][name]), name
    assert_same_optimizer(one["optimizer_state"], other["optimizer_state"])
    for name in (name for name in LOGGED if name in one["logging"]):
        np.testing.assert_array_equal(one["logging"][name], other["logging"][name], err_msg=name)
    assert {name: len(values) for name, values in one["logging"].items()} == {
        name: len(values) for name, values in other["logging"].items()
    }
    assert one["_best_ema"] == other["_best_ema"]
    assert one["current_epoch"] == other["current_epoch"]


def assert_nearly_same_weights(one: dict, other: dict, tolerance: float = 1e-5) -> None:
    for name, tensor in other["network_weights"].items():
        torch.testing.assert_close(one["network_weights"][name], tensor, rtol=0, atol=tolerance, msg=name)
