from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import build_network
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.network_fit import mismatched_tensors, require_fit
from nnunetv2_vf.transfer.suggested_commands import adapt_command, adapted_file_name, plan_like_command

PER_STAGE = ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder")


def rejection(file: Path, target) -> str:
    """Return the message with which the weights of a file are rejected."""
    with pytest.raises(UserError) as error:
        require_fit(file, read_artifact(file), target)
    return str(error.value)


def test_weights_fit_the_plans_of_pretraining(artifact, target):
    require_fit(artifact, read_artifact(artifact), target)


def test_mismatched_tensors_are_those_that_nnunet_would_refuse(artifact, target):
    weights = read_artifact(artifact)["network_weights"]
    network = build_network(target.architecture, 1, 7)  # another number of classes changes only the heads
    assert mismatched_tensors(weights, network) == []
    incomplete = {name: tensor for name, tensor in weights.items() if "transpconvs.0" not in name}
    missing = ["decoder.transpconvs.0.weight", "decoder.transpconvs.0.bias"]
    assert mismatched_tensors(incomplete, network) == missing


def test_other_features_are_rejected_with_both_values_and_a_plan_command(artifact, target, change_target):
    features = target.architecture["arch_kwargs"]["features_per_stage"]
    wider = [2 * count for count in features]
    message = rejection(artifact, change_target(arch_kwargs={"features_per_stage": wider}))
    assert f"features_per_stage {features} in the file, {wider} in the plans" in message
    assert message.endswith(f"plan with the pretrained network: nnUNetv2_vf plan -d 7 --like {artifact}")
    assert "nnUNetv2_vf adapt" not in message, "adapt would refuse these weights"


def test_fewer_stages_are_rejected_with_an_adapt_command(artifact, target, change_target):
    kwargs = target.architecture["arch_kwargs"]
    shallower = {name: kwargs[name][:-1] for name in PER_STAGE} | {"n_stages": kwargs["n_stages"] - 1}
    assert "nnUNetv2_vf adapt" in rejection(artifact, change_target(arch_kwargs=shallower))


def test_other_kernels_are_rejected_with_both_commands(artifact, target, change_target):
    stages = target.architecture["arch_kwargs"]["n_stages"]
    message = rejection(artifact, change_target(arch_kwargs={"kernel_sizes": [[1, 3, 3]] * stages}))
    assert f"nnUNetv2_vf adapt {artifact} -d 7 -p nnUNetPlans -c 3d_fullres -o vf_pretrained_for_7.pth" in message
    assert f"nnUNetv2_vf plan -d 7 --like {artifact}" in message


def test_other_channels_are_rejected_with_an_adapt_command_only(artifact, change_target):
    message = rejection(artifact, change_target(["CT", "PET"]))
    assert "input channels 1 in the file, 2 in the plans; adapt the weights: nnUNetv2_vf adapt" in message
    assert "--like" not in message


def test_weights_without_metadata_are_rejected_with_the_name_of_a_tensor(artifact, target, change_target):
    bare_weights = {"network_weights": read_artifact(artifact)["network_weights"], "vf": {}}
    stages = target.architecture["arch_kwargs"]["n_stages"]
    with pytest.raises(UserError, match="tensors are missing or have another shape, for example encoder"):
        require_fit(artifact, bare_weights, change_target(arch_kwargs={"n_conv_per_stage": [3] * stages}))


def test_suggested_commands_quote_file_names_and_never_overwrite_the_input(target):
    words = shlex.split(adapt_command(Path("my weights.pth"), target))
    assert words[:3] == ["nnUNetv2_vf", "adapt", "my weights.pth"]
    assert words[-2:] == ["-o", "my weights_for_7.pth"]
    assert shlex.split(plan_like_command("my weights.pth", target))[-1] == "my weights.pth"
    assert adapted_file_name(Path("w_for_7.pth"), 7) != "w_for_7.pth"
