"""``nnUNetv2_vf convert``: make an artifact from a checkpoint of MIS-FM or nnssl, or from our safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import network_name
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_checked_artifact, require_writable, write_artifact
from nnunetv2_vf.transfer.convert_misfm import convert_state_dict
from nnunetv2_vf.transfer.convert_nnssl import convert_nnssl_checkpoint, is_nnssl_checkpoint
from nnunetv2_vf.transfer.metadata import package_versions
from nnunetv2_vf.transfer.nnssl_plan import NNSSL_PLAN_KEY
from nnunetv2_vf.transfer.safe_loading import load_safely, malformed_file_errors
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING


def convert_file(checkpoint_file: Path, output: Path, mode: int | None = None) -> str:
    """Convert a checkpoint of MIS-FM or nnssl, or safetensors of :mod:`.safetensors_files`; no code in it is run.

    Args:
        output: the artifact to write.
        mode: for MIS-FM: see :func:`nnunetv2_vf.transfer.convert_misfm.convert_state_dict`.

    Returns:
        one line that describes the network.

    Raises:
        UserError: the file is no such checkpoint, contains unexpected entries, or does not determine its resolution
            mode; or the output cannot be written.
    """
    if not checkpoint_file.is_file():
        raise UserError(f"no file {checkpoint_file}; https://github.com/openmedlab/MIS-FM links the released weights")
    require_writable(output, checkpoint_file)
    checkpoint = load_safely(checkpoint_file)
    if is_nnssl_checkpoint(checkpoint):
        if mode is not None:
            raise UserError(f"--mode {mode}, but {checkpoint_file} is a checkpoint of nnssl; leave --mode out")
        return _convert_nnssl(checkpoint_file, checkpoint, output)
    if isinstance(checkpoint.get("model_state_dict"), dict):
        return _convert_misfm(checkpoint_file, checkpoint, output, mode)
    if "vf" in checkpoint and checkpoint_file.suffix == SAFETENSORS_ENDING:
        if mode is not None:
            raise UserError(f"--mode {mode}, but {checkpoint_file} is no checkpoint of MIS-FM; leave --mode out")
        return _convert_safetensors(checkpoint_file, read_checked_artifact(checkpoint_file), output)
    if "vf" in checkpoint:
        raise UserError(f"{checkpoint_file} is a {ARTIFACT_NAME} already; it needs no conversion")
    raise UserError(
        f"{checkpoint_file} is no checkpoint of MIS-FM or nnssl: it has neither 'model_state_dict' nor "
        f"'{NNSSL_PLAN_KEY}'"
    )


def _convert_safetensors(file: Path, artifact: Mapping[str, Any], output: Path) -> str:
    with malformed_file_errors(file):
        metadata = artifact["vf"]
        write_artifact(output, artifact["network_weights"], metadata, artifact.get(NNSSL_PLAN_KEY))
        return f"{network_name(metadata['architecture'])}, {_describe_channels(metadata)}"


def _describe_channels(metadata: Mapping[str, Any]) -> str:
    return f"{metadata['num_input_channels']} input channels, {metadata['num_classes']} output channels"


def _convert_nnssl(file: Path, checkpoint: Mapping[str, Any], output: Path) -> str:
    with malformed_file_errors(file):
        weights, metadata = convert_nnssl_checkpoint(checkpoint)
    metadata["converted_from"]["file"] = file.name
    write_artifact(output, weights, {**metadata, "versions": package_versions()}, checkpoint[NNSSL_PLAN_KEY])
    return f"{network_name(metadata['architecture'])} of nnssl, {_describe_channels(metadata)}"


def _convert_misfm(file: Path, checkpoint: Mapping[str, Any], output: Path, mode: int | None) -> str:
    converted = convert_state_dict(checkpoint["model_state_dict"], mode)
    metadata = {
        "architecture": converted.architecture,
        "num_input_channels": converted.input_channels,
        "num_classes": converted.num_classes,
        "converted_from": {"project": "MIS-FM", "file": file.name, "resolution_mode": converted.mode},
        "versions": package_versions(),
    }
    write_artifact(output, converted.state_dict, metadata)
    return str(converted)
