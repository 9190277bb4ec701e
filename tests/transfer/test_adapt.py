"""``nnUNetv2_vf adapt``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET, DATASET_ID, edit_json
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.architectures import build_network
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.target_plans import load_target

PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder")


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "adapted.pth"


def adapt(file: Path, output: Path, *options: str) -> dict:
    """Run the command for the dataset of the tests; return the record ``adapted`` of the artifact it writes."""
    main(["adapt", str(file), "-d", str(DATASET_ID), "-o", str(output), *options])
    return read_artifact(output)["vf"]["adapted"]


def test_weights_are_adapted_to_plans_with_flat_kernels_and_another_stage(artifact, copied_dataset, output, capsys):
    def change(plans):
        plans["plans_name"] = "OtherPlans"
        kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        kwargs["n_stages"] += 1
        for name in PER_STAGE:
            kwargs[name] = [*kwargs[name], kwargs[name][-1]]
        kwargs["kernel_sizes"][0] = [1, 3, 3]
        kwargs["strides"][1] = [1, 2, 2]

    shutil.copy(copied_dataset / "nnUNetPlans.json", copied_dataset / "OtherPlans.json")
    edit_json(copied_dataset / "OtherPlans.json", change)
    record = adapt(artifact, output, "-p", "OtherPlans")
    printed = capsys.readouterr().out
    assert "kernel 3x3x3 -> 1x3x3" in printed
    assert "upsampling 2x2x2 -> 1x2x2" in printed
    assert "not in the pretrained network" in printed
    assert f"nnUNetv2_train 7 3d_fullres 0 -p OtherPlans -tr VFFinetuneTrainer -pretrained_weights {output}" in printed
    assert 0 < record["transferred_share"] < 1
    adapted = read_artifact(output)
    assert adapted["vf"]["dataset"] == DATASET
    assert adapted["vf"]["architecture"]["arch_kwargs"]["kernel_sizes"][0] == [1, 3, 3]
    target = load_target(str(DATASET_ID), "OtherPlans", "3d_fullres")
    network = build_network(target.architecture, target.input_channels, target.num_classes, device="cpu")
    load_pretrained_weights(network, str(output))
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(network.get_parameter(name), adapted["network_weights"][name])


def test_a_checkpoint_of_nnunet_is_adapted(copied_dataset, output, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train"])
    run = (str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer")
    trainer = get_trainer_from_args(*run, device=torch.device("cpu"))
    trainer.initialize()
    checkpoint = output.with_name("checkpoint_final.pth")
    trainer.save_checkpoint(str(checkpoint))
    assert 0 < adapt(checkpoint, output, "--encoder-only")["transferred_share"] < 1


def test_tensors_that_were_left_at_random_stay_recorded_when_adapted_again(artifact, copied_dataset, output, capsys):
    again = output.with_name("again.pth")
    first = adapt(artifact, output, "--encoder-only")
    capsys.readouterr()
    assert adapt(output, again) == first
    assert "come from pretraining; adapt left the others at random" in capsys.readouterr().out
    assert "nnssl_adaptation_plan" not in torch.load(again, weights_only=True)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        ("PCT-Net", [], "holds weights of nnunetv2_vf.pct_net.PCTNet, but 3d_fullres of nnUNetPlans.*--partial"),
        ("U-Net", ["-c", "2d"], "configuration '2d' of .* cannot be used; legal: 3d_fullres"),
        ("U-Net", ["-p", "NoPlans"], "no plans .*there are: [^;]*nnUNetPlans[^;]*$"),
        ("U-Net", ["-p", "VFPlans"], "no plans .*nnUNetv2_vf plan -d 7 --like FILE"),
        ("U-Net", ["-p", "nnUNetPlans.json"], "'nnUNetPlans.json'.*; legal"),
        ("U-Net", ["-p", "BrokenPlans"], "BrokenPlans.json, or dataset.json beside it, cannot be read"),
        ("U-Net", ["-d", "99"], "no dataset 99"),
        ("U-Net", ["-o", "adapted.safetensors"], "this command writes torch's format; name the file adapted.pth"),
        ("U-Net", ["-o", "/nowhere/adapted.pth"], "the folder /nowhere does not exist; make it: mkdir -p /nowhere"),
    ],
)
def test_a_wrong_argument_is_rejected_in_one_line(artifacts, copied_dataset, output, network, options, message):
    (copied_dataset / "BrokenPlans.json").write_text("{bad")
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        adapt(artifacts[network], output, *options)
    assert not output.exists()


def test_other_features_are_rejected_unless_partial_is_given(artifact, copied_dataset, output):
    def widen(plans):
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"][-1] *= 2

    edit_json(copied_dataset / "nnUNetPlans.json", widen)
    with pytest.raises(SystemExit, match=r"have other features than in .* in the file, .* in the plans.*--partial"):
        adapt(artifact, output)
    assert 0 < adapt(artifact, output, "--partial")["transferred_share"] < 1


def test_layers_of_pretraining_stay_recorded_and_are_compared(artifact, copied_dataset, output, capsys):
    content = torch.load(artifact, weights_only=True)
    content["vf"]["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.ReLU"
    torch.save(content, output.with_name("relu.pth"))
    assert adapt(output.with_name("relu.pth"), output)["pretrained_layers"]["nonlin"] == "torch.nn.ReLU"
    assert "nonlin: torch.nn.ReLU in pretraining" in capsys.readouterr().out
    adapt(output, output.with_name("again.pth"))
    assert "nonlin: torch.nn.ReLU in pretraining" in capsys.readouterr().out


def test_random_tensors_are_the_same_every_time_and_the_random_state_is_kept(artifact, copied_dataset, output):
    state = torch.get_rng_state()
    again = output.with_name("again.pth")
    for file in (output, again):
        adapt(artifact, file, "--encoder-only")
    weights, weights_again = (read_artifact(file)["network_weights"] for file in (output, again))
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["vf"].update(spacing=[1.0, 1.0]), r"spacing: \[1.0, 1.0\]; legal: three numbers"),
        (
            lambda content: content["network_weights"].update(
                {name: tensor.sum() for name, tensor in content["network_weights"].items() if name.endswith("weight")}
            ),
            "is damaged: .* tensors have other shapes than in the network that it records",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_and_nothing_is_written(
    artifact, copied_dataset, output, tmp_path, change, message
):
    content = torch.load(artifact, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.pth")
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        adapt(tmp_path / "changed.pth", output)
    assert not output.exists()
