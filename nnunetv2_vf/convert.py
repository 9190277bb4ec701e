"""Released MIS-FM checkpoints of PCT-Net as artifacts of this project: state dict in, state dict out.

A release holds an embedding and a prediction head for each of the three resolution modes and was trained with one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pct_net import MODES, PCTNet
from nnunetv2_vf.weights import package_versions, write_artifact

_TABLE = "attn.relative_position_bias_table"
_INDEX = "attn.relative_position_index"
_BATCHES = "conv0.conv_conv.0.num_batches_tracked"

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
        kwargs = self.arch_kwargs
        parameters = sum(tensor.numel() for name, tensor in self.state_dict.items() if "running" not in name)
        return (
            f"PCT-Net of resolution mode {self.mode}, {self.input_channels} input channels, "
            f"{self.num_classes} classes, features {kwargs['features_per_stage']}, heads {kwargs['num_heads']}, "
            f"depths {kwargs['depths']}, windows {kwargs['window_sizes']}; {parameters / 1e6:.1f} M parameters"
        )


def convert_file(release: Path, output: Path, mode: int | None = None) -> Conversion:
    """Write the artifact of a released checkpoint; executes nothing the file may hold.

    Raises:
        UserError: the file is no MIS-FM checkpoint, holds something unexpected, or does not tell its mode.
    """
    if not release.is_file():
        raise UserError(f"no file {release}; MIS-FM's README links the released weights")
    try:
        checkpoint = torch.load(release, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{release} is damaged or needs more than tensors to load: {type(error).__name__}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_state_dict"), dict):
        raise UserError(f"{release} is not a released MIS-FM checkpoint: it has no 'model_state_dict'")
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
    return converted


def convert_state_dict(released: Mapping[str, Any], mode: int | None = None) -> Conversion:
    """Rename a released ``model_state_dict`` for :class:`PCTNet`, in single precision.

    Args:
        mode: the resolution mode to take; None for the only one whose batch statistics have ever been updated.

    Raises:
        UserError: something is missing or unexpected (all of it is listed), or the mode cannot be told.
    """
    mode = _trained_mode(released, mode)
    renamed = _rename(released, mode)
    try:
        features, pyramid, windows = _describe(renamed)
        converted = Conversion(
            mode=mode,
            input_channels=renamed["encoder.stem.weight"].shape[1],
            num_classes=renamed["decoder.seg_layers.3.2.weight"].shape[0],
            arch_kwargs={
                "features_per_stage": features,
                "strides": [list(stride) for stride in MODES[mode]],
                **pyramid,
                "window_sizes": windows,  # less than the 6 of the paper where the trained map was smaller
                "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
                "norm_op_kwargs": {"affine": True},
            },
            state_dict=renamed,
        )
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"the checkpoint is not MIS-FM's PCT-Net: it lacks what PCTNet calls {error}") from None
    _check_complete(converted)
    for name in [name for name in renamed if name.endswith(".position_bias")]:
        renamed[name] = _without_collisions(renamed[name])
    return converted


def _trained_mode(released: Mapping[str, Any], asked: int | None) -> int:
    batches = [int(released.get(f"embeddings.{mode}.{_BATCHES}", 0)) for mode in range(len(MODES))]
    trained = [mode for mode, count in enumerate(batches) if count]
    if asked is None and len(trained) == 1:
        return trained[0]
    if asked is None:
        raise UserError("the checkpoint does not tell the resolution mode it was trained with; say it: --mode 0|1|2")
    if trained and asked not in trained:
        raise UserError(
            f"--mode {asked}, but the checkpoint was trained with resolution mode {', '.join(map(str, trained))} "
            "(the others' batch statistics have seen no batch); leave --mode out"
        )
    return asked


def _rename(released: Mapping[str, Any], mode: int) -> dict[str, Tensor]:
    prefixes = {old.format(mode=mode): new for old, new in _MODULES.items()}
    renamed: dict[str, Tensor] = {}
    unexpected = []
    for name, value in released.items():
        if _is_unused(name, mode):
            continue
        old = next((prefix for prefix in prefixes if name.startswith(prefix + ".")), None)
        if old is None or not isinstance(value, Tensor):
            unexpected.append(name)
        elif name.endswith(_INDEX):
            if not torch.equal(value.long(), _released_index(round(len(value) ** (1 / 3)))):
                unexpected.append(name)
        else:
            inner = name.removeprefix(old)
            for theirs, ours in _WITHIN_A_BLOCK.items():
                inner = inner.replace(f".{theirs}", f".{ours}") if "convtrans" in old else inner
            renamed[prefixes[old] + inner] = value.float() if value.is_floating_point() else value
    if unexpected:
        raise UserError(f"the checkpoint is not MIS-FM's PCT-Net: unexpected {', '.join(sorted(unexpected))}")
    return renamed


def _is_unused(name: str, mode: int) -> bool:
    """Embeddings and heads of other modes, and a norm at each PCT block's end that the original never applies."""
    other_mode = re.match(r"(embeddings|pred_heads)\.([0-2])\.", name)
    return (other_mode is not None and int(other_mode[2]) != mode) or ".norm_layer." in name


def _describe(state: Mapping[str, Tensor]) -> tuple[list[int], dict[str, list[int]], list[int]]:
    """Features of the levels; depths and heads of the pyramid's; and their window sizes."""
    features = [state["encoder.stem.weight"].shape[0]]
    features += [state[f"encoder.downs.{i}.conv.2.weight"].shape[0] for i in range(4)]
    depths, heads, windows = [], [], []
    for level in (2, 3, 4):
        tables = [n for n in state if re.fullmatch(rf"encoder\.stages\.{level}\..*\.position_bias", n)]
        rows, num_heads = state[tables[0]].shape
        depths.append(len(tables))
        heads.append(num_heads)
        windows.append((round(rows ** (1 / 3)) + 1) // 2)
    return features, {"depths": depths, "num_heads": heads}, windows


def _check_complete(converted: Conversion) -> None:
    """Compare names and shapes with the network that the weights are for."""
    kwargs = {key: value for key, value in converted.arch_kwargs.items() if key != "norm_op"}
    try:
        with torch.device("meta"):
            network = PCTNet(converted.input_channels, num_classes=converted.num_classes, **kwargs)
    except ValueError as error:
        raise UserError(f"the checkpoint is not MIS-FM's PCT-Net: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in converted.state_dict.items()}
    wrong = [
        f"{name} {found.get(name, 'missing')} (expected {expected.get(name, 'nothing')})"
        for name in sorted({*expected, *found})
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise UserError(f"the checkpoint does not fit the PCT-Net its tensors describe: {'; '.join(wrong)}")


def _released_index(window: int) -> Tensor:
    """MIS-FM's row of the bias table for each pair of tokens: (N, N).

    With the shifted offsets z, y, x from 0 to 2w - 2 it is z * (3w - 1) + y * (2w - 1) + x, where (2w - 1)^2 was
    meant: different offsets share a row, and most rows are never used.
    """
    return _released_row(*_offsets(window), window).reshape(window**3, -1)


def _offsets(window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets z, y, x between two tokens of a window, from 0, broadcastable to (z, y, x, z', y', x')."""
    token = torch.arange(window)
    offset = token[:, None] - token + window - 1
    return offset[:, None, None, :, None, None], offset[:, None, None, :, None], offset[:, None, None, :]


def _released_row(z: Tensor, y: Tensor, x: Tensor, window: int) -> Tensor:
    return z * (3 * window - 1) + y * (2 * window - 1) + x


def _without_collisions(table: Tensor) -> Tensor:
    """A released bias table, ((2w - 1)^3, heads), with a row of its own for each offset.

    The bias of a pair of tokens stays the same: which row it is read from is a function of the offset alone.
    """
    window = (round(table.shape[0] ** (1 / 3)) + 1) // 2
    offset = torch.arange(2 * window - 1)
    return table[_released_row(offset[:, None, None], offset[:, None], offset, window).flatten()]
