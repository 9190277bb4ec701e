"""VFPretrainTrainer with the masked and the joint pretext: heads, results, and their use in fine-tuning."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from conftest import DATASET_ID, edit_json, pretrain
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from trainings import make_trainer

from nnunetv2_vf.cli import main
from nnunetv2_vf.pretext.masking import RestorationTarget, hide
from nnunetv2_vf.pretext.pictures import make_examples
from nnunetv2_vf.pretext.task import PretextBatch
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact

PRETEXTS = {"masked": (0, 1), "fusion+masked": (5, 1)}  # fusion classes, restored channels


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setenv("nnUNet_vf_mask_side", "4")


@pytest.mark.parametrize("pretext", PRETEXTS)
def test_a_training_reports_what_its_pretext_has_learnt(two_epochs, folder, monkeypatch, capsys, pretext):
    classes, channels = PRETEXTS[pretext]
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    pretrain()
    vf = read_artifact(folder / ARTIFACT_NAME)["vf"]
    assert vf["num_classes"] == classes + channels
    assert (len(vf["pretext_dice_per_class"]), len(vf["pretext_restored_share"])) == (classes, channels)
    assert vf["settings"]["mask_fraction"] == {"masked": 0.75, "fusion+masked": 0.3}[pretext]

    report = json.loads((folder / "pretext_report.json").read_text())
    assert (len(report["dice_per_class"]), len(report["restored_share"])) == (classes, channels)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    last = checkpoint["logging"]["dice_per_class_or_region"][-1]
    scores = [*report["dice_per_class"].values(), *report["restored_share"].values()]
    logged = np.clip(scores, 0, 1)  # the report, on the samples of the last epoch, has shares below 0 too
    np.testing.assert_allclose(last, logged, rtol=1e-5)
    assert checkpoint["logging"]["mean_fg_dice"][-1] == pytest.approx(np.nanmean(logged))
    log = next(folder.glob("training_log*.txt")).read_text()
    first = "Dice, a = 0/4: " if classes else "restored share, channel 0: "
    assert log.count(f"Scores: {first}") == 2  # once per epoch
    # in the scores of the last epoch, and in the report
    assert log.count(f"restored share, channel 0: {report['restored_share']['channel_0']:.4f}") == 2
    assert "Share of the variance of the hidden blocks" in (folder / "MODEL_CARD.md").read_text()
    main(["info", str(folder / ARTIFACT_NAME)])
    output = capsys.readouterr().out
    assert f"pretrained with {'Volume Fusion and ' if classes else ''}masked autoencoding" in output
    assert ("pretext Dice by class" in output) == (classes > 0)
    assert "restored share of the hidden blocks" in output

    before = (folder / "pretext_report.json").read_text()
    (folder / "pretext_report.json").unlink()
    pretrain(only_run_validation=True)
    assert (folder / "pretext_report.json").read_text() == before
    monkeypatch.delenv("nnUNet_vf_pretext")  # --val takes the checkpoint's; its heads are others than this run's
    steps = "nnUNet_vf_coefficient_steps=4 " if classes else ""
    values = f"nnUNet_vf_pretext={pretext} {steps}nnUNet_vf_mask_side=4"
    with pytest.raises(SystemExit, match=rf"has other outputs .*; restore them: export {re.escape(values)}$"):
        pretrain(only_run_validation=True)


@pytest.mark.parametrize("pretext", PRETEXTS)
def test_stock_pretrained_weights_take_everything_but_the_heads(two_epochs, folder, monkeypatch, pretext):
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    pretrain()
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer", device=torch.device("cpu"))
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(folder / ARTIFACT_NAME))
    pretrained = read_artifact(folder / ARTIFACT_NAME)["network_weights"]
    for name, tensor in trainer.network.state_dict().items():
        assert ".seg_layers." in name or torch.equal(tensor, pretrained[name]), name


@pytest.mark.parametrize("pretext", PRETEXTS)
def test_the_network_learns_to_restore_hidden_blocks(two_epochs, monkeypatch, pretext):
    settings = {"pretext": pretext, "num_epochs": 3, "iterations_per_epoch": 40, "initial_lr": 0.01}
    for name, value in settings.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    trainer = make_trainer()
    trainer.run_training()
    share = [scores[-1] for scores in trainer.logger.get_value("dice_per_class_or_region", step=None)]
    assert share[-1] > max(0.1, share[0])


def test_the_preview_needs_no_training(two_epochs, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    main(["preview", "-d", str(DATASET_ID), "-p", "nnUNetPlans", "-o", str(tmp_path / "preview.png")])
    assert (tmp_path / "preview.png").is_file()


@pytest.mark.parametrize("output", [float("nan"), 1e6])
def test_a_useless_restoration_counts_as_nothing_restored(two_epochs, monkeypatch, output):
    """nnU-Net's moving average would keep a NaN, and a very negative score would decide which checkpoint is best."""
    monkeypatch.setenv("nnUNet_vf_pretext", "fusion+masked")
    trainer = make_trainer()
    trainer.initialize()
    _, validation = trainer.get_dataloaders()
    with torch.no_grad():
        result = trainer.validation_step(next(validation))
    result["restoration"][:, 3] = output
    trainer.on_validation_epoch_end([result])
    scores = trainer.logger.get_value("dice_per_class_or_region", step=-1)
    assert scores[-1] == 0
    assert trainer.logger.get_value("mean_fg_dice", step=-1) == pytest.approx(np.nanmean(scores))


@pytest.mark.parametrize("pretext", PRETEXTS)
def test_every_channel_is_restored_with_and_without_deep_supervision(copied_dataset, monkeypatch, pretext):
    names = {"0": "CT", "1": "PET", "2": "T1"}
    edit_json(copied_dataset / "dataset.json", lambda content: content.update(channel_names=names))
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    classes, _ = PRETEXTS[pretext]
    for deep_supervision in (True, False):
        trainer = make_trainer()
        trainer.enable_deep_supervision = deep_supervision
        trainer.initialize()
        generator = torch.Generator().manual_seed(0)
        volume = torch.randn(2, 3, 16, 16, 24, generator=generator)
        target = RestorationTarget(volume, torch.rand(2, 16, 16, 24, generator=generator) < 0.5)
        fusion_map = torch.zeros(2, 16, 16, 24, dtype=torch.uint8) if classes else None
        output = trainer.network(hide(target))
        loss = trainer._compute_loss(output, PretextBatch(hide(target), fusion_map, target))
        loss.backward()
        assert loss.isfinite()
        assert trainer._full_resolution(output).shape == (2, classes + 3, 16, 16, 24)
        head = trainer.network.decoder.seg_layers[-1].weight.grad
        assert (head.flatten(1).abs().sum(1) > 0).all()


def test_restored_outputs_of_deep_supervision_have_the_weights_of_nnunet(two_epochs, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    trainer = make_trainer()
    trainer.initialize()
    weights = trainer.loss.restoration_loss.scale_weights
    assert len(weights) == len(trainer._get_deep_supervision_scales()) > 1
    halved = np.array([0.5**scale for scale in range(len(weights) - 1)] + [0])
    np.testing.assert_allclose(weights, halved / halved.sum())


def test_a_patch_of_a_few_blocks_is_refused(two_epochs, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    monkeypatch.setenv("nnUNet_vf_mask_side", "16")
    message = (
        r"mask_side = 16 is not legal for the patch \[16, 16, 24\]: number of its blocks: 2; .* \(export "
        "nnUNet_vf_mask_side=8"
    )
    with pytest.raises(SystemExit, match=message):
        pretrain()
    with pytest.raises(SystemExit, match=message):
        main(["preview", "-d", str(DATASET_ID), "-p", "nnUNetPlans"])


def test_weights_of_another_pretext_are_not_replaced(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    pretrain()
    before = (folder / ARTIFACT_NAME).read_bytes()
    monkeypatch.setenv("nnUNet_vf_pretext", "fusion")
    message = r"pretext = masked, and .* pretext = fusion would replace it; .* \(export nnUNet_results=FOLDER\)"
    with pytest.raises(SystemExit, match=message):
        pretrain()
    pretrain(disable_checkpointing=True)  # replaces nothing
    assert (folder / ARTIFACT_NAME).read_bytes() == before
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    monkeypatch.setenv("nnUNet_vf_seed", "1")
    trainer = make_trainer()
    trainer.on_train_start()
    trainer.save_checkpoint(str(folder / "checkpoint_best.pth"))
    assert (folder / ARTIFACT_NAME).read_bytes() == before, "the final checkpoint, too, is still the earlier one"
    pretrain()  # as in nnU-Net, a new training replaces an earlier one when it ends
    assert (folder / ARTIFACT_NAME).read_bytes() != before


def test_the_picture_shows_visible_voxels_beside_restored_ones():
    settings = VFSettings(pretext="masked")
    volume = torch.arange(64.0).reshape(1, 1, 4, 4, 4)
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    mask[..., 2:] = True
    batch = {"tensors": {"volume": volume, "mask": mask}, "cases": [["a"]]}
    (example,) = make_examples(batch, settings, torch.device("cpu"), lambda data: torch.full_like(data, -1))
    restored = example.volumes["hidden blocks restored"]
    assert (restored[..., :2] == volume[0, 0, ..., :2].numpy()).all()
    assert (restored[..., 2:] == -1).all()


def test_a_checkpoint_of_one_pretext_is_not_continued_with_another(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    pretrain()
    monkeypatch.setenv("nnUNet_vf_pretext", "fusion+masked")
    with pytest.raises(SystemExit, match=r"pretext = 'fusion\+masked' \(recorded: 'masked'\)"):
        pretrain(continue_training=True)
