"""Convert released weights of MIS-FM's PCT-Net.

A release holds one embedding and one prediction head for each of the three resolution modes, but only one mode was
trained; the conversion keeps that one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.five_level_network import LEVELS, MODES
from nnunetv2_vf.pct_net import PCTNet
from nnunetv2_vf.transfer.misfm_conversion import Conversion, axis_length, require_none_unexpected
from nnunetv2_vf.transfer.misfm_position_bias import separate_offsets
from nnunetv2_vf.window_attention import window_side

_BIAS_TABLE = "attn.relative_position_bias_table"
_BIAS_INDEX = "attn.relative_position_index"
_COUNT_OF_BATCHES = "conv0.conv_conv.0.num_batches_tracked"
# PCT blocks end with a norm that the original never applies.
_UNUSED_NORM = re.compile(r"pyramid_ct\.convtrans_[ed][234]\.norm_layer\.(weight|bias)")

# Prefix in the release -> prefix in PCTNet; {mode} is the resolution mode.
_MODULES = {
    "embeddings.{mode}.proj": "encoder.stem",
    "embeddings.{mode}.conv0.conv_conv": "encoder.stages.0",
    "embeddings.{mode}.conv1.conv_conv": "encoder.stages.1",
    "embeddings.{mode}.down1": "encoder.downs.0",
    "embeddings.{mode}.down2": "encoder.downs.1",
    "pyramid_ct.down3": "encoder.downs.2",
    "pyramid_ct.down4": "encoder.downs.3",
    "pyramid_ct.convtrans_e2": "encoder.stages.2",
    "pyramid_ct.convtrans_e3": "encoder.stages.3",
    "pyramid_ct.convtrans_e4": "encoder.stages.4",
    "pyramid_ct.up4": "decoder.ups.0",
    "pyramid_ct.up3": "decoder.ups.1",
    "pred_heads.{mode}.up2": "decoder.ups.2",
    "pred_heads.{mode}.up1": "decoder.ups.3",
    "pyramid_ct.convtrans_d3": "decoder.stages.0",
    "pyramid_ct.convtrans_d2": "decoder.stages.1",
    "pred_heads.{mode}.conv1.conv_conv": "decoder.stages.2",
    "pred_heads.{mode}.conv0.conv_conv": "decoder.stages.3",
    "pyramid_ct.out_conv3.conv": "decoder.seg_layers.0",
    "pyramid_ct.out_conv2.conv": "decoder.seg_layers.1",
    "pred_heads.{mode}.out_conv1.conv": "decoder.seg_layers.2",
    "pred_heads.{mode}.out_conv0.conv": "decoder.seg_layers.3",
}
# The same for modules within a PCT block.
_MODULES_OF_A_BLOCK = {
    "conv.conv_conv": "convolution",
    "trans.blocks": "attention",
    _BIAS_TABLE: "attention.position_bias",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def convert_pct_net(released: Mapping[str, Tensor], mode: int | None) -> Conversion:
    """Convert a released ``model_state_dict`` for :class:`nnunetv2_vf.pct_net.PCTNet`.

    Args:
        mode: the resolution mode to keep; None: the mode whose batch statistics were updated in training, if there is
            exactly one.

    Raises:
        UserError: tensors are missing or unexpected, or the mode cannot be determined.
    """
    mode = _determine_mode(released, mode)
    state = _rename(released, mode)

    def length(tensor: str, axis: int) -> int:
        return axis_length(state, PCTNet, tensor, axis)

    downs = [length(f"encoder.downs.{level}.conv.2.weight", 0) for level in range(LEVELS - 1)]
    arch_kwargs = {
        "features_per_stage": [length("encoder.stem.weight", 0), *downs],
        "strides": [list(stride) for stride in MODES[mode]],
        **_read_attention_arguments(state),
        "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
        "norm_op_kwargs": {"affine": True},
    }
    channels, classes = length("encoder.stem.weight", 1), length("decoder.seg_layers.3.2.weight", 0)
    return Conversion(PCTNet, mode, channels, classes, arch_kwargs, state)


def _determine_mode(released: Mapping[str, Tensor], requested: int | None) -> int:
    """Return the requested mode, or the one whose batch statistics have counted batches."""
    counts = [released.get(f"embeddings.{mode}.{_COUNT_OF_BATCHES}") for mode in range(len(MODES))]
    trained = [mode for mode, count in enumerate(counts) if count is not None and count.any()]
    if requested is None and len(trained) == 1:
        return trained[0]
    if requested is None:
        raise UserError(
            "the checkpoint does not show with which resolution mode it was trained "
            f"({'several modes have' if trained else 'no mode has'} updated batch statistics); "
            "take resolution_mode from the configuration of its training: --mode 0|1|2"
        )
    if trained and requested not in trained:
        raise UserError(
            f"--mode {requested}, but the checkpoint was trained with resolution mode {', '.join(map(str, trained))} "
            "(the batch statistics of the others were never updated); leave --mode out"
        )
    return requested


def _rename(released: Mapping[str, Tensor], mode: int) -> dict[str, Tensor]:
    """Return the tensors of a mode with PCTNet's names, in single precision."""
    prefixes = {old.format(mode=mode): new for old, new in _MODULES.items()}
    state: dict[str, Tensor] = {}
    unexpected = []
    for name, value in released.items():
        if _is_unused(name, mode):
            continue
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        tensor: Tensor | None = value
        if name.endswith(_BIAS_TABLE):
            tensor = separate_offsets(value, released.get(name.replace(_BIAS_TABLE, _BIAS_INDEX)))
        if prefix is None or tensor is None:
            unexpected.append(name)
        elif not name.endswith(_BIAS_INDEX):
            new_name = _new_name(name, prefix, prefixes[prefix])
            state[new_name] = tensor.float() if tensor.is_floating_point() else tensor
    require_none_unexpected(unexpected, PCTNet)
    return state


def _is_unused(name: str, mode: int) -> bool:
    """True for embeddings and heads of other modes, and for norms that the original never applies."""
    mode_of_tensor = re.match(r"(?:embeddings|pred_heads)\.([0-2])\.", name)
    if mode_of_tensor is not None and int(mode_of_tensor[1]) != mode:
        return True
    return _UNUSED_NORM.fullmatch(name) is not None


def _new_name(name: str, old_prefix: str, new_prefix: str) -> str:
    inner = name.removeprefix(old_prefix)
    if "convtrans" in old_prefix:
        for old, new in _MODULES_OF_A_BLOCK.items():
            inner = inner.replace(f".{old}", f".{new}")
    return new_prefix + inner


def _read_attention_arguments(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Return depths, heads and windows of the levels 2, 3 and 4."""
    depths, heads, windows = [], [], []
    for level in (2, 3, 4):
        tables = [name for name in state if re.fullmatch(rf"encoder\.stages\.{level}\..*\.position_bias", name)]
        table = tables[0] if tables else f"encoder.stages.{level}.attention.0.attention.position_bias"
        rows, num_heads = (axis_length(state, PCTNet, table, axis) for axis in (0, 1))
        depths.append(len(tables))
        heads.append(num_heads)
        windows.append(window_side(rows))  # below the paper's 6 if feature maps in training were smaller
    return {"depths": depths, "num_heads": heads, "window_sizes": windows}
