"""Pretrained weights in another network: other channels, kernels, stages, attention windows or resolution modes.

Every rule keeps what the network computes where it can: for inputs whose channels are alike, for inputs that do not
change along an axis, for offsets between tokens that pretraining has seen. Changing something and changing it back
gives the original wherever the first change loses nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.artifact import check_output, package_versions, read_described, storage_key, write_artifact
from nnunetv2_vf.transfer.compatibility import like_command
from nnunetv2_vf.transfer.safe_loading import can_be_planned
from nnunetv2_vf.transfer.target_plans import TargetPlans, build_network
from nnunetv2_vf.window_attention import window_side

TRANSFERRED, ADAPTED, RANDOM = "transferred", "adapted", "left at random"
_SEED = 0  # of what is left at random
# Decoders number their stages from the deepest, so that the same level has another number in a deeper network.
_DECODER_STAGE = re.compile(r"^decoder\.(stages|transpconvs|ups|seg_layers)\.(\d+)(?=\.)")


@dataclass(frozen=True)
class Fate:
    """What became of one tensor of the target network."""

    name: str
    parameters: int
    what: str  # TRANSFERRED, ADAPTED or RANDOM
    how: str = ""
    fits: bool = True  # False: pretraining has this tensor, but with other features


def adapt_file(
    pretrained_file: Path, target: TargetPlans, output: Path, partial: bool = False, encoder_only: bool = False
) -> str:
    """Write pretrained weights in the form that a target's plans need; returns the table of what became of them.

    Args:
        pretrained_file: an artifact, or an nnU-Net checkpoint.
        output: an artifact that stock ``-pretrained_weights`` accepts for ``target``.
        partial: leave at random what has other features, instead of refusing them.
        encoder_only: leave the decoder at random, as nnssl's fine-tuning does.

    Raises:
        UserError: a file cannot be read or written, or the networks differ in their class or features.
    """
    check_output(output, pretrained_file)
    artifact = read_described(pretrained_file)
    pretrained = artifact["vf"]
    theirs, ours = pretrained["architecture"]["network_class_name"], target.architecture["network_class_name"]
    like = like_command(pretrained_file, target)
    mend = f"plan with the pretrained network: {like}; or " if can_be_planned(pretrained["architecture"]) else ""
    if theirs != ours and not partial:
        raise UserError(
            f"{pretrained_file} holds weights of {theirs}, but {target} has {ours}; {mend}transfer what fits: --partial"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = build_network(target.architecture, target.input_channels, pretrained["num_classes"], device="cpu")
    before = pretrained.get("adapted", {})
    fates = transfer(artifact["network_weights"], network, encoder_only, frozenset(before.get("left_at_random", ())))
    mismatched_tensors = [fate for fate in fates if not fate.fits]
    if mismatched_tensors and not partial:
        first = mismatched_tensors[0]
        raise UserError(
            f"{len(mismatched_tensors)} tensors of {target} have other features than in {pretrained_file}, "
            f"{first.name} for one ({first.how}); {mend}transfer what fits: --partial"
        )
    metadata = {
        **pretrained,
        "architecture": target.architecture,
        "num_input_channels": target.input_channels,
        "adapted": {
            "from": before.get("from", pretrained_file.name),
            "for": {
                "dataset": target.plans_manager.dataset_name,
                "plans": target.plans_manager.plans_name,
                "configuration": target.configuration_name,
            },
            "pretrained_input_channels": before.get("pretrained_input_channels", pretrained["num_input_channels"]),
            "encoder_only": encoder_only or before.get("encoder_only", False),
            "transferred_share": transferred_share(fates),
            "left_at_random": [fate.name for fate in fates if fate.what == RANDOM],
        },
        "versions": package_versions(),
    }
    write_artifact(output, network.state_dict(), metadata)
    return table(fates)


def transfer(
    pretrained: Mapping[str, Tensor],
    network: nn.Module,
    encoder_only: bool = False,
    at_random: frozenset[str] = frozenset(),
) -> list[Fate]:
    """Copy pretrained weights into a network, adapted to its shapes; each tensor once, whatever its names.

    Args:
        pretrained: weights of a network of the same kind.
        network: changed in place; what has no counterpart stays as it is.
        encoder_only: whether the decoder stays as it is.
        at_random: names of the pretrained weights that no pretraining has seen.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    inputs = {f"{key}.weight" for key in getattr(network, "keys_to_in_proj", ())}
    encoder = tuple(getattr(network, key, "encoder") + "." for key in ("key_to_encoder", "key_to_stem"))
    deeper = _decoder_stages(pretrained) - _decoder_stages(network.state_dict())
    seen = set()
    fates = []
    for name, tensor in network.state_dict().items():
        if storage_key(tensor) in seen:
            continue
        seen.add(storage_key(tensor))
        if encoder_only and not name.startswith(encoder) and HEADS not in name:
            fates.append(Fate(name, tensor.numel(), RANDOM, "decoder"))
            continue
        source_name = _same_level(name, deeper)
        source = pretrained.get(source_name)
        if source is None:
            fates.append(Fate(name, tensor.numel(), RANDOM, "not in the pretrained network"))
            continue
        module = modules[name.rpartition(".")[0]]
        adapted, how = _fit(source, tensor.shape, module, name.rpartition(".")[2], name in inputs)
        if adapted is None:
            fates.append(Fate(name, tensor.numel(), RANDOM, how, fits=False))
            continue
        tensor.copy_(adapted)
        if source_name in at_random:
            fates.append(Fate(name, tensor.numel(), RANDOM, "at random in the pretrained file already"))
            continue
        fates.append(Fate(name, tensor.numel(), ADAPTED if how else TRANSFERRED, how))
    return fates


def _decoder_stages(names: Mapping[str, Any]) -> int:
    found = [_DECODER_STAGE.match(name) for name in names]
    return 1 + max((int(match[2]) for match in found if match and match[1] == "stages"), default=-1)


def _same_level(name: str, deeper: int) -> str:
    """The name of a tensor's counterpart in a network with ``deeper`` more decoder stages."""
    return _DECODER_STAGE.sub(lambda match: f"decoder.{match[1]}.{int(match[2]) + deeper}", name)


def _fit(
    source: Tensor, shape: torch.Size, module: nn.Module, parameter: str, is_input: bool
) -> tuple[Tensor | None, str]:
    """The source in another shape and how it got there ("" if unchanged); None and the reason if it does not fit."""
    adapted, how = source, []
    if is_input and source.shape[1] != shape[1]:
        adapted = fit_channels(adapted, shape[1])
        how.append(f"input channels {source.shape[1]} -> {shape[1]}")
    if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and parameter == "weight":
        kernels = _triple(source.shape[2:]), _triple(shape[2:])
        if kernels[0] != kernels[1]:
            is_convolution = isinstance(module, nn.Conv3d)
            adapted = fit_kernel(adapted, kernels[1]) if is_convolution else F.adaptive_avg_pool3d(adapted, kernels[1])
            kind = "kernel" if is_convolution else "upsampling"
            how.append(f"{kind} {_times(kernels[0])} -> {_times(kernels[1])}")
    if parameter == "position_bias" and source.shape[0] != shape[0]:
        adapted = fit_position_bias(adapted, shape[0])
        how.append(f"window {window_side(source.shape[0])} -> {window_side(shape[0])}")
    if adapted.shape != shape:
        return None, f"{_times(source.shape)} against {_times(shape)}"
    return adapted, ", ".join(how)


def fit_channels(weight: Tensor, channels: int) -> Tensor:
    """A convolution for another number of input channels, with the same answer to channels that are all alike.

    Args:
        weight: (features, old channels, D, H, W). New channel j takes old channel j modulo their number, divided by
            how many take it; where there are fewer new ones, each takes the sum of the old ones that would be its.
    """
    old = weight.shape[1]
    if channels < old:
        return torch.stack([weight[:, j::channels].sum(1) for j in range(channels)], dim=1)
    taken = torch.arange(channels) % old
    shares = torch.bincount(taken, minlength=old)[taken]
    return weight[:, taken] / shares.view(-1, 1, 1, 1).to(weight)


def fit_kernel(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """A convolution with another kernel, centred on the same voxel.

    A longer kernel is filled up with zeros: the same convolution. Of a shorter one the outermost entries take in what
    is cut off, so that the answer to an image that does not change along that axis stays the same.

    Args:
        weight: (features, channels, D, H, W).
    """
    for axis, size in enumerate(kernel, start=2):
        margin, odd = divmod(weight.shape[axis] - size, 2)
        if odd:  # no common centre: such kernels do not fit
            return weight
        if margin < 0:
            padding = [0, 0] * (weight.ndim - 1 - axis) + [-margin, -margin]
            weight = F.pad(weight, padding)
        elif margin > 0:
            before, kept, after = weight.split([margin, size, margin], axis)
            kept = kept.clone()
            kept.narrow(axis, 0, 1).add_(before.sum(axis, keepdim=True))
            kept.narrow(axis, size - 1, 1).add_(after.sum(axis, keepdim=True))
            weight = kept
    return weight


def fit_position_bias(table: Tensor, rows: int) -> Tensor:
    """A relative position bias for another window: the same for offsets both know, the nearest known beyond.

    Args:
        table: ((2 * window - 1)^3, heads), of :class:`nnunetv2_vf.window_attention.WindowAttention`.
        rows: of the new table.
    """
    old, new = window_side(table.shape[0]), window_side(rows)
    offset = torch.arange(1 - new, new).clamp(1 - old, old - 1) + old - 1
    span = 2 * old - 1
    taken = (offset[:, None, None] * span + offset[:, None]) * span + offset
    return table[taken.flatten()]


def _triple(sides: Sequence[int]) -> tuple[int, int, int]:
    depth, height, width = sides
    return depth, height, width


def _times(sides: Sequence[int]) -> str:
    return "x".join(map(str, sides))


def transferred_share(fates: Sequence[Fate]) -> float:
    """Parameters that come from pretraining, adapted or not, as a share of all but the heads'."""
    body = [fate for fate in fates if HEADS not in fate.name]
    return sum(fate.parameters for fate in body if fate.what != RANDOM) / sum(fate.parameters for fate in body)


def table(fates: Sequence[Fate]) -> str:
    """Tensors and parameters by what became of them; without the heads, which every fine-tuning has anew."""
    body = [fate for fate in fates if HEADS not in fate.name]
    total = sum(fate.parameters for fate in body)
    groups: dict[tuple[str, str], list[Fate]] = defaultdict(list)
    for what in (TRANSFERRED, ADAPTED, RANDOM):
        groups[what, ""] = [fate for fate in body if fate.what == what]
        for fate in groups[what, ""]:
            if fate.how:
                groups[what, fate.how if fate.fits else "other features"].append(fate)
    rows = [("", "tensors", "parameters", "share")]
    for (what, how), members in groups.items():
        parameters = sum(fate.parameters for fate in members)
        rows.append(("  " + how if how else what, str(len(members)), str(parameters), f"{parameters / total:.2%}"))
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"{label:<{width}}{n:>9}{p:>12}{share:>9}" for label, n, p, share in rows)
