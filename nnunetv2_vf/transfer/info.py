"""``nnUNetv2_vf info``: describe a file of weights in at most ten lines, without running code that it may hold."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.fmunet import FMUNET_PATH
from nnunetv2_vf.pct_net import PCT_NET_PATH
from nnunetv2_vf.transfer.architectures import can_be_planned, is_known, network_name
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME
from nnunetv2_vf.transfer.convert_misfm import convert_state_dict
from nnunetv2_vf.transfer.convert_nnssl import convert_nnssl_checkpoint, is_nnssl_checkpoint
from nnunetv2_vf.transfer.metadata import (
    describe_nnunet_checkpoint,
    describe_pretext,
    format_spacing,
    is_nnunet_checkpoint,
)
from nnunetv2_vf.transfer.pretrained_weights import describe_origin
from nnunetv2_vf.transfer.safe_loading import load_safely, malformed_file_errors
from nnunetv2_vf.transfer.shared_tensors import storage_key
from nnunetv2_vf.transfer.suggested_commands import finetune_command


def describe_file(path: Path) -> str:
    """Describe an artifact, or a checkpoint of nnU-Net, nnssl or MIS-FM.

    Raises:
        UserError: the file cannot be loaded safely or has missing or wrong entries.
    """
    content = load_safely(path)
    with malformed_file_errors(path):
        return "\n".join(printable(line) for line in _describe(path, content))


def _describe(path: Path, content: Mapping[str, Any]) -> list[str]:
    if "vf" in content and "network_weights" in content:
        return _describe_artifact(path, content)
    if is_nnunet_checkpoint(content):
        return _describe_nnunet_checkpoint(path, content)
    if is_nnssl_checkpoint(content):
        return _describe_nnssl_checkpoint(path, content)
    if isinstance(content.get("model_state_dict"), dict):
        return _describe_misfm_release(path, content["model_state_dict"])
    keys = ", ".join(sorted(map(str, content))[:10])
    return [f"{path}: unknown kind of file, a dict of {len(content)} entries: {keys}"]


def _describe_artifact(path: Path, content: Mapping[str, Any]) -> list[str]:
    metadata = content["vf"]
    origin, adapted = metadata.get("converted_from"), metadata.get("adapted")
    training = f"pretrained with {describe_pretext(metadata)}"
    if origin:
        training = f"converted from {origin['project']}, {origin['file']}"
    elif "trainer" in metadata:
        training = f"trained with {metadata['trainer']}"
    if metadata.get("pretrained"):
        training += f", starting from {describe_origin(metadata['pretrained'])}"
    if "hub" in metadata:
        training += f", from {metadata['hub']} on the Hugging Face Hub"
    if adapted:
        training += f", adapted to other plans ({adapted['transferred_share']:.1%} of the weights kept)"
    versions = ", ".join(f"{name} {version}" for name, version in metadata.get("versions", {}).items())
    lines = [
        f"{path}: weights {training} ({versions})",
        _describe_network(metadata, content["network_weights"]),
        *_describe_data(metadata),
    ]
    if "settings" in metadata:
        settings, dice = metadata["settings"], metadata["pretext_dice_per_class"]
        share = metadata.get("pretext_restored_share", [])  # older files have none
        lines += [
            f"training: {settings['num_epochs']} epochs x {settings['iterations_per_epoch']} iterations, "
            f"{settings['optimizer']} at {settings['initial_lr']:g}"
            + (f", {settings['fusion_map']}, pairing {settings['pairing']}" if dice else "")
            + (f", {settings['mask_fraction']:.0%} hidden in blocks of side {settings['mask_side']}" if share else ""),
            *([f"pretext Dice by class: {', '.join(f'{value:.3f}' for value in dice)}"] if dice else []),
            *([f"restored share of the hidden blocks: {', '.join(f'{v:.3f}' for v in share)}"] if share else []),
        ]
    file = shlex.quote(str(path))
    if adapted:
        target = adapted["for"]
        part = "encoder only, " if adapted["encoder_only"] else ""
        lines += [
            f"adapted: for {target['configuration']} of {target['plans']} of {target['dataset']}, {part}"
            f"from {adapted['from']}",
            f"use: {finetune_command(target['dataset'], target['configuration'], 'FOLD', target['plans'], path)}",
        ]
    elif can_be_planned(metadata["architecture"]):
        lines.append(f"use: nnUNetv2_vf plan -d ID --like {file}")
    elif is_known(metadata["architecture"]):
        lines.append("use: not with nnUNetv2_train, which needs networks with deep supervision and patches of any size")
    else:
        lines.append(f"use: {_same_network_hint(path)}")
    return lines


def _describe_nnunet_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    metadata = describe_nnunet_checkpoint(checkpoint)
    finetuning = checkpoint.get("volume_fusion")  # the entry of VFFinetuneTrainer
    trainer = metadata["trainer"]
    if finetuning:
        trainer = f"{finetuning['trainer']}, under the name {trainer}"
    lines = [
        f"{path}: checkpoint of nnU-Net's training with {trainer}, epochs: {checkpoint['current_epoch']}",
        _describe_network(metadata, checkpoint["network_weights"]),
        *_describe_data(metadata),
        f"labels: {', '.join(checkpoint['init_args']['dataset_json']['labels'])}",
    ]
    if finetuning and finetuning["pretrained"]:
        pretrained = finetuning["pretrained"]
        lines.append(f"pretrained: {describe_origin(pretrained)}")
    if metadata["trainer"] == "VFPretrainTrainer":
        lines.append(f"use: {ARTIFACT_NAME} beside it; this file is for nnUNetv2_train --c")
    elif can_be_planned(metadata["architecture"]):
        lines.append(
            "use: nnUNetv2_predict; or as pretrained weights: nnUNetv2_vf plan -d ID --like, nnUNetv2_vf adapt"
        )
    else:
        lines.append(f"use: nnUNetv2_predict; or as pretrained weights, {_same_network_hint(path)}")
    return lines


def _describe_nnssl_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    first_line = f"{path}: checkpoint of nnssl's {checkpoint.get('trainer_name', 'training')}"
    try:
        weights, metadata = convert_nnssl_checkpoint(checkpoint)
    except UserError as error:
        return [first_line, f"cannot be converted: {error}"]
    return [first_line, _describe_network(metadata, weights), *_describe_data(metadata), _convert_hint(path)]


def _describe_misfm_release(path: Path, state_dict: Mapping[str, Any]) -> list[str]:
    first_line = f"{path}: checkpoint with a 'model_state_dict', as in releases of MIS-FM"
    try:
        return [first_line, str(convert_state_dict(state_dict)), _convert_hint(path)]
    except UserError as error:
        return [first_line, f"cannot be converted: {error}"]


def _same_network_hint(path: Path) -> str:
    """Return how to use weights that plan --like and adapt refuse: 2D networks and networks of the user's own."""
    command = finetune_command("DATASET", "CONFIGURATION", "FOLD", "PLANS", path)
    return f"only with plans of the same network (plan --like and adapt refuse it): {command}"


def _convert_hint(path: Path) -> str:
    return f"use: nnUNetv2_vf convert {shlex.quote(str(path))} -o OUT.pth"


def _describe_network(metadata: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    architecture = metadata["architecture"]
    kwargs = architecture["arch_kwargs"]
    # A tensor with several names counts once.
    parameters = sum({storage_key(tensor): tensor.numel() for tensor in weights.values()}.values())
    features = f"features {kwargs['features_per_stage']}, " if "features_per_stage" in kwargs else ""
    depth = f"depth {kwargs['depth']}, " if "depth" in kwargs else ""
    return (
        f"network: {network_name(architecture)}{_describe_mode(architecture)}, {features}{depth}"
        f"{parameters / 1e6:.1f} M parameters, {metadata['num_input_channels']} input channels, "
        f"{metadata['num_classes']} output channels"
    )


def _describe_mode(architecture: Mapping[str, Any]) -> str:
    """Return the resolution mode of PCT-Net or FMUNet; nothing for other networks."""
    strides = [list(stride) for stride in architecture["arch_kwargs"].get("strides", ()) if not isinstance(stride, int)]
    modes = [[list(stride) for stride in mode] for mode in MODES]
    is_of_misfm = architecture["network_class_name"] in (PCT_NET_PATH, FMUNET_PATH)
    return f" of resolution mode {modes.index(strides)}" if is_of_misfm and strides in modes else ""


def _describe_data(metadata: Mapping[str, Any]) -> list[str]:
    """Return a line for each of dataset, channels and patch that the metadata hold."""
    lines = []
    if "dataset" in metadata:
        line = f"data: {metadata['dataset']}"
        if "num_cases" in metadata:
            line += f", {metadata['num_cases']} cases"
        if "plans" in metadata:
            plans_name = metadata["plans"]["plans_name"]
            line += f", {metadata['configuration']} of {plans_name}, fold {metadata['fold']}"
        lines.append(line)
    if metadata.get("normalization_schemes"):
        names = metadata.get("channel_names")
        channels = f"{', '.join(names.values())}; " if names else ""
        lines.append(f"channels: {channels}{', '.join(metadata['normalization_schemes'])}")
    if metadata.get("patch_size"):
        line = f"patch: {' x '.join(map(str, metadata['patch_size']))} voxels"
        if metadata.get("spacing"):
            line += f" of {format_spacing(metadata['spacing'])}"
        lines.append(line)
    return lines
