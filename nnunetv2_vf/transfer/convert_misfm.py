"""Convert released weights of MIS-FM's networks: state dict in, state dict out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_vf.transfer.misfm_conversion import Conversion, require_complete, require_finite_tensors
from nnunetv2_vf.transfer.misfm_fmunet import convert_fmunet, is_fmunet
from nnunetv2_vf.transfer.misfm_pct_net import convert_pct_net


def convert_state_dict(released: Mapping[str, Any], mode: int | None = None) -> Conversion:
    """Convert a released ``model_state_dict`` of PCT-Net or FMUNet, in single precision.

    Args:
        mode: the resolution mode; None: the one with which the release was trained. A PCT-Net shows it by the mode
            whose batch statistics were updated, if there is exactly one; an FMUNet by its kernels.

    Raises:
        UserError: tensors are missing, unexpected or not finite, or the mode is another one or cannot be determined.
    """
    require_finite_tensors(released)
    converted = (convert_fmunet if is_fmunet(released) else convert_pct_net)(released, mode)
    require_complete(converted)
    return converted
