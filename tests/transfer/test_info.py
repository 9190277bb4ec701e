from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID
from foreign_checkpoints import fmunet_release, misfm_release, nnssl_checkpoint
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_vf.cli import main


def describe(capsys, path: Path) -> list[str]:
    capsys.readouterr()  # drop what was printed before
    main(["info", str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    assert lines[0].startswith(f"{path}: ")
    return lines


def test_an_artifact_is_described(artifacts, capsys):
    lines = describe(capsys, artifacts["ResEnc-M"])
    text = "\n".join(lines)
    assert "pretrained with Volume Fusion (nnunetv2 2." in lines[0]
    assert "network: ResidualEncoderUNet, features [4, 8, 16" in text
    assert "1 input channels, 5 output channels" in text
    assert f"data: {DATASET}, 10 cases, 3d_fullres of nnUNetResEncUNetMPlans, fold all" in text
    assert "channels: CT; CTNormalization" in text
    assert "training: 1 epochs x 1 iterations, adam at 0.001, boxes, pairing same" in text
    assert text.count("0.") >= 5, "one Dice for each class"
    assert lines[-1] == f"use: nnUNetv2_vf plan -d ID --like {artifacts['ResEnc-M']}"


def test_an_adapted_artifact_is_described(artifacts, two_epochs, tmp_path, capsys):
    out = tmp_path / "adapted.pth"
    main(["adapt", str(artifacts["U-Net"]), "-d", "7", "-o", str(out), "--encoder-only"])
    lines = describe(capsys, out)
    assert re.search(
        r"pretrained with Volume Fusion, adapted to other plans \(\d\d\.\d% of the weights kept\)", lines[0]
    )
    assert f"adapted: for 3d_fullres of nnUNetPlans of {DATASET}, encoder only, from vf_pretrained.pth" in lines
    assert lines[-1] == (
        f"use: nnUNetv2_train {DATASET} 3d_fullres FOLD -p nnUNetPlans -tr VFFinetuneTrainer -pretrained_weights {out}"
    )


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "VFFinetuneTrainer"])
def test_a_checkpoint_of_nnunet_is_described(two_epochs, copied_dataset, tmp_path, capsys, monkeypatch, trainer):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    training = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, trainer, device=torch.device("cpu"))
    training.on_train_start()
    training.on_epoch_start()
    training.train_step(next(training.dataloader_train))
    training._best_ema = torch.tensor(0.5).numpy()[()]  # a numpy number, as after an epoch
    path = tmp_path / "checkpoint_best.pth"
    training.save_checkpoint(str(path))
    training.on_train_end()
    text = "\n".join(describe(capsys, path))
    assert f"checkpoint of nnU-Net's training with {trainer}" in text
    assert ("under the name nnUNetTrainer" in text) == (trainer == "VFFinetuneTrainer")
    assert "labels: background, lungs, heart" in text
    main(["adapt", str(path), "-d", "7", "-o", str(tmp_path / "adapted.pth")])
    assert "weights trained with nnUNetTrainer, adapted to other plans" in describe(capsys, tmp_path / "adapted.pth")[0]
    assert "6 output channels" in text


def test_a_checkpoint_of_pretraining_is_described(artifacts, capsys):
    lines = describe(capsys, artifacts["U-Net"].with_name("checkpoint_final.pth"))
    assert "VFPretrainTrainer, epochs: 1" in lines[0]
    assert lines[-1] == "use: vf_pretrained.pth beside it; this file is for nnUNetv2_train --c"


@pytest.mark.parametrize(
    ("release", "network"),
    [
        (functools.partial(misfm_release, 1), "PCTNet of resolution mode 1, 2 input channels"),
        (functools.partial(fmunet_release, 2), "FMUNet of resolution mode 2, 2 input channels"),
    ],
)
def test_a_release_of_mis_fm_is_described(tmp_path, capsys, release, network):
    path = tmp_path / "release.pt"
    torch.save({"model_state_dict": release()}, path)
    text = "\n".join(describe(capsys, path))
    assert network in text
    assert f"nnUNetv2_vf convert {path}" in text


def test_a_file_that_looks_like_a_release_of_mis_fm_but_is_none_is_described(tmp_path, capsys):
    path = tmp_path / "release.pt"
    torch.save({"model_state_dict": {"layer.weight": torch.zeros(1)}}, path)
    assert "cannot be converted" in "\n".join(describe(capsys, path))


def test_a_checkpoint_of_nnssl_is_described(tmp_path, capsys):
    path = tmp_path / "checkpoint_final.pth"
    torch.save(nnssl_checkpoint(), path)
    text = "\n".join(describe(capsys, path))
    assert "checkpoint of nnssl's VolumeFusionTrainer" in text
    assert "network: ResidualEncoderUNet" in text
    assert f"nnUNetv2_vf convert {path}" in text


def test_the_entries_of_an_unknown_file_are_listed(tmp_path, capsys):
    path = tmp_path / "other.pth"
    torch.save({"epoch": 3, "state": {}}, path)
    assert "unknown kind of file, a dict of 2 entries: epoch, state" in describe(capsys, path)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": Path("x")}, "loading it would run pathlib"),
        ([1, 2], "holds a list"),
        ({"network_weights": {}, "vf": {}}, "has missing or wrong entries: KeyError 'architecture'"),
        (
            {"network_weights": {}, "init_args": {"plans": {}, "dataset_json": {}}, "trainer_name": "T"},
            "has missing or wrong entries",
        ),
        (b"junk", "it is damaged or is no file of PyTorch"),
        (None, "no file"),
    ],
)
def test_a_file_that_cannot_be_loaded_safely_is_rejected(tmp_path, content, message):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        main(["info", str(path)])


def test_no_code_in_a_file_is_run(tmp_path):
    class Malicious:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"network_weights": {}, "vf": Malicious()}, tmp_path / "evil.pth")
    for command in (["info"], ["convert", "-o", str(tmp_path / "out.pth")], ["plan", "-d", "7", "--like"]):
        with pytest.raises(SystemExit, match="error"):
            main([*command, str(tmp_path / "evil.pth")])
    assert not (tmp_path / "ran").exists()
