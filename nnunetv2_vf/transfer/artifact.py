"""The pretrained artifact ``vf_pretrained.pth``: one file that stock ``-pretrained_weights`` accepts on any device.

``torch.load(weights_only=True)`` reads it as a dict:

- ``network_weights``: tensors on the CPU, named as in the network
- ``vf``: metadata (:mod:`nnunetv2_vf.transfer.metadata`)
- ``nnssl_adaptation_plan``: if the plans are known (:mod:`nnunetv2_vf.transfer.nnssl_plan`)
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_vf.durable_files import write_durably
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.architectures import (
    build_network,
    can_be_planned,
    canonical_architecture,
    require_known_architecture,
)
from nnunetv2_vf.transfer.metadata import describe_nnunet_checkpoint, is_nnunet_checkpoint
from nnunetv2_vf.transfer.nnssl_plan import NNSSL_PLAN_KEY, architecture_of_nnssl_plan, make_nnssl_plan
from nnunetv2_vf.transfer.safe_loading import load_safely, malformed_file_errors
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING
from nnunetv2_vf.transfer.shared_tensors import storage_key

ARTIFACT_NAME = "vf_pretrained.pth"


def write_artifact(
    path: Path,
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    nnssl_plan: Mapping[str, Any] | None = None,
) -> None:
    """Write an artifact. An existing file is replaced only when the new one is complete.

    Args:
        state_dict: of the bare network (without the prefixes ``module.`` and ``_orig_mod.``), on any device.
        metadata: only values that JSON can hold.
        nnssl_plan: the entry ``nnssl_adaptation_plan``; by default it is made from the metadata.

    Raises:
        TypeError: the metadata contain a value that JSON cannot hold.
    """
    # JSON turns subclasses such as torch's version string into plain types; only those can be loaded safely.
    plain = json.loads(json.dumps(metadata))
    artifact = {"network_weights": _move_to_cpu(state_dict), "vf": plain}
    plan = nnssl_plan or make_nnssl_plan(plain)
    if plan is not None:
        artifact[NNSSL_PLAN_KEY] = plan
    write_durably(artifact, path)


def _move_to_cpu(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor on the CPU, once: nnU-Net's networks list most parameters under two to four names."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    for tensor in state_dict.values():
        if storage_key(tensor) not in copies:
            copies[storage_key(tensor)] = tensor.detach().cpu()
    return {name: copies[storage_key(tensor)] for name, tensor in state_dict.items()}


def require_writable(output: Path, source: Path) -> None:
    """Raise UserError unless ``output`` is a file name in an existing folder and not the ``source`` itself.

    Commands read files named ``.safetensors`` as such, so an artifact must not be named so.
    """
    if not output.parent.is_dir():
        raise UserError(
            f"the folder {output.parent} does not exist; make it: mkdir -p {shlex.quote(str(output.parent))}"
        )
    if output.is_dir():
        raise UserError(f"{output} is a folder; name a file in it: -o {shlex.quote(str(output / 'OUT.pth'))}")
    if output.suffix == SAFETENSORS_ENDING:
        raise UserError(f"{output}: this command writes torch's format; name the file {output.stem}.pth")
    if output.resolve() == source.resolve():
        raise UserError(f"{output} is the input file; give the output another name")


def read_artifact(path: Path) -> dict[str, Any]:
    """Read an artifact.

    Raises:
        UserError: the file cannot be loaded safely or is no artifact.
    """
    artifact = load_safely(path)
    if is_nnunet_checkpoint(artifact):
        raise UserError(
            f"{path} is a checkpoint of nnU-Net; legal: {ARTIFACT_NAME}, which pretraining writes beside it; to "
            "share a fine-tuned model: nnUNetv2_export_model_to_zip"
        )
    missing = {"network_weights", "vf"} - artifact.keys()
    if missing:
        raise UserError(f"{path} is no {ARTIFACT_NAME}: it lacks {' and '.join(sorted(missing))}")
    return artifact


def read_checked_artifact(path: Path) -> dict[str, Any]:
    """Read an artifact that others may have made, and check everything in it that nnU-Net would build or open.

    Raises:
        UserError: as :func:`read_artifact`; or an entry is missing or wrong, or names an unknown network or layer.
    """
    artifact = read_artifact(path)
    with malformed_file_errors(path):
        metadata = artifact["vf"]
        require_known_architecture(metadata["architecture"], path)
        _require_own_plans(metadata)
        if NNSSL_PLAN_KEY in artifact:
            require_known_architecture(architecture_of_nnssl_plan(artifact[NNSSL_PLAN_KEY]), path)
    return artifact


def _require_own_plans(metadata: Mapping[str, Any]) -> None:
    """Raise TypeError if the plans are a path, which nnU-Net would open: a file must not choose what is opened."""
    if not isinstance(metadata.get("plans", {}), dict):
        raise TypeError("plans that are no dict")


def read_pretrained(path: Path) -> dict[str, Any]:
    """Read any file that stock ``-pretrained_weights`` accepts, in the form of an artifact.

    Returns:
        ``network_weights``, and as ``vf`` the metadata that can be made from an nnU-Net checkpoint; bare weights have
        empty metadata.

    Raises:
        UserError: the file cannot be loaded safely or has no ``network_weights``.
    """
    content = load_safely(path)
    if "network_weights" not in content:
        raise UserError(
            f"{path} has no 'network_weights'; see what it holds: nnUNetv2_vf info {shlex.quote(str(path))}; convert a "
            f"release of MIS-FM: nnUNetv2_vf convert {shlex.quote(str(path))} -o OUT.pth"
        )
    weights = content["network_weights"]
    if not isinstance(weights, dict) or not all(isinstance(tensor, Tensor) for tensor in weights.values()):
        raise UserError(f"{path} has 'network_weights' that are not named tensors; legal: a dict of tensors by name")
    with malformed_file_errors(path):
        is_checkpoint = is_nnunet_checkpoint(content)
        metadata = describe_nnunet_checkpoint(content) if is_checkpoint else dict(content.get("vf", {}))
        _require_own_plans(metadata)
        if "architecture" in metadata:
            metadata["architecture"] = canonical_architecture(metadata["architecture"])
    return {"network_weights": weights, "vf": metadata}


def read_with_architecture(path: Path) -> dict[str, Any]:
    """Read pretrained weights as :func:`read_pretrained` does, and require that the file records a known network.

    Raises:
        UserError: as :func:`read_pretrained`; or the file records no network, one that may not be built, another one
            than that of its weights, or the second stage of a cascade.
    """
    content = read_pretrained(path)
    metadata = content["vf"]
    if not metadata.keys() >= {"architecture", "num_input_channels", "num_classes"}:
        raise UserError(
            f"{path} does not record which network its weights are for; legal: a {ARTIFACT_NAME} or a checkpoint of "
            f"nnU-Net; convert a checkpoint of nnssl: nnUNetv2_vf convert {shlex.quote(str(path))} -o OUT.pth"
        )
    require_known_architecture(metadata["architecture"], path)
    if "previous_stage" in metadata:
        raise UserError(
            f"{path} is the second stage of a cascade, whose input has labels beside the images; legal: the checkpoint "
            f"of {metadata['previous_stage']} or of 3d_fullres"
        )
    with malformed_file_errors(path):
        if "plans" in metadata:
            PlansManager(metadata["plans"]).get_configuration(metadata["configuration"])
        if metadata.get("spacing") and len(metadata["spacing"]) != 3:
            raise ValueError(f"spacing: {metadata['spacing']}; legal: three numbers")
        if "trainer" in metadata or can_be_planned(metadata["architecture"]):  # Primus is built in another way
            _require_own_network(path, content["network_weights"], metadata)
    return content


def _require_own_network(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Raise UserError if the weights of a file are not those of the network that it records."""
    network = build_network(metadata["architecture"], metadata["num_input_channels"], metadata["num_classes"] or 1)
    tensors = network.state_dict()
    unknown = sorted(weights.keys() - tensors.keys())
    shared = sorted(name for name in weights.keys() & tensors.keys() if HEADS not in name)
    misshapen = [name for name in shared if weights[name].shape != tensors[name].shape]
    if "trainer" in metadata and (unknown or misshapen):
        raise UserError(
            f"{path} has {len(unknown + misshapen)} tensors that the network of its plans does not have, for example "
            f"{(unknown + misshapen)[0]}: {metadata['trainer']} trained another network; write that network into "
            "plans, and train with them"
        )
    if misshapen:
        name = misshapen[0]
        raise UserError(
            f"{path} is damaged: {len(misshapen)} tensors have other shapes than in the network that it records, for "
            f"example {name} {list(weights[name].shape)}, not {list(tensors[name].shape)}"
        )
