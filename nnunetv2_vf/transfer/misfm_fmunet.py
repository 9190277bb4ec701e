"""Convert released weights of MIS-FM's FMUNet."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.five_level_network import MODES, level_kernels
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.transfer.misfm_conversion import Conversion, require_none_unexpected

# Prefix in the release -> prefix in FMUNet.
_MODULES = {
    "project": "encoder.stem",
    **{f"encoder.en_conv{level}.conv_list": f"encoder.stages.{level}.convs" for level in range(5)},
    **{f"encoder.down{level}.down": f"encoder.downs.{level}" for level in range(4)},
    "decoder.de_conv4.conv_list": "decoder.bottom.convs",
    **{f"decoder.de_conv{level}.conv_list": f"decoder.stages.{3 - level}.convs" for level in range(4)},
    **{f"decoder.upcat{level}.up": f"decoder.ups.{3 - level}.up.0" for level in range(4)},
    **{f"decoder.upcat{level}.conv": f"decoder.ups.{3 - level}.conv" for level in range(4)},
    **{f"out_layers.{level}": f"decoder.seg_layers.{3 - level}" for level in range(4)},
}
# The original's sequences of norm, activation and convolution have no dropout: their convolution is number 2, not 3.
_WITHOUT_DROPOUT = re.compile(
    r"(encoder\.downs\.\d|decoder\.ups\.\d\.up\.0|decoder\.ups\.\d\.conv|seg_layers\.\d)\.2\."
)


def is_fmunet(released: Mapping[str, Tensor]) -> bool:
    """Return True if the names are those of an FMUNet."""
    return any(name.startswith("encoder.en_conv") for name in released)


def convert_fmunet(released: Mapping[str, Tensor], mode: int | None) -> Conversion:
    """Convert a released ``model_state_dict`` for :class:`nnunetv2_vf.fmunet.FMUNet`.

    Args:
        mode: the resolution mode, which the kernels show too; None: the one that they show.

    Raises:
        UserError: tensors are missing or unexpected, or the mode is another one.
    """
    state = _rename(released)
    try:
        stem = state["encoder.stem.weight"]
        features = [stem.shape[0], *(state[f"encoder.downs.{i}.3.weight"].shape[0] for i in range(4))]
        kernels = [tuple(state[f"encoder.stages.{level}.convs.0.3.weight"].shape[2:]) for level in range(5)]
        classes = state["decoder.seg_layers.3.3.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError(
            f"the checkpoint is not MIS-FM's FMUNet: it lacks the tensor that FMUNet calls {error}"
        ) from None
    found = _mode_of_kernels(kernels)
    if mode not in (None, found):
        raise UserError(f"--mode {mode}, but the kernels are those of resolution mode {found}; leave --mode out")
    arch_kwargs = {
        "features_per_stage": features,
        "strides": [list(stride) for stride in MODES[found]],
        "depth": sum(re.fullmatch(r"encoder\.stages\.0\.convs\.\d+\.3\.weight", name) is not None for name in state),
    }
    return Conversion(FMUNet, found, stem.shape[1], classes, arch_kwargs, state)


def _rename(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with FMUNet's names, in single precision."""
    state: dict[str, Tensor] = {}
    unexpected = []
    for name, value in released.items():
        prefix = next((prefix for prefix in _MODULES if name.startswith(prefix + ".")), None)
        if prefix is None or not value.is_floating_point():
            unexpected.append(name)
            continue
        new_name = _MODULES[prefix] + name.removeprefix(prefix)
        state[_WITHOUT_DROPOUT.sub(r"\1.3.", new_name)] = value.float()
    require_none_unexpected(unexpected)
    return state


def _mode_of_kernels(kernels: list[tuple[int, ...]]) -> int:
    for mode, strides in enumerate(MODES):
        if kernels == level_kernels(strides):
            return mode
    raise UserError(f"the checkpoint is not MIS-FM's FMUNet: its levels have the kernels {kernels}")
