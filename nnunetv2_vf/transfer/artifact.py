"""The pretrained artifact, ``vf_pretrained.pth``: one file for stock ``-pretrained_weights``, on any device.

A dict of ``network_weights`` (CPU tensors, keys as in the network), ``vf`` (plain metadata) and, where the plans are
known, ``nnssl_adaptation_plan`` (:mod:`nnunetv2_vf.transfer.convert_nnssl`).
``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunetv2_vf import __version__
from nnunetv2_vf.durable_files import write_durably
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.convert_nnssl import PLAN_KEY, adaptation_plan
from nnunetv2_vf.transfer.safe_loading import as_described, require_known_architecture

FILE_NAME = "vf_pretrained.pth"
_MAIN_KEYS = {"network_weights", "vf"}
_CHECKPOINT_KEYS = {"network_weights", "init_args", "trainer_name"}
# nnU-Net, nnssl and MIS-FM store scores beside the weights, as numpy's numbers.
_NUMPY_SCALARS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]


def write_artifact(
    path: Path,
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    nnssl_plan: Mapping[str, Any] | None = None,
) -> None:
    """Write the artifact; a file of that name is replaced only once the new one is complete.

    Args:
        state_dict: of the bare network (no ``module.`` or ``_orig_mod.`` prefix), on any device.
        metadata: what JSON can hold.
        nnssl_plan: the ``nnssl_adaptation_plan``; default: what follows from the metadata.

    Raises:
        TypeError: the metadata hold something else.
    """
    plain = json.loads(json.dumps(metadata))  # no subclasses, such as torch's version: they do not load safely
    artifact = {"network_weights": _to_cpu(state_dict), "vf": plain}
    plan = nnssl_plan or adaptation_plan(plain)
    write_durably(artifact if plan is None else {**artifact, PLAN_KEY: plan}, path)


def check_output(output: Path, source: Path) -> None:
    """Raise UserError unless ``output`` can be written beside or instead of what is there, and is not the source."""
    if not output.parent.is_dir():
        raise UserError(f"the folder {output.parent} does not exist; make it: mkdir -p {output.parent}")
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file in it: -o {output / 'OUT.pth'}")
    if output.resolve() == source.resolve():
        raise UserError(f"{output} is the file that is read; give the result another name")


def _to_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU, each storage once: nnU-Net's networks list most parameters under two to four names."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    for tensor in state_dict.values():
        if storage_key(tensor) not in copies:
            copies[storage_key(tensor)] = tensor.detach().cpu()
    return {name: copies[storage_key(tensor)] for name, tensor in state_dict.items()}


def storage_key(tensor: Tensor) -> tuple[Any, ...]:
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
        **_describe_plan(plans_manager, configuration_manager, configuration_name),
        "num_input_channels": len(channel_names),
        "num_classes": settings.coefficient_steps + 1,
        "channel_names": channel_names,
        "settings": settings.as_dict(),
        "fold": fold,
        "num_cases": num_cases,
        "pretext_dice_per_class": [float(dice) for dice in dice_per_class],
        "versions": package_versions(),
    }


def _describe_plan(
    plans_manager: PlansManager, configuration_manager: ConfigurationManager, configuration_name: str
) -> dict[str, Any]:
    return {
        "architecture": configuration_manager.configuration["architecture"],
        "plans": plans_manager.plans,
        "configuration": configuration_name,
        "normalization_schemes": configuration_manager.normalization_schemes,
        "spacing": [float(mm) for mm in configuration_manager.spacing],
        "patch_size": [int(voxels) for voxels in configuration_manager.patch_size],
        "dataset": plans_manager.dataset_name,
    }


def package_versions() -> dict[str, str]:
    """What wrote an artifact."""
    return {"nnunetv2": version("nnunetv2"), "torch": version("torch"), "nnunetv2_vf": __version__}


def load_safely(path: Path) -> dict[str, Any]:
    """Read a file of weights from anywhere without executing anything it may hold; tensors come to the CPU.

    Raises:
        UserError: there is no such file, it is damaged, no dict, or needs code of its own to load.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"no file {path}: it {what}; pretraining writes {FILE_NAME} into its fold folder")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of pickles that it did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        needed = _unsafe_globals(path)
        why = (
            f"it would run {', '.join(needed)} to load"
            if needed
            else f"it is damaged, or never was one ({type(error).__name__})"
        )
        raise UserError(
            f"{path} is no file of PyTorch weights that can be trusted: {why}; pretraining writes {FILE_NAME} into its "
            "fold folder"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _unsafe_globals(path: Path) -> list[str]:
    """What an unpickler would import beyond tensors and numbers; empty if the file cannot be read at all."""
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # damaged, or of torch's format before 1.6
        return []


def read_artifact(path: Path) -> dict[str, Any]:
    """Read an artifact without executing anything it may hold.

    Raises:
        UserError: there is no such file, or it is not an artifact of Volume Fusion.
    """
    artifact = load_safely(path)
    if not artifact.keys() >= _MAIN_KEYS:
        raise UserError(f"{path} is not a {FILE_NAME}: it lacks {' and '.join(sorted(_MAIN_KEYS))}")
    return artifact


def read_pretrained(path: Path) -> dict[str, Any]:
    """Read what nnU-Net takes as pretrained weights in the form of an artifact, executing nothing it may hold.

    The ``vf`` metadata of an nnU-Net checkpoint are what it tells of its plans; those of bare weights are empty.

    Raises:
        UserError: there is no such file, or it holds no ``network_weights``.
    """
    content = load_safely(path)
    if "network_weights" not in content:
        raise UserError(
            f"{path} has no 'network_weights'; what it is: nnUNetv2_vf info {path}; releases of MIS-FM become a "
            f"{FILE_NAME}: nnUNetv2_vf convert {path} -o OUT.pth"
        )
    weights = content["network_weights"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} has 'network_weights' that are not named tensors")
    with as_described(path):
        vf = describe_checkpoint(content) if is_checkpoint(content) else dict(content.get("vf", {}))
    return {"network_weights": weights, "vf": vf}


def copy_weights(weights: Mapping[str, Tensor], network: nn.Module) -> None:
    """Copy all weights but the heads' into a network that they fit, as stock ``-pretrained_weights`` does."""
    own = network.state_dict()
    for name, tensor in own.items():
        if HEADS not in name:
            tensor.copy_(weights[name.removeprefix("_orig_mod.")])  # the names of a compiled network


def read_described(path: Path) -> dict[str, Any]:
    """As :func:`read_pretrained`; raises UserError also where the file does not tell a known network that it is for."""
    content = read_pretrained(path)
    if not content["vf"].keys() >= {"architecture", "num_input_channels", "num_classes"}:
        raise UserError(
            f"{path} does not tell which network its weights are for; legal: a {FILE_NAME}, or a checkpoint of "
            f"nnU-Net; checkpoints of nnssl become one: nnUNetv2_vf convert {path} -o OUT.pth"
        )
    require_known_architecture(content["vf"]["architecture"], path)
    return content


def is_checkpoint(content: Mapping[str, Any]) -> bool:
    """Whether a file's content is a checkpoint of nnU-Net."""
    arguments = content.get("init_args")
    return (
        content.keys() >= _CHECKPOINT_KEYS
        and isinstance(arguments, dict)
        and all(isinstance(arguments.get(name), dict) for name in ("plans", "dataset_json"))  # no path to open
    )


def describe_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What an nnU-Net checkpoint tells of its training, in the words of an artifact's metadata."""
    arguments = checkpoint["init_args"]
    plans_manager = PlansManager(arguments["plans"])
    configuration_manager = plans_manager.get_configuration(arguments["configuration"])
    channel_names = arguments["dataset_json"].get("channel_names", arguments["dataset_json"].get("modality"))
    return {
        **_describe_plan(plans_manager, configuration_manager, arguments["configuration"]),
        "num_input_channels": len(channel_names),
        "num_classes": count_classes(checkpoint["network_weights"]),
        "channel_names": channel_names,
        "fold": arguments["fold"],
        "trainer": checkpoint["trainer_name"],
    }


def count_classes(state_dict: Mapping[str, Tensor]) -> int:
    """Output channels of the heads."""
    heads = [tensor for name, tensor in state_dict.items() if HEADS in name and tensor.ndim >= 4]
    return heads[-1].shape[0] if heads else 0
