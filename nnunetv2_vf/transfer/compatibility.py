"""Whether pretrained weights fit a target's plans, and what differs between pretraining and fine-tuning."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.artifact import copy_weights, read_pretrained
from nnunetv2_vf.transfer.safe_loading import as_described, can_be_planned
from nnunetv2_vf.transfer.target_plans import TargetPlans, build_network

_HU = "CTNormalization"
# Differences in the normalisation of HU that are worth a word: of the means, in standard deviations, and between those.
_SHIFT, _STRETCH = 0.25, 1.5
_TRAINING_COMMANDS = ("nnUNetv2_train", "run_training", "distributed")  # the last is nnunetv2_vf.distributed
_OPTION = "-pretrained_weights"
_MR = "mr"  # what unspecified magnetic resonance images are called, with or without numbers: MR, MRI, MRI2
_MR_CONTRAST = re.compile(r"(mri?|adc|pd)(?![a-z])|t[12]|flair|dwi|swi")


@dataclass(frozen=True)
class Difference:
    """Something that fine-tuning shows the network otherwise than pretraining did."""

    what: str
    pretrained: str
    target: str
    cost: str

    def __str__(self) -> str:
        return printable(f"{self.what}: {self.pretrained} in pretraining, {self.target} here: {self.cost}")


def pretrained_weights_argument(command: Sequence[str]) -> Path | None:
    """The file that a command line names for ``-pretrained_weights``, if it is one that trains.

    nnU-Net does not tell its trainers.
    """
    if Path(command[0]).stem not in _TRAINING_COMMANDS:
        return None
    for word, following in itertools.zip_longest(command[1:], command[2:]):
        if word == _OPTION and following is not None:
            return Path(following)
        if word.startswith(f"{_OPTION}="):
            return Path(word.removeprefix(f"{_OPTION}="))
    return None


def mismatched_tensors(weights: Mapping[str, Tensor], network: nn.Module) -> list[str]:
    """The tensors of ``network`` for which stock ``-pretrained_weights`` would refuse ``weights``."""
    return [
        name
        for name, tensor in network.state_dict().items()
        if HEADS not in name and (name not in weights or weights[name].shape != tensor.shape)
    ]


def require_fit(file: Path, pretrained: Mapping[str, Any], target: TargetPlans) -> None:
    """Raise UserError unless stock ``-pretrained_weights`` accepts the weights for the target's plans.

    Args:
        pretrained: of :func:`nnunetv2_vf.transfer.artifact.read_pretrained`.
    """
    network = build_network(target.architecture, target.input_channels, target.num_classes)
    wrong = mismatched_tensors(pretrained["network_weights"], network)
    if not wrong:
        return
    different = _network_differences(pretrained["vf"], target)
    why = "; ".join(f"{name} {old} against {new}" for name, (old, new) in different.items())
    why = why or f"{len(wrong)} tensors are missing or of another shape, {wrong[0]} for one"
    ways = []
    if different and _adaptable(different) and target.configuration.previous_stage_name is None:
        ways.append(f"adapt it: {adapt_command(file, target)}")
    if different and different.keys() != {_INPUT_CHANNELS} and can_be_planned(pretrained["vf"]["architecture"]):
        ways.append(f"plan with its network: {like_command(file, target)}")
    ways = ways or [f"what it is: nnUNetv2_vf info {shlex.quote(str(file))}"]
    raise UserError(f"{file} does not fit {target}: {why}; {'; or '.join(ways)}")


@dataclass(frozen=True)
class PretrainedWeights:
    """The weights that a training starts from: they fit its network.

    Attributes:
        file: of ``-pretrained_weights``.
        record: plain data for the log and for checkpoints: file name, dataset, and how both trainings compare.
    """

    file: Path
    record: dict[str, Any]

    @classmethod
    def of_command(cls, command: Sequence[str], target: TargetPlans) -> PretrainedWeights | None:
        """Read and check the file that a training command names; None if it names none.

        Raises:
            UserError: the file cannot be read, or its weights do not fit the target's network.
        """
        file = pretrained_weights_argument(command)
        if file is None:
            return None
        weights = read_pretrained(file)
        metadata = weights["vf"]
        with as_described(file):
            require_fit(file, weights, target)
            compared = describe_fit(metadata, target)
        record = {
            "file": file.name,  # without its folder: the record leaves with a shared model
            "dataset": metadata.get("dataset"),
            "num_cases": metadata.get("num_cases"),
            "adapted": metadata.get("adapted"),
            "compared": compared,
        }
        return cls(file, record)

    def copy_into(self, network: nn.Module) -> None:
        """Copy all weights but the heads' into a network, as stock ``-pretrained_weights`` does."""
        copy_weights(read_pretrained(self.file)["network_weights"], network)


_NETWORK, _INPUT_CHANNELS = "network", "input channels"
_NOT_ADAPTABLE = {_NETWORK, "conv_op", "num_heads"}
_WITHOUT_SHAPE = ("norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs")  # ... and no say in what fits


def _adaptable(different: Mapping[str, tuple[Any, Any]]) -> bool:
    theirs, ours = different.get("features_per_stage", ((), ()))
    return not different.keys() & _NOT_ADAPTABLE and all(a == b for a, b in zip(theirs, ours, strict=False))


def _network_differences(pretrained: Mapping[str, Any], target: TargetPlans) -> dict[str, tuple[Any, Any]]:
    """The settings of the networks that differ: (pretrained value, the target's); none if it does not tell its own."""
    if "architecture" not in pretrained:
        return {}
    theirs, ours = pretrained["architecture"], target.architecture
    pairs = {
        _NETWORK: (theirs["network_class_name"], ours["network_class_name"]),
        _INPUT_CHANNELS: (pretrained["num_input_channels"], target.input_channels),
    }
    if theirs["network_class_name"] == ours["network_class_name"]:
        names = sorted({*theirs["arch_kwargs"], *ours["arch_kwargs"]})
        pairs |= {name: (theirs["arch_kwargs"].get(name), ours["arch_kwargs"].get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def adapt_command(file: Path, target: TargetPlans) -> str:
    """The command that adapts a file of weights to a target's plans."""
    return (
        f"nnUNetv2_vf adapt {shlex.quote(str(file))} -d {target.dataset_id} -p {target.plans_manager.plans_name} "
        f"-c {target.configuration_name} -o {adapted_name(file, target.dataset_id)}"
    )


def adapted_name(file: Path, dataset_id: int) -> str:
    """What weights adapted to a dataset are called where it is ours to say; never the name they had."""
    return shlex.quote(f"{file.stem}_for_{dataset_id}.pth")


def like_command(file: Path | str, target: TargetPlans) -> str:
    """The command that plans a target with the network of a file of weights."""
    return f"nnUNetv2_vf plan -d {target.dataset_id} --like {shlex.quote(str(file))}"


def differences(pretrained: Mapping[str, Any], target: TargetPlans) -> list[Difference]:
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
        _mask(pretrained, target),
        _spacing(pretrained, target),
        _axes(pretrained, target),
        *_layers(pretrained, target),
    ]
    return [difference for difference in found if difference is not None]


def _channels(pretrained: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    theirs, ours = list(pretrained.get("channel_names", {}).values()), list(target.channel_names.values())
    if not theirs or _same_modality(theirs, ours):
        return None
    cost = "the first layers meet other images; expect to gain less than within a modality"
    return Difference("channels", ", ".join(theirs), ", ".join(ours), cost)


def _same_modality(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether the names are alike, or both of magnetic resonance images of which one does not say the contrast."""
    before, here = ([_kind(name) for name in names] for names in (theirs, ours))
    unspecified = {_MR} in (set(before), set(here))
    return _alike(before, here) or (unspecified and all(_MR_CONTRAST.match(kind) for kind in before + here))


def _alike(theirs: Sequence[Any], ours: Sequence[Any]) -> bool:
    """Whether channels have the same: each its own, or where their numbers differ all of them together."""
    return list(theirs) == list(ours) if len(theirs) == len(ours) else set(theirs) == set(ours)


def _kind(name: str) -> str:
    return re.sub(r"^mri?[\W_\d]*$", _MR, name.lower())


def _normalization(pretrained: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    theirs, ours = pretrained["normalization_schemes"], target.configuration.normalization_schemes
    if _alike(theirs, ours):
        return None
    again = _replan_hint(target, "normalization")
    cost = f"intensities mean something else than in pretraining, the costliest of all; {again}"
    return Difference("normalisation", ", ".join(theirs), ", ".join(ours), cost)


def _intensities(pretrained: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    """For CT, what water and muscle become: the mean and standard deviation by which both normalise HU."""
    if "plans" not in pretrained:
        return None
    schemes = pretrained["normalization_schemes"], target.configuration.normalization_schemes
    managers = PlansManager(pretrained["plans"]), target.plans_manager
    channels = [str(i) for i, pair in enumerate(zip(*schemes, strict=False)) if pair == (_HU, _HU)]
    theirs, ours = (manager.foreground_intensity_properties_per_channel for manager in managers)
    far = [(theirs[i], ours[i]) for i in channels if _far_apart(theirs[i], ours[i])]
    if not far:
        return None
    before, here = (f"(HU - {p['mean']:.0f}) / {p['std']:.0f}" for p in far[0])
    cost = "the same tissue has another value than in pretraining; " + _replan_hint(target, "normalization")
    return Difference("intensities", before, here, cost)


def _far_apart(theirs: Mapping[str, float], ours: Mapping[str, float]) -> bool:
    shift = abs(theirs["mean"] - ours["mean"]) / max(theirs["std"], ours["std"])
    ratio = max(theirs["std"], ours["std"]) / max(min(theirs["std"], ours["std"]), 1e-8)
    return shift > _SHIFT or ratio > _STRETCH


def _mask(pretrained: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    if "plans" not in pretrained:
        return None
    configuration = PlansManager(pretrained["plans"]).get_configuration(pretrained["configuration"])
    theirs, ours = configuration.use_mask_for_norm, target.configuration.use_mask_for_norm
    if _alike(theirs, ours):
        return None
    cost = "zero outside the body is a background value in one and not in the other; " + _replan_hint(
        target, "normalization"
    )
    return Difference("normalisation within the mask only", str(theirs), str(ours), cost)


def _layers(pretrained: Mapping[str, Any], target: TargetPlans) -> list[Difference]:
    """What fits whatever it is, and changes what the weights compute."""
    cost = f"the same weights compute something else; {like_command('FILE', target)}"
    different = _network_differences(pretrained, target)
    return [
        Difference(name, str(different[name][0]), str(different[name][1]), cost)
        for name in _WITHOUT_SHAPE
        if name in different
    ]


def _spacing(pretrained: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    theirs, ours = pretrained.get("spacing"), target.configuration.spacing
    if not theirs:
        return None
    low, high = pretrained.get("settings", {}).get("crop_scale", VFSettings().crop_scale)
    scales = [old / new for old, new in zip(theirs, ours, strict=True)]
    if all(low * (1 - 1e-6) <= 1 / scale <= high * (1 + 1e-6) for scale in scales):
        return None
    cost = (
        f"structures are {' x '.join(f'{scale:.2g}' for scale in scales)} times as long in voxels, beyond the scales "
        f"of pretraining's crops; {_replan_hint(target, 'spacing')}"
    )
    return Difference("spacing", _millimetres(theirs), _millimetres(ours), cost)


def _replan_hint(target: TargetPlans, option: str) -> str:
    return f"plan with pretraining's: {like_command('FILE', target)} --{option} pretrained"


def _axes(pretrained: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    if "plans" not in pretrained:
        return None
    theirs, ours = pretrained["plans"]["transpose_forward"], list(target.plans_manager.transpose_forward)
    if theirs == ours:
        return None
    cost = "the network's axes are others of the body; flips do not make up for that, fine-tuning has to"
    return Difference("axis order", str(theirs), str(ours), cost)


def _millimetres(spacing: Sequence[float]) -> str:
    return " x ".join(f"{mm:.3g}" for mm in spacing) + " mm"


def describe_fit(pretrained: Mapping[str, Any], target: TargetPlans) -> list[str]:
    """A line for each difference, or that there is none; and what of the weights is not from pretraining."""
    lines = [str(difference) for difference in differences(pretrained, target)] or [
        "channels, normalisation, spacing and axis order are as in pretraining"
    ]
    share = pretrained.get("adapted", {}).get("transferred_share", 1)
    if share < 1:
        lines.append(
            f"of the weights (but the heads) {share:.1%} are from pretraining; adapt left the others at random"
        )
    return lines
