"""Read weight files from anywhere without running code that they may hold.

Files of safetensors hold no code. ``torch.load(weights_only=True)`` reads only tensors and plain data. But nnU-Net also
calls the networks and layers that a file names; :mod:`nnunetv2_vf.transfer.architectures` checks those names.
"""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING, read_safetensors

_HINT = "pretraining writes vf_pretrained.pth into its fold folder"
# nnU-Net, nnssl and MIS-FM store scores as numpy numbers beside the weights.
_NUMPY_SCALARS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]


def load_safely(path: Path) -> dict[str, Any]:
    """Read a file of PyTorch weights or of safetensors; all tensors are on the CPU.

    Raises:
        UserError: the file does not exist, is damaged, can only be loaded by running code, or holds no dict.
    """
    if not path.is_file():
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a file in it: {_name_weights_in(path)}")
        raise UserError(f"no file {path}; {_HINT}")
    if path.suffix == SAFETENSORS_ENDING:
        return read_safetensors(path)
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about pickles that it did not write
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of many kinds
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch raises EINVAL for a file that is cut off
            raise UserError(f"{path} cannot be read: {error}") from error
        unsafe = _unsafe_globals(path) or re.findall(r"GLOBAL (\S+)", str(error))  # torch's format before version 1.6
        reason = f"loading it would run {', '.join(unsafe)}" if unsafe else "it is damaged or is no file of PyTorch"
        raise UserError(f"{path} cannot be loaded safely: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of weights")
    return content


def _name_weights_in(folder: Path) -> str:
    files = sorted(folder.glob("*.pth")) + sorted(folder.glob(f"*{SAFETENSORS_ENDING}"))
    return ", ".join(str(file) for file in files[:3]) or "it holds no .pth and no .safetensors"


def _unsafe_globals(path: Path) -> list[str]:
    """Return the names that the file imports beyond tensors and numbers; empty if the file cannot be read at all."""
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # a damaged file, or torch's format before version 1.6
        return []


@contextmanager
def malformed_file_errors(file: Path | str) -> Iterator[None]:
    """Raise a UserError that names the file, if missing or wrong entries of the file cause an error in this block."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"{file} has missing or wrong entries: {type(error).__name__} {error}") from error
