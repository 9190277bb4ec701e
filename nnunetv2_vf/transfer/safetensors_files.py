"""Artifacts as safetensors: a format without pickle, which the Hugging Face Hub shows and other frameworks read.

The header of the file holds, as JSON, everything in the artifact but the tensors, and ``same_tensors``: nnU-Net's
networks list most parameters under two to four names, and the file holds such a tensor under one of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.shared_tensors import storage_key

SAFETENSORS_ENDING = ".safetensors"
_WEIGHTS, _SAME_TENSORS, _FORMAT = "network_weights", "same_tensors", "format"


def write_safetensors(path: Path, artifact: Mapping[str, Any]) -> None:
    """Write an artifact, or replace one. All tensors are stored in the ordinary memory layout."""
    from safetensors.torch import save_file

    first_names: dict[tuple[Any, ...], str] = {}
    weights = artifact[_WEIGHTS]
    same = {name: first_names.setdefault(storage_key(tensor), name) for name, tensor in weights.items()}
    header = {key: json.dumps(value) for key, value in artifact.items() if key != _WEIGHTS}
    header[_SAME_TENSORS] = json.dumps({name: first for name, first in same.items() if name != first})
    save_file({name: weights[name].contiguous() for name in first_names.values()}, path, {_FORMAT: "pt", **header})


def read_safetensors(path: Path) -> dict[str, Any]:
    """Read a file of safetensors in the form of an artifact; files of other projects have only ``network_weights``.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _SAME_TENSORS not in header:
            return {_WEIGHTS: weights}
        entries = {key: json.loads(value) for key, value in header.items() if key != _FORMAT}
        weights |= {name: weights[first] for name, first in entries.pop(_SAME_TENSORS).items()}
        return {**entries, _WEIGHTS: weights}
    except (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or is no file of safetensors ({type(error).__name__})") from error
