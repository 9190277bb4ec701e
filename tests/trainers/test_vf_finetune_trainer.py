"""VFFinetuneTrainer through nnU-Net's own entry points, on tiny phantoms."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DATASET, DATASET_ID
from nnunetv2.run.run_training import get_trainer_from_args, run_training

CPU = torch.device("cpu")


def new_trainer():
    return get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", device=CPU)


def test_the_schedule_comes_from_the_environment(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_finetune_initial_lr", "0.02")
    trainer = new_trainer()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (2, 2, 2)
    assert trainer.initial_lr == 0.02


def test_the_default_schedule_is_nnunets(tiny, monkeypatch):
    for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
        monkeypatch.delenv(f"nnUNet_vf_finetune_{name}")
    stock = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer", device=CPU)
    trainer = new_trainer()
    names = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "weight_decay")
    for name in (*names, "save_every"):
        assert getattr(trainer, name) == getattr(stock, name)


def test_a_wrong_setting_is_reported_in_one_line(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_finetune_num_epochs", "none")
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: .*nnUNet_vf_finetune_num_epochs = 'none'"):
        new_trainer()


def test_a_training_validates_and_records_its_settings(tiny, tmp_path):
    run_training(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", device=CPU)
    folder = tmp_path / "results" / DATASET / "VFFinetuneTrainer__nnUNetPlans__3d_fullres"
    assert (folder / "fold_0" / "validation" / "summary.json").is_file()
    plans = json.loads((folder / "plans.json").read_text())
    assert plans["volume_fusion_finetune"]["num_epochs"] == 2
