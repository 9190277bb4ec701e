"""Plans and checkpoints that version 0.1.0 wrote, before its modules moved: trainings continue and validate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID
from nnunetv2.run.run_training import run_training
from trainings import assert_same_optimizer, make_trainer

OLD = Path(__file__).parents[1] / "data" / "version_0_1_0"
# Largest differences of the validation losses. Other processors round otherwise; pretraining now has other samples.
TOLERANCES = {"VFPretrainTrainer": 2.5e-2, "VFFinetuneTrainer": 1e-2}
CPU = torch.device("cpu")


@pytest.fixture
def old_plans(copied_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old plans beside the preprocessed cases, and the schedule of the old trainings."""
    for plans in ("nnUNetPlans", "PCTNetPlans"):
        shutil.copy(OLD / "plans" / f"{plans}.json", copied_dataset)
    for prefix in ("nnUNet_vf_", "nnUNet_vf_finetune_"):
        for name, value in {"num_epochs": 3, "iterations_per_epoch": 2, "val_iterations_per_epoch": 1}.items():
            monkeypatch.setenv(f"{prefix}{name}", str(value))


def fold_with(checkpoint: str, trainer: str, results: Path) -> Path:
    """Return the trainer's fold folder, with an old checkpoint (``interrupted/...`` or ``finished/...``) in it."""
    folder = results / DATASET / f"{trainer}__nnUNetPlans__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    shutil.copy(next((OLD / checkpoint / trainer).iterdir()), folder)
    return folder


@pytest.mark.parametrize("trainer", TOLERANCES)
def test_an_interrupted_training_continues_at_its_step(old_plans, tmp_path, trainer):
    """It was interrupted in the second of three epochs; all that its checkpoint holds is restored."""
    folder = fold_with("interrupted", trainer, tmp_path / "results")
    checkpoint = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
    training = make_trainer(trainer, continue_training=True)
    weights = training.bare_network().state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in checkpoint["network_weights"].items())
    assert_same_optimizer(training.optimizer.state_dict(), checkpoint["optimizer_state"])
    assert training.epoch_losses == [float(loss) for loss in checkpoint["long_training"]["losses"]]
    training.run_training()
    resumed, uninterrupted = (
        torch.load(file / "checkpoint_final.pth", weights_only=False) for file in (folder, OLD / "finished" / trainer)
    )
    assert resumed["current_epoch"] == uninterrupted["current_epoch"] == 3
    assert resumed["logging"]["lrs"] == uninterrupted["logging"]["lrs"]
    for name, tolerance in (("train_losses", 1e-2), ("val_losses", TOLERANCES[trainer])):
        before_interruption, logged = checkpoint["logging"][name], resumed["logging"][name]
        assert logged[: len(before_interruption)] == before_interruption
        assert logged == pytest.approx(uninterrupted["logging"][name], rel=tolerance), name


@pytest.mark.parametrize(
    ("trainer", "result"),
    [("VFPretrainTrainer", "pretext_report.json"), ("VFFinetuneTrainer", "validation/summary.json")],
)
def test_a_finished_training_is_validated(old_plans, tmp_path, trainer, result):
    folder = fold_with("finished", trainer, tmp_path / "results")
    run_training(str(DATASET_ID), "3d_fullres", 0, trainer, only_run_validation=True, device=CPU)
    assert json.loads((folder / result).read_text())
