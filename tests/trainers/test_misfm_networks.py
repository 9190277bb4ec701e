"""PCT-Net and FMUNet in nnU-Net's training and prediction, with plans of ``nnUNetv2_vf plan``."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import DATASET, DATASET_ID
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args, run_training

from nnunetv2_vf.transfer.artifact import read_artifact

CPU = torch.device("cpu")
TRAINING = (str(DATASET_ID), "3d_fullres", 0)


@pytest.fixture(params=["pct_plans", "fmunet_plans"])
def plans(request, nnunet) -> str:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("trainer_name", ["nnUNetTrainer", "nnUNetTrainerNoDeepSupervision"])
def test_stock_trainers_train_the_network(plans, two_epochs, trainer_name):
    trainer = get_trainer_from_args(*TRAINING, trainer_name, plans, device=CPU)
    trainer.on_train_start()
    before = [p.detach().clone() for p in trainer.network.decoder.seg_layers[-1].parameters()]
    losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(2)]
    after = list(trainer.network.decoder.seg_layers[-1].parameters())
    assert all(-1 < loss < 10 for loss in losses)
    assert all((a != b).any() for a, b in zip(before, after, strict=True))
    trainer.on_validation_epoch_start()
    trainer.validation_step(next(trainer.dataloader_val))
    trainer.on_train_end()


@pytest.mark.parametrize(
    ("plans", "pretext"),
    [
        ("pct_plans", "fusion"),
        pytest.param("pct_plans", "masked", marks=pytest.mark.slow),
        pytest.param("fmunet_plans", "fusion+masked", marks=pytest.mark.slow),
    ],
    indirect=["plans"],
)
def test_pretrain_then_finetune_then_predict(plans, pretext, two_epochs, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    results = tmp_path / "results" / DATASET
    run_training(*TRAINING, "VFPretrainTrainer", plans, device=CPU)
    artifact_file = results / f"VFPretrainTrainer__{plans}__3d_fullres" / "fold_0" / "vf_pretrained.pth"
    pretrained = read_artifact(artifact_file)
    assert pretrained["vf"]["settings"]["optimizer"] == "adam"

    run_training(*TRAINING, "VFFinetuneTrainer", plans, pretrained_weights=str(artifact_file), device=CPU)
    model = results / f"VFFinetuneTrainer__{plans}__3d_fullres"
    case = sorted((two_epochs / "raw" / DATASET / "imagesTr").iterdir())[0]
    images, predicted = tmp_path / "images", tmp_path / "predicted"
    images.mkdir()
    predicted.mkdir()
    shutil.copy(case, images)
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    predictor.predict_from_files_sequential(str(images), str(predicted))
    assert (predicted / (case.name.removesuffix("_0000.nii.gz") + ".nii.gz")).is_file()


def test_the_networks_are_fine_tuned_with_their_own_recipe(two_epochs, plans, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_finetune_num_epochs", "100")
    trainer = get_trainer_from_args(*TRAINING, "VFFinetuneTrainer", plans, device=CPU)
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.AdamW
    rates = []
    for epoch in (0, 4, 5, 50, 99):
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] < rates[1] < rates[2] == 1e-3 > rates[3] > rates[4] > 0

    before = [p.detach().clone() for p in trainer.network.parameters()]
    trainer.network(torch.randn(2, 1, 32, 32, 32))[0].mul(1e4).sum().backward()
    trainer.optimizer.step()
    norm = torch.stack([p.grad.norm() for p in trainer.network.parameters() if p.grad is not None]).norm()
    assert norm == pytest.approx(1.0, rel=1e-3)
    assert any((a != b).any() for a, b in zip(before, trainer.network.parameters(), strict=True))


def test_every_value_of_the_recipe_can_be_set(two_epochs, pct_plans, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_finetune_optimizer", "sgd")
    monkeypatch.setenv("nnUNet_vf_finetune_warmup_fraction", "0")
    trainer = get_trainer_from_args(*TRAINING, "VFFinetuneTrainer", pct_plans, device=CPU)
    trainer.initialize()
    assert type(trainer.optimizer) is torch.optim.SGD
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2), "nnU-Net's learning rate for SGD"
    assert trainer.settings.gradient_clip == 1.0
