"""The metadata ``vf`` of a file of weights: how to rebuild the network, and how it was trained.

All values are plain data that JSON can hold. Which keys a file has depends on the command that wrote it::

    architecture             the network, in the form of the entry in plans
    num_input_channels, num_classes
    plans, configuration     nnU-Net's plans of pretraining, and the configuration that was trained
    normalization_schemes    of that configuration, for each channel
    spacing, patch_size      of that configuration, in mm and voxels, in the order of its axes
    dataset, channel_names, fold, num_cases
    settings, batch_size     of pretraining; samples in a batch, of all ranks together
    pretrained               what pretraining started from, see PretrainedWeights.record; None: new weights
    pretext_dice_per_class, pretext_restored_share    Dice of each fusion class; restored share of each channel
    trainer                  only for checkpoints of nnU-Net
    previous_stage           of a cascade, only for its second stage, whose input has labels beside the images
    converted_from, adapted  what nnUNetv2_vf convert and adapt did
    versions                 of the packages that wrote the file
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor

from nnunetv2_vf import __version__
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.architectures import canonical_architecture

_CHECKPOINT_KEYS = {"network_weights", "init_args", "trainer_name"}


def describe_pretraining(
    plans_manager: PlansManager,
    configuration_manager: ConfigurationManager,
    configuration_name: str,
    dataset_json: Mapping[str, Any],
    settings: VFSettings,
    fold: int | str,
    num_cases: int,
    batch_size: int,
    pretrained: Mapping[str, Any] | None,
    scores: Sequence[float],
) -> dict[str, Any]:
    """Return the metadata of a pretraining.

    Args:
        batch_size: samples in a batch, of all ranks together.
        pretrained: the record of the weights that it started from; None: new weights.
        scores: of each output of the network: Dice of the fusion classes, then the restored shares of the channels.
    """
    classes = settings.num_fusion_classes
    channel_names = read_channel_names(dataset_json)
    return {
        **_describe_plans(plans_manager, configuration_manager, configuration_name),
        "num_input_channels": len(channel_names),
        "num_classes": len(scores),
        "channel_names": channel_names,
        "settings": settings.as_dict(),
        "fold": fold,
        "num_cases": num_cases,
        "batch_size": batch_size,
        "pretrained": None if pretrained is None else {**pretrained},
        "pretext_dice_per_class": [float(dice) for dice in scores[:classes]],
        "pretext_restored_share": [float(share) for share in scores[classes:]],
        "versions": package_versions(),
    }


def read_pretext(metadata: Mapping[str, Any]) -> str | None:
    """Return the setting ``pretext`` of a pretraining; None for weights that VFPretrainTrainer did not make."""
    # Files without the setting were trained before there was another pretext.
    return str(metadata["settings"].get("pretext", "fusion")) if "settings" in metadata else None


def describe_pretext(metadata: Mapping[str, Any]) -> str:
    """Return the method of a pretraining in words."""
    return {"masked": "masked autoencoding", "fusion+masked": "Volume Fusion and masked autoencoding"}.get(
        read_pretext(metadata) or "", "Volume Fusion"
    )


def is_nnunet_checkpoint(content: Mapping[str, Any]) -> bool:
    """Return True if a file's content is a checkpoint of nnU-Net."""
    arguments = content.get("init_args")
    return (
        content.keys() >= _CHECKPOINT_KEYS
        and isinstance(arguments, dict)
        # PlansManager would open a path, and a file from elsewhere must not choose what is opened.
        and all(isinstance(arguments.get(name), dict) for name in ("plans", "dataset_json"))
    )


def describe_nnunet_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of an nnU-Net checkpoint, which holds its plans and dataset.json."""
    arguments = checkpoint["init_args"]
    plans_manager = PlansManager(arguments["plans"])
    configuration_manager = plans_manager.get_configuration(arguments["configuration"])
    dataset_json, previous_stage = arguments["dataset_json"], configuration_manager.previous_stage_name
    return {
        **_describe_plans(plans_manager, configuration_manager, arguments["configuration"]),
        "num_input_channels": determine_num_input_channels(plans_manager, configuration_manager, dataset_json),
        "num_classes": _count_classes(checkpoint["network_weights"]),
        "channel_names": read_channel_names(dataset_json),
        "fold": arguments["fold"],
        "trainer": checkpoint["trainer_name"],
        **({"previous_stage": previous_stage} if previous_stage else {}),
    }


def _describe_plans(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, configuration_name: str
) -> dict[str, Any]:
    return {
        "architecture": canonical_architecture(configuration_manager.configuration["architecture"]),
        "plans": plans_manager.plans,
        "configuration": configuration_name,
        "normalization_schemes": configuration_manager.normalization_schemes,
        "spacing": [float(mm) for mm in configuration_manager.spacing],
        "patch_size": [int(voxels) for voxels in configuration_manager.patch_size],
        "dataset": plans_manager.dataset_name,
    }


def _count_classes(weights: Mapping[str, Tensor]) -> int:
    """Return the number of output channels of the heads; 0 without heads."""
    heads = [tensor for name, tensor in weights.items() if HEADS in name and tensor.ndim >= 4]
    return heads[-1].shape[0] if heads else 0


def read_channel_names(dataset_json: Mapping[str, Any]) -> dict[str, str]:
    """Return the channel names by channel number ("0", "1", ...); old files call the entry ``modality``.

    Raises:
        KeyError: there is neither of them.
    """
    is_old = "modality" in dataset_json and "channel_names" not in dataset_json
    names: dict[str, str] = dataset_json["modality" if is_old else "channel_names"]
    return names


def format_spacing(spacing: Sequence[float]) -> str:
    """Return a spacing in mm as text."""
    return " x ".join(f"{mm:.3g}" for mm in spacing) + " mm"


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that write a file of weights."""
    return {"nnunetv2": version("nnunetv2"), "torch": version("torch"), "nnunetv2_vf": __version__}
