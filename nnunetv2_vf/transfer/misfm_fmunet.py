"""Convert released weights of MIS-FM's FMUNet."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.five_level_network import LEVELS, MODES, level_kernels
from nnunetv2_vf.fmunet import FMUNet
from nnunetv2_vf.transfer.misfm_conversion import Conversion, axis_length, not_released, require_none_unexpected

# Prefix in the release -> prefix in FMUNet, for sequences of norm, activation and convolution.
_SEQUENCES = {
    **{f"encoder.down{level}.down": f"encoder.downs.{level}" for level in range(4)},
    **{f"decoder.upcat{level}.up": f"decoder.ups.{3 - level}.up.0" for level in range(4)},
    **{f"decoder.upcat{level}.conv": f"decoder.ups.{3 - level}.conv" for level in range(4)},
    **{f"out_layers.{level}": f"decoder.seg_layers.{3 - level}" for level in range(4)},
}
# The same for all modules. Ours have a dropout before the convolution, which is number 3 and not 2.
_MODULES = {
    "project": "encoder.stem",
    **{f"encoder.en_conv{level}.conv_list": f"encoder.stages.{level}.convs" for level in range(5)},
    "decoder.de_conv4.conv_list": "decoder.bottom.convs",
    **{f"decoder.de_conv{level}.conv_list": f"decoder.stages.{3 - level}.convs" for level in range(4)},
    **{f"{old}.0": f"{new}.0" for old, new in _SEQUENCES.items()},
    **{f"{old}.2": f"{new}.3" for old, new in _SEQUENCES.items()},
}


def convert_fmunet(released: Mapping[str, Tensor], mode: int | None) -> Conversion:
    """Convert a released ``model_state_dict`` for :class:`nnunetv2_vf.fmunet.FMUNet`.

    Args:
        mode: the resolution mode; it must be that of the kernels. None: read it from the kernels.

    Raises:
        UserError: tensors are missing, unexpected or have another number of axes, or the kernels have another mode.
    """
    state = _rename(released)

    def length(tensor: str, axis: int) -> int:
        return axis_length(state, FMUNet, tensor, axis)

    block = "encoder.stages.{}.convs.0.3.weight"
    kernels = [tuple(length(block.format(level), axis) for axis in (2, 3, 4)) for level in range(LEVELS)]
    found = _mode_of_kernels(kernels)
    if mode not in (None, found):
        raise UserError(f"--mode {mode}, but the kernels are those of resolution mode {found}; leave --mode out")
    arch_kwargs = {
        "features_per_stage": [length(block.format(level), 0) for level in range(LEVELS)],
        "strides": [list(stride) for stride in MODES[found]],
        "depth": sum(re.fullmatch(r"encoder\.stages\.0\.convs\.\d+\.3\.weight", name) is not None for name in state),
    }
    channels, classes = length("encoder.stem.weight", 1), length("decoder.seg_layers.3.3.weight", 0)
    return Conversion(FMUNet, found, channels, classes, arch_kwargs, state)


def _rename(released: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with FMUNet's names, in single precision."""
    state: dict[str, Tensor] = {}
    unexpected = []
    for name, value in released.items():
        prefix = next((prefix for prefix in _MODULES if name.startswith(prefix + ".")), None)
        if prefix is None:
            unexpected.append(name)
        else:
            new_name = _MODULES[prefix] + name.removeprefix(prefix)
            state[new_name] = value.float() if value.is_floating_point() else value
    require_none_unexpected(unexpected, FMUNet)
    return state


def _mode_of_kernels(kernels: list[tuple[int, ...]]) -> int:
    of_modes: list[Any] = [level_kernels(strides) for strides in MODES]
    if kernels not in of_modes:
        legal = "; ".join(f"{list(map(list, each))} (mode {mode})" for mode, each in enumerate(of_modes))
        raise not_released(FMUNet, f"its levels have the kernels {list(map(list, kernels))}; legal: {legal}")
    return of_modes.index(kernels)
