"""VFPretrainTrainer with the masked and the joint pretext: heads, results, and their use in fine-tuning."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import DATASET_ID, pretrain
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from trainings import make_trainer

from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact

PRETEXTS = {"masked": (0, 1), "fusion+masked": (5, 1)}  # fusion classes, restored channels


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
    np.testing.assert_allclose(last, scores, rtol=1e-6, err_msg="the report is on the samples of the last epoch")
    assert checkpoint["logging"]["mean_fg_dice"][-1] == pytest.approx(np.nanmean(scores))
    log = next(folder.glob("training_log*.txt")).read_text()
    assert f"channel_0: restored share: {report['restored_share']['channel_0']:.4f}" in log
    assert "Share of the variance of the hidden blocks" in (folder / "MODEL_CARD.md").read_text()
    main(["info", str(folder / ARTIFACT_NAME)])
    output = capsys.readouterr().out
    assert f"pretext {pretext}" in output
    assert ("pretext Dice by class" in output) == (classes > 0)
    assert "restored share of the hidden blocks" in output

    monkeypatch.delenv("nnUNet_vf_pretext")  # --val takes the checkpoint's; its heads are others than this run's
    with pytest.raises(SystemExit, match=r"pretext = 'fusion' \(recorded: '" + pretext.replace("+", r"\+")):
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
    settings = {"pretext": pretext, "num_epochs": 3, "iterations_per_epoch": 40, "initial_lr": 0.01, "mask_side": 4}
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


def test_a_patch_of_a_single_block_is_refused(two_epochs, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    monkeypatch.setenv("nnUNet_vf_mask_side", "24")
    message = r"mask_side = 24 is not legal for the patch \[16, 16, 24\]: .* at most 23 \(export nnUNet_vf_mask_side=6"
    with pytest.raises(SystemExit, match=message):
        pretrain()
    with pytest.raises(SystemExit, match=message):
        main(["preview", "-d", str(DATASET_ID), "-p", "nnUNetPlans"])


def test_a_checkpoint_of_one_pretext_is_not_continued_with_another(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_pretext", "masked")
    pretrain()
    monkeypatch.setenv("nnUNet_vf_pretext", "fusion+masked")
    with pytest.raises(SystemExit, match=r"pretext = 'fusion\+masked' \(recorded: 'masked'\)"):
        pretrain(continue_training=True)
