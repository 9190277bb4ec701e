"""What a file of weights is, in at most ten lines, without running anything it may hold."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer import convert_nnssl as nnssl
from nnunetv2_vf.transfer.artifact import FILE_NAME, describe_checkpoint, is_checkpoint, load_safely, storage_key
from nnunetv2_vf.transfer.convert_misfm import convert_state_dict
from nnunetv2_vf.transfer.safe_loading import as_described, can_be_planned


def describe_file(path: Path) -> str:
    """Describe an artifact, an nnU-Net checkpoint, or a checkpoint of MIS-FM or nnssl.

    Raises:
        UserError: there is no such file, or it would have to run code to be read.
    """
    content = load_safely(path)
    with as_described(path):
        return "\n".join(printable(line) for line in _describe(path, content))


def _describe(path: Path, content: Mapping[str, Any]) -> list[str]:
    if "vf" in content and "network_weights" in content:
        return _artifact(path, content)
    if is_checkpoint(content):
        return _checkpoint(path, content)
    if nnssl.is_checkpoint(content):
        return _nnssl(path, content)
    if isinstance(content.get("model_state_dict"), dict):
        return _mis_fm(path, content["model_state_dict"])
    keys = ", ".join(sorted(map(str, content))[:10])
    return [f"{path}: no file of weights that this program knows; a dict of {len(content)} entries: {keys}"]


def _artifact(path: Path, content: Mapping[str, Any]) -> list[str]:
    vf = content["vf"]
    versions = ", ".join(f"{name} {version}" for name, version in vf.get("versions", {}).items())
    origin = vf.get("converted_from")
    kind = f"converted from {origin['project']}" if origin else "pretrained with Volume Fusion"
    if "adapted" in vf:
        kind += f", adapted to other plans: {vf['adapted']['transferred_share']:.1%} of them kept"
    lines = [f"{path}: weights {kind} ({versions})", _network(vf, content["network_weights"]), *_data(vf)]
    if "settings" in vf:
        s = vf["settings"]
        lines.append(
            f"training: {s['num_epochs']} epochs x {s['iterations_per_epoch']} iterations, {s['optimizer']} at "
            f"{s['initial_lr']:g}, {s['fusion_map']}, pairing {s['pairing']}"
        )
        dice = vf["pretext_dice_per_class"]
        lines.append(f"pretext Dice by class: {', '.join(f'{d:.3f}' for d in dice)}")
    if "adapted" in vf:
        target = vf["adapted"]["for"]
        part = "encoder only, " if vf["adapted"]["encoder_only"] else ""
        lines.append(
            f"adapted: for {target['configuration']} of {target['plans']} of {target['dataset']}, {part}"
            f"from {vf['adapted']['from']}"
        )
        lines.append(
            f"use: nnUNetv2_train {target['dataset']} {target['configuration']} FOLD -p {target['plans']} "
            f"-tr VFFinetuneTrainer -pretrained_weights {shlex.quote(str(path))}"
        )
    elif can_be_planned(vf["architecture"]):
        lines.append(f"use: nnUNetv2_vf plan -d ID --like {shlex.quote(str(path))}")
    else:
        lines.append("use: with your own plans of this network; it takes patches of one size, so none are made for it")
    return lines


def _checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    vf = describe_checkpoint(checkpoint)
    ours = checkpoint.get("volume_fusion")
    trainer = f"{ours['trainer']}, under the name {vf['trainer']}" if ours else vf["trainer"]
    labels = checkpoint["init_args"]["dataset_json"]["labels"]
    lines = [
        f"{path}: checkpoint of nnU-Net's training with {trainer}, after {checkpoint['current_epoch']} epochs",
        _network(vf, checkpoint["network_weights"]),
        *_data(vf),
        f"labels: {', '.join(labels)}",
    ]
    if ours and ours["pretrained"]:
        lines.append(f"pretrained: {ours['pretrained']['file']}, on {ours['pretrained']['dataset']}")
    if VFSettings.section in vf["plans"]:
        lines.append(f"use: {FILE_NAME} beside it; this one is for nnUNetv2_train --c")
    else:
        lines.append(
            "use: nnUNetv2_predict; or as pretrained weights: nnUNetv2_vf plan -d ID --like, nnUNetv2_vf adapt"
        )
    return lines


def _nnssl(path: Path, checkpoint: Mapping[str, Any]) -> list[str]:
    first = f"{path}: checkpoint of nnssl's {checkpoint.get('trainer_name', 'training')}"
    try:
        weights, vf = nnssl.convert_checkpoint(checkpoint)
    except UserError as error:
        return [first, f"cannot be converted: {error}"]
    return [first, _network(vf, weights), *_data(vf), f"use: nnUNetv2_vf convert {shlex.quote(str(path))} -o OUT.pth"]


def _mis_fm(path: Path, state_dict: Mapping[str, Any]) -> list[str]:
    first = f"{path}: checkpoint with a 'model_state_dict', as MIS-FM releases them"
    try:
        return [first, str(convert_state_dict(state_dict)), f"use: nnUNetv2_vf convert {path} -o OUT.pth"]
    except UserError as error:
        return [first, f"cannot be converted: {error}"]


def _network(vf: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    architecture = vf["architecture"]
    kwargs = architecture["arch_kwargs"]
    parameters = sum({storage_key(tensor): tensor.numel() for tensor in weights.values()}.values())
    features = f"features {kwargs['features_per_stage']}, " if "features_per_stage" in kwargs else ""
    return (
        f"network: {architecture['network_class_name'].rpartition('.')[2]}, {features}{parameters / 1e6:.1f} M "
        f"parameters, {vf['num_input_channels']} input channels, {vf['num_classes']} classes"
    )


def _data(vf: Mapping[str, Any]) -> list[str]:
    lines = []
    if "dataset" in vf:
        cases = f", {vf['num_cases']} cases" if "num_cases" in vf else ""
        plans = f", {vf['configuration']} of {vf['plans']['plans_name']}, fold {vf['fold']}" if "plans" in vf else ""
        lines.append(f"data: {vf['dataset']}{cases}{plans}")
    if vf.get("normalization_schemes"):
        channels = f"{', '.join(vf['channel_names'].values())}; " if vf.get("channel_names") else ""
        lines.append(f"channels: {channels}{', '.join(vf['normalization_schemes'])}")
    if vf.get("patch_size"):
        spacing = f" of {' x '.join(f'{mm:.3g}' for mm in vf['spacing'])} mm" if vf.get("spacing") else ""
        lines.append(f"patch: {' x '.join(map(str, vf['patch_size']))} voxels{spacing}")
    return lines
