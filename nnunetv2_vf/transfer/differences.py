"""List what differs between the data and plans of pretraining and those of fine-tuning.

None of these differences prevents a training: the weights fit, but the network sees other data than in pretraining.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import printable
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.transfer.architectures import can_be_planned, complete_arguments
from nnunetv2_vf.transfer.metadata import format_spacing
from nnunetv2_vf.transfer.network_fit import network_differences
from nnunetv2_vf.transfer.suggested_commands import plan_like_command
from nnunetv2_vf.transfer.target_plans import TargetPlans

_CT = "CTNormalization"
# Two CT normalisations differ if their means are further apart than this many standard deviations (of the larger one).
_MAX_MEAN_SHIFT = 0.25
# They also differ if the larger standard deviation is more than this many times the smaller one.
_MAX_STD_RATIO = 1.5
_MR = "mr"  # MR images of unspecified contrast: MR, MRI, MRI2
_MR_CONTRAST = re.compile(r"(mri?|adc|pd)(?![a-z])|t[12]|flair|dwi|swi")
_OPTIONS = {"normalization": "the normalisation", "spacing": "the spacing"}  # of plan --like
# Arguments of the network that change what it computes, but not the shapes of its weights.
_LAYERS_WITHOUT_SHAPE = ("norm_op", "norm_op_kwargs", "nonlin", "nonlin_kwargs")


@dataclass(frozen=True)
class Difference:
    """One difference between pretraining and fine-tuning, and its consequence."""

    aspect: str
    pretrained: str
    target: str
    consequence: str

    def __str__(self) -> str:
        return printable(f"{self.aspect}: {self.pretrained} in pretraining, {self.target} here: {self.consequence}")


def describe_differences(metadata: Mapping[str, Any], target: TargetPlans) -> list[str]:
    """Return one line for each difference, or a line that says there is none; and the share of pretrained weights.

    Args:
        metadata: the entry ``vf`` of an artifact.
    """
    lines = [str(difference) for difference in find_differences(metadata, target)]
    similar_spacing = _note_similar_spacing(metadata, target)
    if not lines:
        equal = [aspect for aspect in _recorded_aspects(metadata) if aspect != "spacing" or not similar_spacing]
        lines = [f"{', '.join(equal)}: as in pretraining"]
    lines += similar_spacing
    share = metadata.get("adapted", {}).get("transferred_share", 1)
    if share < 1:
        lines.append(
            f"{share:.1%} of the weights (without heads) come from pretraining; adapt left the others at random"
        )
    return lines


def _note_similar_spacing(metadata: Mapping[str, Any], target: TargetPlans) -> list[str]:
    """Return a line if the spacings differ, but too little to be a :class:`Difference`."""
    if not metadata.get("spacing") or _compare_spacing(metadata, target):
        return []
    pretrained, current = format_spacing(metadata["spacing"]), format_spacing(target.configuration.spacing)
    if pretrained == current:
        return []
    varied = "crop_scale" in metadata.get("settings", {})
    reason = "pretraining varied the scale as much as this" if varied else "a small difference"
    return [f"spacing: {pretrained} in pretraining, {current} here: {reason}"]


def _recorded_aspects(metadata: Mapping[str, Any]) -> list[str]:
    """Return what the metadata record of the data of pretraining; only this can be compared."""
    aspects = {
        "channel_names": "channels",
        "normalization_schemes": "normalisation",
        "spacing": "spacing",
        "plans": "axis order",
    }
    return [aspect for key, aspect in aspects.items() if metadata.get(key)]


def find_differences(metadata: Mapping[str, Any], target: TargetPlans) -> list[Difference]:
    """Compare channels, normalisation, spacing, axis order and layers of pretraining with the target's plans.

    Args:
        metadata: the entry ``vf`` of an artifact.
    """
    if not metadata.get("normalization_schemes"):
        consequence = "compare them with what the authors of the weights write"
        not_recorded = Difference("spacing and normalisation", "not recorded", "those of the plans", consequence)
        return [not_recorded, *_compare_layers(metadata, target)]
    found = [
        _compare_channels(metadata, target),
        _compare_normalization(metadata, target),
        _compare_ct_intensities(metadata, target),
        _compare_mask(metadata, target),
        _compare_spacing(metadata, target),
        _compare_axes(metadata, target),
        *_compare_layers(metadata, target),
    ]
    return [difference for difference in found if difference is not None]


def _compare_channels(metadata: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    pretrained, current = list(metadata.get("channel_names", {}).values()), list(target.channel_names.values())
    if not pretrained or same_modality(pretrained, current):
        return None
    consequence = "the first layers see another kind of image; expect a smaller gain than within one modality"
    return Difference("channels", ", ".join(pretrained), ", ".join(current), consequence)


def same_modality(pretrained: Sequence[str], current: Sequence[str]) -> bool:
    """True if the channel names are equal, or all are MR and one side does not specify the contrast."""
    kinds, current_kinds = ([_channel_kind(name) for name in names] for names in (pretrained, current))
    is_unspecified_mr = {_MR} in (set(kinds), set(current_kinds))
    all_are_mr = all(_MR_CONTRAST.match(kind) for kind in kinds + current_kinds)
    return _same_per_channel(kinds, current_kinds) or (is_unspecified_mr and all_are_mr)


def _channel_kind(name: str) -> str:
    return re.sub(r"^mri?[\W_\d]*$", _MR, name.lower())


def _same_per_channel(pretrained: Sequence[Any], current: Sequence[Any]) -> bool:
    """True if each channel has the same value; if the numbers of channels differ, the sets of values must be equal."""
    if len(pretrained) == len(current):
        return list(pretrained) == list(current)
    return set(pretrained) == set(current)


def _compare_normalization(metadata: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    pretrained, current = metadata["normalization_schemes"], target.configuration.normalization_schemes
    if _same_per_channel(pretrained, current):
        return None
    consequence = "intensities have another meaning than in pretraining"
    names = metadata.get("channel_names", {}).values()
    # HU clipping would ruin an MR image, and for MR the target's scheme was better (docs/explanation/transfer.md).
    if _CT in pretrained and (not names or same_modality([*names], [*target.channel_names.values()])):
        consequence += f"; {_replan_hint(metadata, target, 'normalization')}"
    return Difference("normalisation", ", ".join(pretrained), ", ".join(current), consequence)


def _compare_ct_intensities(metadata: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    """Compare the mean and standard deviation by which pretraining and target normalise HU."""
    if "plans" not in metadata:
        return None
    schemes = zip(metadata["normalization_schemes"], target.configuration.normalization_schemes, strict=False)
    ct_channels = [str(i) for i, pair in enumerate(schemes) if pair == (_CT, _CT)]
    pretrained, current = (
        manager.foreground_intensity_properties_per_channel
        for manager in (PlansManager(metadata["plans"]), target.plans_manager)
    )
    differing = [i for i in ct_channels if _differ_in_hu(pretrained[i], current[i])]
    if not differing:
        return None
    first = differing[0]
    consequence = (
        f"the same tissue has another value than in pretraining; {_replan_hint(metadata, target, 'normalization')}"
    )
    return Difference("intensities", _format_hu(pretrained[first]), _format_hu(current[first]), consequence)


def _differ_in_hu(pretrained: Mapping[str, float], current: Mapping[str, float]) -> bool:
    smaller_std, larger_std = sorted((pretrained["std"], current["std"]))
    shift = abs(pretrained["mean"] - current["mean"]) / larger_std
    return shift > _MAX_MEAN_SHIFT or larger_std / max(smaller_std, 1e-8) > _MAX_STD_RATIO


def _format_hu(intensities: Mapping[str, float]) -> str:
    return f"(HU - {intensities['mean']:.0f}) / {intensities['std']:.0f}"


def _compare_mask(metadata: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    if "plans" not in metadata:
        return None
    configuration = PlansManager(metadata["plans"]).get_configuration(metadata["configuration"])
    pretrained, current = configuration.use_mask_for_norm, target.configuration.use_mask_for_norm
    if _same_per_channel(pretrained, current):
        return None
    consequence = (
        f"voxels outside the body stay zero in only one of the two; {_replan_hint(metadata, target, 'normalization')}"
    )
    return Difference("normalisation within the mask only", str(pretrained), str(current), consequence)


def _compare_spacing(metadata: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    """Compare the spacings. A ratio within the range of the random crop scales is no difference to the network."""
    pretrained, current = metadata.get("spacing"), target.configuration.spacing
    if not pretrained:
        return None
    recorded = metadata.get("settings", {}).get("crop_scale")
    low, high = recorded or VFSettings().crop_scale
    scales = [old / new for old, new in zip(pretrained, current, strict=True)]
    if all(low * (1 - 1e-6) <= 1 / scale <= high * (1 + 1e-6) for scale in scales):
        return None
    factors = " x ".join(f"{scale:.2g}" for scale in scales)
    seen = f", which saw crops of {low:g} to {high:g} times the patch" if recorded else ""
    consequence = (
        f"along each axis, structures have {factors} times as many voxels as in pretraining{seen}; "
        f"{_replan_hint(metadata, target, 'spacing')}"
    )
    return Difference("spacing", format_spacing(pretrained), format_spacing(current), consequence)


def _compare_axes(metadata: Mapping[str, Any], target: TargetPlans) -> Difference | None:
    if "plans" not in metadata:
        return None
    pretrained, current = metadata["plans"]["transpose_forward"], list(target.plans_manager.transpose_forward)
    if pretrained == current:
        return None
    consequence = "an axis of the network is another axis of the body than in pretraining"
    return Difference("axis order", str(pretrained), str(current), consequence)


def layers_without_shape(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a network that change what it computes, but not the shapes of its weights."""
    arguments = complete_arguments(architecture)
    return {name: arguments[name] for name in _LAYERS_WITHOUT_SHAPE if name in arguments}


def _compare_layers(metadata: Mapping[str, Any], target: TargetPlans) -> list[Difference]:
    pretrained_layers = metadata.get("adapted", {}).get("pretrained_layers")
    if pretrained_layers:  # the file now records the network of the target
        architecture = metadata["architecture"]
        arguments = {**architecture["arch_kwargs"], **pretrained_layers}
        metadata = {**metadata, "architecture": {**architecture, "arch_kwargs": arguments}}
    hint = "use plans with the layers of pretraining"
    if _can_be_planned(metadata):
        hint = f"plan with the pretrained network: {plan_like_command('FILE', target)}"
    consequence = f"the same weights compute something else; {hint}"
    differing = network_differences(metadata, target)
    return [
        Difference(name, str(differing[name][0]), str(differing[name][1]), consequence)
        for name in _LAYERS_WITHOUT_SHAPE
        if name in differing
    ]


def _replan_hint(metadata: Mapping[str, Any], target: TargetPlans, option: str) -> str:
    if not _can_be_planned(metadata):
        return f"to use {_OPTIONS[option]} of pretraining, write it into the plans and preprocess again"
    command = plan_like_command("FILE", target)
    return f"to use {_OPTIONS[option]} of pretraining, add --{option} pretrained to {command}"


def _can_be_planned(metadata: Mapping[str, Any]) -> bool:
    """True if ``plan --like`` takes the file of these metadata."""
    return "architecture" in metadata and can_be_planned(metadata["architecture"])
