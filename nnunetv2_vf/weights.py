"""The pretrained artifact, ``vf_pretrained.pth``: one file for stock ``-pretrained_weights``, on any device.

A dict of ``network_weights`` (CPU tensors, keys as in the network) and ``vf`` (plain metadata), readable with
``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import VFSettings

FILE_NAME = "vf_pretrained.pth"
_MAIN_KEYS = {"network_weights", "vf"}


def write_artifact(path: Path, state_dict: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write the artifact; a file of that name is replaced only once the new one is complete.

    Args:
        state_dict: of the bare network (no ``module.`` or ``_orig_mod.`` prefix), on any device.
        metadata: what JSON can hold.

    Raises:
        TypeError: the metadata hold something else.
    """
    plain = json.loads(json.dumps(metadata))  # no subclasses, such as torch's version: they do not load safely
    unfinished = path.with_name(path.name + ".part")
    try:
        torch.save({"network_weights": _to_cpu(state_dict), "vf": plain}, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _to_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU, each storage once: nnU-Net's networks list most parameters under two to four names."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    for tensor in state_dict.values():
        if _place(tensor) not in copies:
            copies[_place(tensor)] = tensor.detach().cpu()
    return {name: copies[_place(tensor)] for name, tensor in state_dict.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of the same tensor have in common."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def describe_pretraining(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    configuration_name: str,
    dataset_json: Mapping[str, Any],
    settings: VFSettings,
    fold: int | str,
    num_cases: int,
    dice_per_class: Sequence[float],
) -> dict[str, Any]:
    """The artifact's metadata: how to rebuild the network, what it was trained on, and how well it did.

    ``architecture`` has the shape of a plan's entry; with ``num_input_channels`` and ``num_classes`` nnU-Net's
    ``get_network_from_plans`` rebuilds the network that ``network_weights`` fit.
    """
    channel_names = dataset_json.get("channel_names", dataset_json.get("modality"))
    return {
        "architecture": configuration_manager.configuration["architecture"],
        "num_input_channels": len(channel_names),
        "num_classes": settings.coefficient_steps + 1,
        "plans": plans_manager.plans,
        "configuration": configuration_name,
        "channel_names": channel_names,
        "normalization_schemes": configuration_manager.normalization_schemes,
        "spacing": [float(mm) for mm in configuration_manager.spacing],
        "patch_size": [int(voxels) for voxels in configuration_manager.patch_size],
        "settings": settings.as_dict(),
        "dataset": plans_manager.dataset_name,
        "fold": fold,
        "num_cases": num_cases,
        "pretext_dice_per_class": [float(dice) for dice in dice_per_class],
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """What wrote an artifact."""
    return {"nnunetv2": version("nnunetv2"), "torch": version("torch"), "nnunetv2_vf": __version__}


def read_artifact(path: Path) -> dict[str, Any]:
    """Read an artifact without executing anything it may hold.

    Raises:
        UserError: there is no such file, or it is not an artifact of Volume Fusion.
    """
    if not path.is_file():
        raise UserError(f"no file {path}; pretraining writes {FILE_NAME} into its fold folder")
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path} is damaged or not a {FILE_NAME}: {type(error).__name__}") from error
    if not isinstance(artifact, dict) or not artifact.keys() >= _MAIN_KEYS:
        raise UserError(f"{path} is not a {FILE_NAME}: it lacks {' and '.join(sorted(_MAIN_KEYS))}")
    return artifact


def recorded_plans(checkpoint_file: Path, trainer_name: str) -> dict[str, Any]:
    """Return the plans recorded in an nnU-Net checkpoint of ``trainer_name``; reads no weights.

    Raises:
        UserError: the file is damaged, or another trainer wrote it.
    """
    try:
        checkpoint = torch.load(checkpoint_file, map_location="cpu", mmap=True, weights_only=False)
        writer, plans = checkpoint["trainer_name"], checkpoint["init_args"]["plans"]
    except Exception as error:
        raise UserError(
            f"{checkpoint_file} is damaged or no nnU-Net checkpoint ({type(error).__name__}); move it away, and "
            "nnUNetv2_train --c takes the next best one of its folder"
        ) from error
    if writer != trainer_name or VFSettings.section not in plans:
        raise UserError(f"{checkpoint_file} was written by {writer}, not by {trainer_name}; move it away")
    return plans
