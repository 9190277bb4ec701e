"""``nnUNetv2_vf adapt``: write pretrained weights in the form that the target's plans need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import build_network, can_be_planned
from nnunetv2_vf.transfer.artifact import read_with_architecture, require_writable, write_artifact
from nnunetv2_vf.transfer.differences import layers_without_shape
from nnunetv2_vf.transfer.metadata import package_versions
from nnunetv2_vf.transfer.suggested_commands import plan_like_command
from nnunetv2_vf.transfer.target_plans import TargetPlans
from nnunetv2_vf.transfer.weight_transfer import (
    RANDOM,
    TensorOutcome,
    format_table,
    transfer_weights,
    transferred_share,
)

_SEED = 0  # for the tensors that are left at random


def adapt_file(
    pretrained_file: Path, target: TargetPlans, output: Path, partial: bool = False, encoder_only: bool = False
) -> str:
    """Adapt pretrained weights to a target's plans.

    Args:
        pretrained_file: an artifact, or a checkpoint of nnU-Net.
        output: the artifact to write; stock ``-pretrained_weights`` accepts it for ``target``.
        partial: if True, tensors with another number of features are left at random; otherwise they are an error.
        encoder_only: if True, the decoder is left at random, as in nnssl's fine-tuning.

    Returns:
        a table of what was transferred, adapted and left at random.

    Raises:
        UserError: a file cannot be read or written, or the networks differ in their class or features.
    """
    require_writable(output, pretrained_file)
    artifact = read_with_architecture(pretrained_file)
    metadata = artifact["vf"]
    if not partial:
        _require_same_class(pretrained_file, metadata, target)
    network = _build_with_fixed_seed(target, metadata["num_classes"])
    random_tensors = frozenset(metadata.get("adapted", {}).get("left_at_random", ()))
    outcomes = transfer_weights(artifact["network_weights"], network, encoder_only, random_tensors)
    if not partial:
        _require_same_features(pretrained_file, metadata, target, outcomes)
    changed = {
        "architecture": target.architecture,
        "num_input_channels": target.input_channels,
        "adapted": _describe_adaptation(pretrained_file.name, metadata, target, outcomes, encoder_only),
        "versions": package_versions(),
    }
    write_artifact(output, network.state_dict(), {**metadata, **changed})
    return format_table(outcomes)


def _describe_adaptation(
    file_name: str,
    metadata: Mapping[str, Any],
    target: TargetPlans,
    outcomes: Sequence[TensorOutcome],
    encoder_only: bool,
) -> dict[str, Any]:
    """Return the entry ``adapted`` of the new metadata. It also covers earlier adaptations of the same weights."""
    earlier = metadata.get("adapted", {})
    return {
        "from": earlier.get("from", file_name),
        "for": {
            "dataset": target.plans_manager.dataset_name,
            "plans": target.plans_manager.plans_name,
            "configuration": target.configuration_name,
        },
        "pretrained_layers": earlier.get("pretrained_layers", layers_without_shape(metadata["architecture"])),
        "pretrained_input_channels": earlier.get("pretrained_input_channels", metadata["num_input_channels"]),
        "encoder_only": encoder_only or earlier.get("encoder_only", False),
        "transferred_share": transferred_share(outcomes),
        "left_at_random": [outcome.name for outcome in outcomes if outcome.kind == RANDOM],
    }


def _require_same_class(file: Path, metadata: Mapping[str, Any], target: TargetPlans) -> None:
    pretrained, planned = metadata["architecture"]["network_class_name"], target.architecture["network_class_name"]
    if pretrained != planned:
        raise UserError(
            f"{file} holds weights of {pretrained}, but {target} has {planned}; {_hint(file, metadata, target)}"
        )


def _require_same_features(
    file: Path, metadata: Mapping[str, Any], target: TargetPlans, outcomes: Sequence[TensorOutcome]
) -> None:
    mismatched = [outcome for outcome in outcomes if not outcome.fits]
    if mismatched:
        first = mismatched[0]
        raise UserError(
            f"{len(mismatched)} tensors of {target} have other features than in {file}, for example {first.name} "
            f"({first.detail}); {_hint(file, metadata, target)}"
        )


def _hint(file: Path, metadata: Mapping[str, Any], target: TargetPlans) -> str:
    transfer_what_fits = "transfer only the tensors that fit: --partial"
    if can_be_planned(metadata["architecture"]):
        return f"plan with the pretrained network: {plan_like_command(file, target)}; or {transfer_what_fits}"
    return transfer_what_fits


def _build_with_fixed_seed(target: TargetPlans, num_classes: int) -> nn.Module:
    """Build the target's network with the same initial weights every time; the random state of the caller is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build_network(target.architecture, target.input_channels, num_classes, device="cpu")
