"""VFFinetuneTrainer through nnU-Net's own entry points, on tiny phantoms."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DATASET, DATASET_ID
from nnunetv2.run.run_training import get_trainer_from_args, run_training
from trainings import make_trainer

CPU = torch.device("cpu")


def test_the_schedule_comes_from_the_environment(two_epochs, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_finetune_initial_lr", "0.02")
    trainer = make_trainer("VFFinetuneTrainer")
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (2, 2, 2)
    assert trainer.initial_lr == 0.02


def test_the_default_schedule_is_nnunets(two_epochs, monkeypatch):
    for name in ("num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"):
        monkeypatch.delenv(f"nnUNet_vf_finetune_{name}")
    stock = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer", device=CPU)
    trainer = make_trainer("VFFinetuneTrainer")
    names = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr", "weight_decay")
    for name in (*names, "save_every"):
        assert getattr(trainer, name) == getattr(stock, name)


def test_a_wrong_setting_is_reported_in_one_line(two_epochs, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_finetune_num_epochs", "none")
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: .*nnUNet_vf_finetune_num_epochs = 'none'"):
        make_trainer("VFFinetuneTrainer")


def test_an_unknown_configuration_is_reported_with_the_legal_ones(two_epochs):
    with pytest.raises(SystemExit, match="have no configuration '3d_hires'; legal: 2d, 3d_fullres"):
        make_trainer("VFFinetuneTrainer", configuration="3d_hires")


@pytest.mark.parametrize("trainer", ["VFPretrainTrainer", "VFFinetuneTrainer"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_training_on_a_gpu_that_does_not_exist_writes_nothing(two_epochs, tmp_path, trainer):
    with pytest.raises(SystemExit, match="torch finds no GPU; train on the CPU with -device cpu"):
        get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, trainer, device=torch.device("cuda"))
    assert not (tmp_path / "results").exists()


def test_a_training_validates_and_records_its_settings(two_epochs, tmp_path):
    run_training(str(DATASET_ID), "3d_fullres", 0, "VFFinetuneTrainer", device=CPU)
    folder = tmp_path / "results" / DATASET / "VFFinetuneTrainer__nnUNetPlans__3d_fullres"
    assert (folder / "fold_0" / "validation" / "summary.json").is_file()
    plans = json.loads((folder / "plans.json").read_text())
    assert plans["volume_fusion_finetune"]["num_epochs"] == 2
