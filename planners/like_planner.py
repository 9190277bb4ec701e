"""Plans a target with the topology of pretrained weights: ``nnUNetv2_vf plan -d ID --like vf_pretrained.pth``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.pct_net import PCTNet
from nnunetv2_vf.planners.memory_fitting import TopologyPlanner, planned_configurations
from nnunetv2_vf.transfer.compatibility import adapted_name
from nnunetv2_vf.transfer.safe_loading import can_be_planned

_RECORD = "volume_fusion_like"  # of the plans: what they were made like
_CT = "CTNormalization"  # the scheme that uses statistics of the dataset
_T = TypeVar("_T")


class LikePlanner(TopologyPlanner):
    """All of nnU-Net's planning with the network of pretrained weights in the 3D configurations.

    Args:
        pretrained: the artifact's ``vf`` metadata.
        like: the artifact's file, for the record in the plans.
        spacing: "target": nnU-Net's choice for the dataset; "pretrained": the one of pretraining.
        normalization: the same; "pretrained" takes pretraining's intensity statistics as well, where the scheme uses
            any, so that a voxel value means what it meant in pretraining.

    Raises:
        UserError: the weights do not tell the spacing or normalisation that is asked for, or are of a 2D
            network or one without strides.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        *,
        pretrained: Mapping[str, Any],
        like: Path,
        spacing: str = "target",
        normalization: str = "target",
    ):
        self.pretrained = pretrained
        self.like, self.spacing, self.normalization = like, spacing, normalization
        self._check()
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or default_plans_name(pretrained),
            overwrite_target_spacing,
            suppress_transpose,
        )
        if normalization == "pretrained" and _CT in pretrained["normalization_schemes"]:
            properties = pretrained["plans"]["foreground_intensity_properties_per_channel"]
            every_channel = self._per_channel([properties[str(i)] for i in range(len(properties))])
            key = "foreground_intensity_properties_per_channel"
            self.dataset_fingerprint[key] = {str(i): p for i, p in enumerate(every_channel)}  # of this object alone

    def _check(self) -> None:
        architecture = self.pretrained["architecture"]
        if not can_be_planned(architecture):
            raise UserError(
                f"{self.like} holds weights of {architecture['network_class_name']}, which is two-dimensional or takes "
                "patches of one size only; legal: 3D U-Nets, residual encoder U-Nets and PCT-Net"
            )
        for option, asked, key in (
            ("--spacing", self.spacing, "spacing"),
            ("--normalization", self.normalization, "normalization_schemes"),
        ):
            if asked == "pretrained" and not self.pretrained.get(key):
                raise UserError(f"{option} pretrained, but {self.like} does not tell its {key}; legal: target")
        schemes = self.pretrained.get("normalization_schemes") or []
        if self.normalization == "pretrained" and _CT in schemes and "plans" not in self.pretrained:
            raise UserError(f"--normalization pretrained, but {self.like} does not tell its intensities; legal: target")

    def topology(self, spacing: Sequence[float]) -> dict[str, Any]:
        entry: dict[str, Any] = self.pretrained["architecture"]
        return entry

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """nnU-Net's, or the pretrained spacing: its first axis, the coarsest, along the target's coarsest."""
        own: np.ndarray = super().determine_fullres_target_spacing()
        if self.spacing == "target" or self.overwrite_target_spacing is not None:
            return own
        coarsest = int(np.argmax(own))
        order = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
        spacing = np.empty(3)
        spacing[order] = self.pretrained["spacing"]
        return spacing

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        schemes, use_mask = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        if self.normalization == "target":
            return schemes, use_mask
        if "plans" in self.pretrained:
            manager = PlansManager(self.pretrained["plans"])
            use_mask = self._per_channel(manager.get_configuration(self.pretrained["configuration"]).use_mask_for_norm)
        return self._per_channel(self.pretrained["normalization_schemes"]), use_mask

    def _per_channel(self, pretrained: Sequence[_T]) -> list[_T]:
        """One entry for each of the target's channels: those of pretraining, or the one all of them had."""
        channels = len(self.dataset_json.get("channel_names", self.dataset_json.get("modality")))
        if len(pretrained) == channels:
            return list(pretrained)
        if any(entry != pretrained[0] for entry in pretrained):
            raise UserError(
                f"--normalization pretrained: {len(pretrained)} channels that differ cannot become {channels}; "
                "legal: target"
            )
        return [pretrained[0]] * channels

    def save_plans(self, plans: dict[str, Any]) -> None:
        options = {"spacing": self.spacing, "normalization": self.normalization}
        plans[_RECORD] = {"file": self.like.name, "dataset": self.pretrained.get("dataset"), **options}
        super().save_plans(plans)


def default_plans_name(pretrained: Mapping[str, Any]) -> str:
    """``PCTNetPlans`` for PCT-Net, ``VFPlans`` for other networks, whose own names nnU-Net's plans have."""
    is_pct_net = pretrained["architecture"]["network_class_name"] == f"{PCTNet.__module__}.{PCTNet.__qualname__}"
    return "PCTNetPlans" if is_pct_net else "VFPlans"


def next_steps(plans: dict[str, Any], name: str, pretrained: Mapping[str, Any], like: Path) -> str:
    """What was planned, and the commands that come next."""
    planned = planned_configurations(plans)
    if not planned:
        return f"{name} of {plans['dataset_name']}: only the configuration 2d: the images are two-dimensional"
    dataset_id, weights = convert_dataset_name_to_id(plans["dataset_name"]), shlex.quote(str(like))
    channels = len(plans["configurations"]["3d_fullres"]["normalization_schemes"])
    lines = [
        f"{name} of {plans['dataset_name']}, with the network of {weights}:",
        *(f"  {each}: {about}" for each, about in planned.items()),
        "Next:",
        f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {name} -c 3d_fullres",
    ]
    if channels != pretrained["num_input_channels"]:
        adapted = adapted_name(like, dataset_id)
        lines.append(f"  nnUNetv2_vf adapt {weights} -d {dataset_id} -p {name} -c 3d_fullres -o {adapted}")
        weights = adapted
    lines.append(
        f"  nnUNetv2_train {dataset_id} 3d_fullres 0 -p {name} -tr VFFinetuneTrainer -pretrained_weights {weights}"
    )
    return "\n".join(lines)
