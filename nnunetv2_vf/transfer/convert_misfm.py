"""Other projects' checkpoints as artifacts of this one. MIS-FM's PCT-Net: state dict in, state dict out.

A release holds an embedding and a prediction head for each of the three resolution modes and was trained with one.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet
from nnunetv2_vf.transfer import convert_nnssl as nnssl
from nnunetv2_vf.transfer.artifact import check_output, load_safely, package_versions, write_artifact
from nnunetv2_vf.transfer.safe_loading import as_described
from nnunetv2_vf.window_attention import window_side

_TABLE = "attn.relative_position_bias_table"
_INDEX = "attn.relative_position_index"
_BATCHES = "conv0.conv_conv.0.num_batches_tracked"
_UNUSED_NORM = r"pyramid_ct\.convtrans_[ed][234]\.norm_layer\.(weight|bias)"

# What a plan of PCTNetPlanner says of the network; the rest follows from the mode.
_PLANNED = {"features_per_stage": list(PUBLISHED_FEATURES)} | {
    name: list(inspect.signature(PCTNet).parameters[name].default) for name in ("depths", "num_heads", "window_sizes")
}
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
# ... and within a PCT block.
_WITHIN_A_BLOCK = {
    "conv.conv_conv": "convolution",
    "trans.blocks": "attention",
    _TABLE: "attention.position_bias",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.projection",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


@dataclass(frozen=True)
class Conversion:
    """A released network: how to build it, and its weights under PCTNet's names."""

    mode: int
    input_channels: int
    num_classes: int
    arch_kwargs: dict[str, Any]  # plain; of a plan's entry
    state_dict: dict[str, Tensor]

    def __str__(self) -> str:
        shape = {name: self.arch_kwargs[name] for name in _PLANNED}
        parameters = sum(tensor.numel() for tensor in self.state_dict.values()) / 1e6
        return (
            f"PCT-Net of resolution mode {self.mode}, {self.input_channels} input channels, "
            f"{self.num_classes} classes, {', '.join(f'{name} {value}' for name, value in shape.items())}; "
            f"{parameters:.1f} M parameters"
        )


def convert_file(release: Path, output: Path, mode: int | None = None) -> str:
    """Write the artifact of a checkpoint of MIS-FM or nnssl, and say what it is; executes nothing the file may hold.

    Args:
        mode: of MIS-FM: see :func:`convert_state_dict`.

    Raises:
        UserError: the file is no such checkpoint, holds something unexpected, or does not tell its mode; or the
            output cannot be written.
    """
    if not release.is_file():
        raise UserError(f"no file {release}; https://github.com/openmedlab/MIS-FM links the released weights")
    check_output(output, release)
    checkpoint = load_safely(release)
    if nnssl.is_checkpoint(checkpoint):
        if mode is not None:
            raise UserError(f"--mode {mode}, but {release} is a checkpoint of nnssl; leave --mode out")
        with as_described(release):
            weights, metadata = nnssl.convert_checkpoint(checkpoint)
        metadata["converted_from"]["file"] = release.name
        write_artifact(output, weights, {**metadata, "versions": package_versions()}, checkpoint[nnssl.PLAN_KEY])
        network = metadata["architecture"]["network_class_name"].rpartition(".")[2]
        return f"{network} of nnssl, {metadata['num_input_channels']} input channels, {metadata['num_classes']} classes"
    if not isinstance(checkpoint.get("model_state_dict"), dict):
        raise UserError(
            f"{release} is no checkpoint of MIS-FM or nnssl: it has neither 'model_state_dict' nor '{nnssl.PLAN_KEY}'"
        )
    converted = convert_state_dict(checkpoint["model_state_dict"], mode)
    metadata = {
        "architecture": {
            "network_class_name": f"{PCTNet.__module__}.{PCTNet.__qualname__}",
            "arch_kwargs": converted.arch_kwargs,
            "_kw_requires_import": ["norm_op"],
        },
        "num_input_channels": converted.input_channels,
        "num_classes": converted.num_classes,
        "converted_from": {"project": "MIS-FM", "file": release.name, "resolution_mode": converted.mode},
        "versions": package_versions(),
    }
    write_artifact(output, converted.state_dict, metadata)
    return str(converted)


def convert_state_dict(released: Mapping[str, Any], mode: int | None = None) -> Conversion:
    """Rename a released ``model_state_dict`` for :class:`PCTNet`, in single precision.

    Args:
        mode: the resolution mode to take; None for the only one whose batch statistics have ever been updated.

    Raises:
        UserError: something is missing or unexpected (all of it is listed), or the mode cannot be told.
    """
    _refuse([str(name) for name, value in released.items() if not isinstance(name, str) or not _is_sound(value)])
    mode = _trained_mode(released, mode)
    state = _rename(released, mode)
    try:
        arch_kwargs = {
            "features_per_stage": _features(state),
            "strides": [list(stride) for stride in MODES[mode]],
            **_attention(state),
            "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
            "norm_op_kwargs": {"affine": True},
        }
        channels, classes = state["encoder.stem.weight"].shape[1], state["decoder.seg_layers.3.2.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError(f"the checkpoint is not MIS-FM's PCT-Net: it lacks what PCTNet calls {error}") from None
    converted = Conversion(mode, channels, classes, arch_kwargs, state)
    _check_complete(converted)
    return converted


def _is_sound(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(value.isfinite().all())


def _refuse(unexpected: list[str]) -> None:
    if unexpected:
        raise UserError(f"the checkpoint is not MIS-FM's PCT-Net: unexpected {', '.join(sorted(unexpected))}")


def _trained_mode(released: Mapping[str, Tensor], asked: int | None) -> int:
    batches = [released.get(f"embeddings.{mode}.{_BATCHES}") for mode in range(len(MODES))]
    trained = [mode for mode, count in enumerate(batches) if count is not None and count.any()]
    if asked is None and len(trained) == 1:
        return trained[0]
    if asked is None:
        raise UserError(
            "the checkpoint does not tell the resolution mode it was trained with (no batch statistics are in use); "
            "take resolution_mode of the configuration it was trained with: --mode 0|1|2"
        )
    if trained and asked not in trained:
        raise UserError(
            f"--mode {asked}, but the checkpoint was trained with resolution mode {', '.join(map(str, trained))} "
            "(the others' batch statistics have seen no batch); leave --mode out"
        )
    return asked


def _rename(released: Mapping[str, Tensor], mode: int) -> dict[str, Tensor]:
    prefixes = {old.format(mode=mode): new for old, new in _MODULES.items()}
    state: dict[str, Tensor] = {}
    unexpected = []
    for name, value in released.items():
        if _is_unused(name, mode):
            continue
        old = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        if old is None:
            unexpected.append(name)
        elif name.endswith(_TABLE):
            table = _without_collisions(value, released.get(name.replace(_TABLE, _INDEX)))
            if table is None:
                unexpected.append(name)
            else:
                state[_new_name(name, old, prefixes[old])] = table.float()
        elif not name.endswith(_INDEX):
            state[_new_name(name, old, prefixes[old])] = value.float() if value.is_floating_point() else value
    _refuse(unexpected)
    return state


def _new_name(name: str, old: str, new: str) -> str:
    inner = name.removeprefix(old)
    if "convtrans" in old:
        for theirs, ours in _WITHIN_A_BLOCK.items():
            inner = inner.replace(f".{theirs}", f".{ours}")
    return new + inner


def _is_unused(name: str, mode: int) -> bool:
    """Embeddings and heads of other modes, and a norm at each PCT block's end that the original never applies."""
    other_mode = re.match(r"(?:embeddings|pred_heads)\.([0-2])\.", name)
    return (other_mode is not None and int(other_mode[1]) != mode) or bool(re.fullmatch(_UNUSED_NORM, name))


def _features(state: Mapping[str, Tensor]) -> list[int]:
    downs = [state[f"encoder.downs.{i}.conv.2.weight"].shape[0] for i in range(4)]
    return [state["encoder.stem.weight"].shape[0], *downs]


def _attention(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Depths, heads and windows of the levels 2, 3 and 4."""
    depths, heads, windows = [], [], []
    for level in (2, 3, 4):
        tables = [n for n in state if re.fullmatch(rf"encoder\.stages\.{level}\..*\.position_bias", n)]
        if not tables:
            raise KeyError(f"encoder.stages.{level}.attention")
        rows, num_heads = state[tables[0]].shape
        depths.append(len(tables))
        heads.append(num_heads)
        windows.append(window_side(rows))  # less than the 6 of the paper where the trained map was smaller
    return {"depths": depths, "num_heads": heads, "window_sizes": windows}


def _check_complete(converted: Conversion) -> None:
    """Compare names, shapes and types with the network that the weights are for."""
    kwargs = {key: value for key, value in converted.arch_kwargs.items() if key != "norm_op"}
    try:
        with torch.device("meta"):
            network = PCTNet(converted.input_channels, num_classes=converted.num_classes, **kwargs)
    except ValueError as error:
        raise UserError(f"the checkpoint is not MIS-FM's PCT-Net: {error}") from error
    expected = {name: _kind(tensor) for name, tensor in network.state_dict().items()}
    found = {name: _kind(tensor) for name, tensor in converted.state_dict.items()}
    wrong = [
        f"{name} {found.get(name, 'missing')} (expected {expected.get(name, 'nothing')})"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise UserError(f"the checkpoint does not fit the PCT-Net its tensors describe: {'; '.join(wrong)}")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _released_row(z: Tensor, y: Tensor, x: Tensor, window: int) -> Tensor:
    """MIS-FM's row of the bias table for an offset between two tokens, each of z, y, x from 0 to 2w - 2.

    It counts (3w - 1) rows per z where (2w - 1)^2 are meant: offsets share rows, and most rows are never used.
    """
    return z * (3 * window - 1) + y * (2 * window - 1) + x


def _released_index(window: int) -> Tensor:
    """MIS-FM's table of rows for all pairs of tokens of a window, (N, N)."""
    tokens = torch.cartesian_prod(*[torch.arange(window)] * 3).view(-1, 3)
    z, y, x = (tokens[:, None] - tokens + window - 1).unbind(-1)
    return _released_row(z, y, x, window)


def _without_collisions(table: Tensor, index: Tensor | None) -> Tensor | None:
    """A released bias table, ((2w - 1)^3, heads), with a row of its own for each offset; None if it is none.

    The bias of a pair of tokens stays the same: which row it is read from is a function of the offset alone.

    Args:
        index: the release's own table of rows, which must be the one this conversion undoes.
    """
    if table.ndim != 2 or 0 in table.shape or index is None:
        return None
    window = window_side(table.shape[0])
    if table.shape[0] != (2 * window - 1) ** 3 or index.shape != (window**3, window**3):
        return None
    if not torch.equal(index.long(), _released_index(window)):
        return None
    offset = torch.arange(2 * window - 1)
    return table[_released_row(offset[:, None, None], offset[:, None], offset, window).flatten()]
