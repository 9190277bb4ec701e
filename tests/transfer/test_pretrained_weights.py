"""``-pretrained_weights`` of training commands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.architectures import build_network
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact
from nnunetv2_vf.transfer.pretrained_weights import PretrainedWeights, are_same_weights, pretrained_weights_argument

COMMAND = ["nnUNetv2_train", str(DATASET_ID), "3d_fullres", "0", "-tr", "VFFinetuneTrainer"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["nnUNetv2_train", "7", "3d_fullres", "0", "-pretrained_weights", "w.pth", "-p", "PCTNetPlans"], "w.pth"),
        (["/bin/nnUNetv2_train", "7", "-p", "PCTNetPlans", "-pretrained_weights=w.pth", "--npz"], "w.pth"),
        (["run_training.py", "7", "-pretrained_weights", "w.pth"], "w.pth"),
        (["nnUNetv2_train", "7", "3d_fullres", "0", "-p", "PCTNetPlans", "-tr", "T", "--c"], None),
        (["nnUNetv2_train", "-pretrained_weights"], None),
        (["another_program", "-pretrained_weights", "w.pth"], None),
        (["another_program", "-pretrained", "w.pth", "-p", "x"], None),
        ([""], None),
    ],
)
def test_the_file_is_found_in_the_command_line(command, expected):
    assert pretrained_weights_argument(command) == (expected and Path(expected))


def test_weights_are_copied_as_nnunet_copies_them(artifact):
    architecture = read_artifact(artifact)["vf"]["architecture"]
    network, expected = (build_network(architecture, 1, 3, device="cpu") for _ in range(2))
    expected.load_state_dict(network.state_dict())
    PretrainedWeights(artifact, {}).copy_into(network)
    load_pretrained_weights(expected, str(artifact))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name


def make_trainer(monkeypatch, *options: str, continue_training: bool = False, name: str = "VFFinetuneTrainer"):
    """Return a trainer for a command line with these options, as nnUNetv2_train makes it."""
    monkeypatch.setattr(sys, "argv", [*COMMAND, *options])
    weights = options[1] if "-pretrained_weights" in options and not continue_training else None
    cpu = torch.device("cpu")
    run = (str(DATASET_ID), "3d_fullres", 0, name, "nnUNetPlans")
    trainer = get_trainer_from_args(*run, continue_training=continue_training, device=cpu)
    maybe_load_checkpoint(trainer, continue_training, False, weights)
    return trainer


def test_weights_that_do_not_fit_end_the_training_before_anything_is_written(
    artifacts, copied_dataset, tmp_path, monkeypatch
):
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: .* does not fit 3d_fullres of nnUNetPlans.*--like"):
        make_trainer(monkeypatch, "-pretrained_weights", str(artifacts["PCT-Net"]))
    assert not (tmp_path / "results").exists()


def test_a_missing_file_ends_the_training_before_anything_is_written(copied_dataset, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: no file /nowhere.pth"):
        make_trainer(monkeypatch, "-pretrained_weights", "/nowhere.pth")
    assert not (tmp_path / "results").exists()


def test_differences_are_logged_and_checkpoints_record_the_weights(artifact, copied_dataset, tmp_path, monkeypatch):
    edited = tmp_path / "edited.pth"
    content = torch.load(artifact, weights_only=True)
    content["vf"]["channel_names"] = {"0": "T1"}
    torch.save(content, edited)
    trainer = make_trainer(monkeypatch, "-pretrained_weights", str(edited))
    trainer.run_training()
    fold = Path(trainer.output_folder)
    (log,) = fold.glob("training_log_*.txt")
    assert (
        f"Pretrained weights: edited.pth, pretext fusion, trained on {DATASET}\n  channels: T1 in pretraining, CT here"
        in log.read_text()
    )
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    record = checkpoint["volume_fusion"]
    assert record["trainer"] == "VFFinetuneTrainer"
    assert record["settings"]["num_epochs"] == 2
    assert record["pretrained"]["file"] == "edited.pth", "without its folder, since models are shared"
    assert record["pretrained"]["dataset"] == DATASET


def test_a_training_from_other_weights_is_not_replaced(artifact, copied_dataset, tmp_path, monkeypatch):
    trainer = make_trainer(monkeypatch, "-pretrained_weights", str(artifact))
    fold = Path(trainer.output_folder)
    trainer.save_checkpoint(str(fold / "checkpoint_final.pth"))
    before = (fold / "checkpoint_final.pth").read_bytes()
    make_trainer(monkeypatch, "-pretrained_weights", str(artifact)).on_train_start()

    other = tmp_path / "other" / artifact.name  # of the same dataset, with the same name
    other.parent.mkdir()
    content = torch.load(artifact, weights_only=True)
    content["network_weights"] = {name: tensor + 1 for name, tensor in content["network_weights"].items()}
    torch.save(content, other)
    for options, now in ((["-pretrained_weights", str(other)], "from .* with other content"), ([], "from scratch")):
        trainer = make_trainer(monkeypatch, *options)
        message = rf"was trained from vf_pretrained.pth.*; a training {now} would replace it"
        with pytest.raises(SystemExit, match=message):
            trainer.run_training()
        assert "would replace it" in Path(trainer.log_file).read_text()
    assert (fold / "checkpoint_final.pth").read_bytes() == before


@pytest.mark.parametrize("name", ["VFFinetuneTrainer", "VFPretrainTrainer"])
def test_a_training_is_continued_only_with_the_weights_of_its_start(
    artifact, copied_dataset, tmp_path, monkeypatch, name
):
    """torchrun repeats the whole command, with -pretrained_weights; nnUNetv2_train refuses them together with --c."""
    trainer = make_trainer(monkeypatch, "-pretrained_weights", str(artifact), name=name)
    trainer.on_train_start()
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    other = tmp_path / "other.pth"
    content = torch.load(artifact, weights_only=True)
    content["network_weights"] = {name: tensor + 1 for name, tensor in content["network_weights"].items()}
    torch.save(content, other)
    for file in (artifact, tmp_path / "gone.pth"):
        make_trainer(monkeypatch, "-pretrained_weights", str(file), continue_training=True, name=name)
    message = r"checkpoint_latest.pth was trained from vf_pretrained.pth.*, not from other.pth.*: leave out -pretrained"
    with pytest.raises(SystemExit, match=message):
        make_trainer(monkeypatch, "-pretrained_weights", str(other), continue_training=True, name=name)


def test_of_several_weights_the_last_counts_as_in_nnunet():
    command = ["nnUNetv2_train", "7", "-pretrained_weights", "a.pth", "-pretrained_weights=b.pth"]
    assert pretrained_weights_argument(command) == Path("b.pth")


def test_records_of_earlier_versions_are_compared_by_their_origin():
    earlier = {"file": "a.pth", "dataset": "D"}
    assert are_same_weights(earlier, {**earlier, "sha256": "1", "pretext": "fusion"})
    assert not are_same_weights(earlier, {"file": "b.pth", "dataset": "D", "sha256": "1"})


def test_a_continued_training_keeps_the_record(artifact, copied_dataset, monkeypatch):
    trainer = make_trainer(monkeypatch, "-pretrained_weights", str(artifact))
    trainer.on_train_start()
    folder = Path(trainer.output_folder)
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    continued = make_trainer(monkeypatch, "--c", continue_training=True)
    continued.run_training()
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert final["volume_fusion"]["pretrained"]["file"] == "vf_pretrained.pth"
    assert final["current_epoch"] == 2


def test_a_pretraining_from_other_weights_names_them_also_after_it_was_continued(
    artifact, two_epochs, monkeypatch, capsys
):
    name = "VFPretrainTrainer"
    trainer = make_trainer(monkeypatch, "-pretrained_weights", str(artifact), name=name)
    trainer.on_train_start()
    folder = Path(trainer.output_folder)
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    make_trainer(monkeypatch, "--c", continue_training=True, name=name).run_training()
    origin = f"vf_pretrained.pth, pretext fusion, trained on {DATASET}"
    logs = "".join(log.read_text() for log in folder.glob("training_log_*.txt"))
    assert logs.count(f"Pretrained weights: {origin}") == 2
    assert read_artifact(folder / ARTIFACT_NAME)["vf"]["pretrained"]["dataset"] == DATASET
    started = "The training started from other weights, whose licence and data count too"
    assert f"{started}: {origin}." in (folder / "MODEL_CARD.md").read_text()
    main(["info", str(folder / ARTIFACT_NAME)])
    assert f"starting from {origin}" in capsys.readouterr().out
