"""Convert released weights of MIS-FM's networks: state dict in, state dict out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.misfm_conversion import Conversion, require_complete, require_finite_tensors
from nnunetv2_vf.transfer.misfm_fmunet import convert_fmunet
from nnunetv2_vf.transfer.misfm_pct_net import convert_pct_net

# Beginnings of tensor names that only one of the networks has -> its conversion.
_CONVERSIONS = {
    ("embeddings.", "pyramid_ct.", "pred_heads."): convert_pct_net,
    ("encoder.en_conv", "decoder.de_conv", "decoder.upcat", "project.", "out_layers."): convert_fmunet,
}


def convert_state_dict(released: Mapping[str, Any], mode: int | None = None) -> Conversion:
    """Convert a released ``model_state_dict`` of PCT-Net or FMUNet, in single precision.

    Args:
        mode: the resolution mode. None: read it from the release: for PCT-Net from the mode whose batch statistics
            were updated, if there is exactly one; for FMUNet from the kernels.

    Raises:
        UserError: tensors are missing, unexpected or not finite, or the release has another mode or does not show it.
    """
    require_finite_tensors(released)
    for beginnings, convert in _CONVERSIONS.items():
        if any(name.startswith(beginnings) for name in released):
            converted = convert(released, mode)
            require_complete(converted)
            return converted
    known = "; ".join(f"{beginnings[0]}..." for beginnings in _CONVERSIONS)
    found = next(iter(released), "none")
    raise UserError(
        f"the checkpoint holds neither PCT-Net nor FMUNet of MIS-FM, whose tensors are called {known}; it has {found}"
    )
