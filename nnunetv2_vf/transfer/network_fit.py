"""Check that the network of plans can be trained, and that pretrained weights fit it, as nnU-Net will require."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.architectures import (
    build_network,
    can_be_planned,
    canonical_layer,
    complete_arguments,
    is_known,
    network_name,
)
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.suggested_commands import adapt_command, plan_like_command
from nnunetv2_vf.transfer.target_plans import TargetPlans

_NETWORK, _INPUT_CHANNELS = "network", "input channels"
_NOT_ADAPTABLE = {_NETWORK, "conv_op", "num_heads"}


def require_trainable(target: TargetPlans) -> None:
    """Raise UserError unless the network of the plans can be built and takes the patch of the plans.

    Only networks that the package knows are checked: the code of others may do anything.
    """
    with malformed_file_errors(str(target)):
        if can_be_planned(target.architecture):
            _require_patch_fits(target)


def _require_patch_fits(target: TargetPlans) -> None:
    patch = [int(side) for side in target.configuration.patch_size]
    network = build_network(target.architecture, target.input_channels, target.num_classes)
    network.eval()  # the batch norms of PCT-Net cannot train with the single sample of this test
    try:
        with torch.no_grad():
            network(torch.empty(1, target.input_channels, *patch, device="meta"))
    except (ValueError, RuntimeError) as error:
        reason = printable(str(error))
        raise UserError(
            f"{network_name(target.architecture)} cannot take the patch_size {patch} of {target}: {reason}; change "
            "patch_size in the plans file, or plan again"
        ) from error


def require_fit(file: Path, pretrained: Mapping[str, Any], target: TargetPlans) -> None:
    """Raise UserError unless stock ``-pretrained_weights`` accepts the weights for the target's plans.

    Args:
        file: for the message.
        pretrained: the content of the file, from :func:`nnunetv2_vf.transfer.artifact.read_pretrained`.
    """
    previous_stage = pretrained["vf"].get("previous_stage")
    if previous_stage and target.configuration.previous_stage_name is None:
        raise UserError(
            f"{file} is the second stage of a cascade, whose input has labels beside the images, and does not fit "
            f"{target}; legal: the checkpoint of {previous_stage} or of 3d_fullres"
        )
    network = build_network(target.architecture, target.input_channels, target.num_classes)
    mismatched = mismatched_tensors(pretrained["network_weights"], network)
    if not mismatched:
        return
    differences = network_differences(pretrained["vf"], target)
    reason = "; ".join(f"{name} {old} in the file, {new} in the plans" for name, (old, new) in differences.items())
    if not reason:
        reason = f"{len(mismatched)} tensors are missing or have another shape, for example {mismatched[0]}"
    hint = "; or ".join(_suggest_commands(file, pretrained["vf"], target, differences))
    raise UserError(f"{file} does not fit {target}: {reason}; {hint}")


def mismatched_tensors(weights: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """Return the tensors of ``network``, without its heads, that ``weights`` lack or have in another shape."""
    return [
        name
        for name, tensor in network.state_dict().items()
        if HEADS not in name and (name not in weights or weights[name].shape != tensor.shape)
    ]


def network_differences(metadata: Mapping[str, Any], target: TargetPlans) -> dict[str, tuple[Any, Any]]:
    """Compare the networks of pretraining and target.

    Returns:
        name of each argument that differs -> (pretrained value, target value); empty if the metadata hold no network.
    """
    if "architecture" not in metadata:
        return {}
    pretrained, planned = metadata["architecture"], target.architecture
    pairs = {
        _NETWORK: (pretrained["network_class_name"], planned["network_class_name"]),
        _INPUT_CHANNELS: (metadata["num_input_channels"], target.input_channels),
    }
    if pretrained["network_class_name"] == planned["network_class_name"]:
        old_arguments, new_arguments = complete_arguments(pretrained), complete_arguments(planned)
        names = sorted({*old_arguments, *new_arguments})
        pairs |= {name: (old_arguments.get(name), new_arguments.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if canonical_layer(old) != canonical_layer(new)}


def _suggest_commands(
    file: Path, metadata: Mapping[str, Any], target: TargetPlans, differences: Mapping[str, tuple[Any, Any]]
) -> list[str]:
    commands = []
    only_channels_differ = differences.keys() == {_INPUT_CHANNELS}
    if differences and not only_channels_differ and can_be_planned(metadata["architecture"]):  # keeps all weights
        commands.append(f"plan with the pretrained network: {plan_like_command(file, target)}")
    if differences and _can_be_adapted(metadata, target, differences):
        commands.append(f"adapt the weights: {adapt_command(file, target)}")
    return commands or [f"see what the file holds: nnUNetv2_vf info {shlex.quote(str(file))}"]


def _can_be_adapted(
    metadata: Mapping[str, Any], target: TargetPlans, differences: Mapping[str, tuple[Any, Any]]
) -> bool:
    # adapt refuses networks of the user's own, and the second stage of a cascade, whose additional input channels are
    # no images.
    if not is_known(metadata["architecture"]) or target.configuration.previous_stage_name is not None:
        return False
    pretrained_features, planned_features = differences.get("features_per_stage", ((), ()))
    common_stages = zip(pretrained_features, planned_features, strict=False)
    return not differences.keys() & _NOT_ADAPTABLE and all(old == new for old, new in common_stages)
