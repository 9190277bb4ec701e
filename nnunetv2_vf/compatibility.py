"""Whether pretrained weights fit a target's plans, and what differs between pretraining and fine-tuning."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.target import Target, build_network
from nnunetv2_vf.weights import HEADS

_HU = "CTNormalization"
# Differences in the normalisation of HU that are worth a word: of the means, in standard deviations, and between those.
_SHIFT, _STRETCH = 0.25, 1.5


@dataclass(frozen=True)
class Difference:
    """Something that fine-tuning shows the network otherwise than pretraining did."""

    what: str
    pretrained: str
    target: str
    cost: str

    def __str__(self) -> str:
        return f"{self.what}: {self.pretrained} in pretraining, {self.target} here: {self.cost}"


def pretrained_weights_argument(arguments: Sequence[str]) -> Path | None:
    """The file that a command line of nnUNetv2_train names for ``-pretrained_weights``.

    nnU-Net does not tell its trainers.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("-pretrained_weights")
    parser.add_argument("-p")  # or it would be taken for an abbreviation
    try:
        found = parser.parse_known_args(list(arguments))[0].pretrained_weights
    except argparse.ArgumentError:  # of a program that is not nnUNetv2_train
        return None
    return None if found is None else Path(found)


def misfits(weights: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """The tensors of ``network`` for which stock ``-pretrained_weights`` would refuse ``weights``."""
    return [
        name
        for name, tensor in network.state_dict().items()
        if HEADS not in name and (name not in weights or weights[name].shape != tensor.shape)
    ]


def require_fit(file: Path, pretrained: Mapping[str, Any], target: Target) -> None:
    """Raise UserError unless stock ``-pretrained_weights`` accepts the weights for the target's plans.

    Args:
        pretrained: of :func:`nnunetv2_vf.weights.read_pretrained`.
    """
    network = build_network(target.architecture, target.input_channels, target.num_classes)
    wrong = misfits(pretrained["network_weights"], network)
    if not wrong:
        return
    plans, configuration = target.plans_manager.plans_name, target.configuration_name
    raise UserError(
        f"{file} does not fit {target}: {_why(pretrained['vf'], target, wrong)}. Adapt it: nnUNetv2_vf adapt {file} "
        f"-d {target.dataset_id} -p {plans} -c {configuration} -o adapted.pth; or plan with its network: "
        f"nnUNetv2_vf plan -d {target.dataset_id} --like {file}"
    )


def _why(pretrained: Mapping[str, Any], target: Target, wrong: Sequence[str]) -> str:
    """The settings of the networks that differ, each with the pretrained value and the target's."""
    different = []
    if "architecture" in pretrained:
        theirs, ours = pretrained["architecture"], target.architecture
        pairs = {
            "network": (theirs["network_class_name"], ours["network_class_name"]),
            "input channels": (pretrained["num_input_channels"], target.input_channels),
        }
        if theirs["network_class_name"] == ours["network_class_name"]:
            names = sorted({*theirs["arch_kwargs"], *ours["arch_kwargs"]})
            pairs |= {name: (theirs["arch_kwargs"].get(name), ours["arch_kwargs"].get(name)) for name in names}
        different = [f"{name} {old} against {new}" for name, (old, new) in pairs.items() if old != new]
    return "; ".join(different) or f"{len(wrong)} tensors are missing or of another shape, {wrong[0]} for one"


def differences(pretrained: Mapping[str, Any], target: Target) -> list[Difference]:
    """Compare channels, normalisation, spacing and axis order of pretraining with the target's plans.

    Args:
        pretrained: the artifact's ``vf`` metadata.
    """
    if not pretrained.get("normalization_schemes"):
        cost = "compare them yourself with what the weights' authors say"
        return [Difference("spacing and normalisation", "not recorded", "the plans'", cost)]
    found = [
        _channels(pretrained, target),
        _normalization(pretrained, target),
        _intensities(pretrained, target),
        _spacing(pretrained, target),
        _axes(pretrained, target),
    ]
    return [difference for difference in found if difference is not None]


def _channels(pretrained: Mapping[str, Any], target: Target) -> Difference | None:
    theirs, ours = list(pretrained.get("channel_names", {}).values()), list(target.channel_names.values())
    if not theirs or [n.lower() for n in theirs] == [n.lower() for n in ours]:
        return None
    cost = "the first layers meet other images; expect to gain less than within a modality"
    return Difference("channels", ", ".join(theirs), ", ".join(ours), cost)


def _normalization(pretrained: Mapping[str, Any], target: Target) -> Difference | None:
    theirs, ours = pretrained["normalization_schemes"], list(target.configuration.normalization_schemes)
    if set(theirs) == set(ours):
        return None
    cost = "intensities mean something else than in pretraining, the costliest of all; plan --normalization pretrained"
    return Difference("normalisation", ", ".join(theirs), ", ".join(ours), cost)


def _intensities(pretrained: Mapping[str, Any], target: Target) -> Difference | None:
    """For CT, what water and muscle become: the mean and standard deviation by which both normalise HU."""
    schemes = pretrained["normalization_schemes"], target.configuration.normalization_schemes
    if "plans" not in pretrained or any(scheme[0] != _HU for scheme in schemes):
        return None
    theirs, ours = (
        manager.foreground_intensity_properties_per_channel["0"]
        for manager in (PlansManager(pretrained["plans"]), target.plans_manager)
    )
    shift = abs(theirs["mean"] - ours["mean"]) / max(theirs["std"], ours["std"])
    ratio = max(theirs["std"], ours["std"]) / max(min(theirs["std"], ours["std"]), 1e-8)
    if shift <= _SHIFT and ratio <= _STRETCH:
        return None
    before, here = (f"(HU - {p['mean']:.0f}) / {p['std']:.0f}" for p in (theirs, ours))
    cost = "the same tissue has another value than in pretraining; plan --normalization pretrained"
    return Difference("intensities", before, here, cost)


def _spacing(pretrained: Mapping[str, Any], target: Target) -> Difference | None:
    theirs, ours = pretrained.get("spacing"), target.configuration.spacing
    if not theirs:
        return None
    low, high = pretrained.get("settings", {}).get("crop_scale", VFSettings().crop_scale)
    scales = [old / new for old, new in zip(theirs, ours, strict=True)]
    if all(low * (1 - 1e-6) <= 1 / scale <= high * (1 + 1e-6) for scale in scales):
        return None
    cost = (
        f"structures are {' x '.join(f'{scale:.2g}' for scale in scales)} times as long in voxels, beyond the scales "
        "of pretraining's crops; plan --spacing pretrained"
    )
    return Difference("spacing", _millimetres(theirs), _millimetres(ours), cost)


def _axes(pretrained: Mapping[str, Any], target: Target) -> Difference | None:
    if "plans" not in pretrained:
        return None
    theirs, ours = pretrained["plans"]["transpose_forward"], list(target.plans_manager.transpose_forward)
    if theirs == ours:
        return None
    cost = "the network's axes are others of the body; flips do not make up for that, fine-tuning has to"
    return Difference("axis order", str(theirs), str(ours), cost)


def _millimetres(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing) + " mm"


def fit_in_words(pretrained: Mapping[str, Any], target: Target) -> list[str]:
    """A line for each difference, or that there is none."""
    return [str(difference) for difference in differences(pretrained, target)] or [
        "channels, normalisation, spacing and axis order are as in pretraining"
    ]
