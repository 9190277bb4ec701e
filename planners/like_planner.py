"""Plan a dataset with the network of pretrained weights: ``nnUNetv2_vf plan -d ID --like vf_pretrained.pth``."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.fmunet import FMUNET_PATH
from nnunetv2_vf.pct_net import PCT_NET_PATH
from nnunetv2_vf.planners.fmunet_planner import FMUNetPlanner
from nnunetv2_vf.planners.pct_net_planner import PCTNetPlanner
from nnunetv2_vf.planners.topology_planner import TopologyPlanner, describe_plans, plan_datasets
from nnunetv2_vf.transfer.architectures import can_be_planned
from nnunetv2_vf.transfer.artifact import read_with_architecture
from nnunetv2_vf.transfer.differences import describe_differences
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING
from nnunetv2_vf.transfer.suggested_commands import (
    adapt_command,
    adapted_file_name,
    convert_command,
    converted_file_name,
    finetune_command,
)
from nnunetv2_vf.transfer.target_plans import load_target

_RECORD = "volume_fusion_like"  # section of the plans that names the weights
_CT = "CTNormalization"  # the scheme that uses intensity statistics of the whole dataset
_STATISTICS = "foreground_intensity_properties_per_channel"
_T = TypeVar("_T")


def plan_like(
    datasets: Sequence[str],
    file: Path,
    spacing: str = "target",
    normalization: str = "auto",
    **options: Any,
) -> Iterator[str]:
    """Write plans for datasets with the network of pretrained weights.

    Args:
        datasets: ids or names; their fingerprints must exist.
        file: ``vf_pretrained.pth`` or a checkpoint of nnU-Net.
        spacing, normalization: see :class:`LikePlanner`.
        options: of :func:`~nnunetv2_vf.planners.topology_planner.plan_datasets`.

    Yields:
        for each dataset a description of its plans, the next commands, and the differences to the pretraining.

    Raises:
        UserError: as :func:`read_for_planning`; see also :class:`LikePlanner` and
            :func:`~nnunetv2_vf.planners.topology_planner.plan_datasets`.
    """
    pretrained = read_for_planning(file, spacing, normalization, options.get("target_spacing"))
    planner = functools.partial(
        LikePlanner, pretrained=pretrained, file=file, spacing=spacing, normalization=normalization
    )
    for plans, name in plan_datasets(datasets, planner, **options):
        yield _describe_plans(plans, name, pretrained, file)
        if "3d_fullres" in plans["configurations"]:
            target = load_target(plans["dataset_name"], name, "3d_fullres")
            yield "\n  ".join(["Pretraining and these plans:", *describe_differences(pretrained, target)])


def read_for_planning(
    file: Path, spacing: str, normalization: str, target_spacing: Sequence[float] | None
) -> dict[str, Any]:
    """Return the ``vf`` metadata of weights, after checking them and the options against each other.

    Args:
        spacing, normalization: see :class:`LikePlanner`.
        target_spacing: of ``-overwrite_target_spacing``, mm.

    Raises:
        UserError: the file cannot be read; it lacks the requested spacing or normalisation; its network is 2D or has
            no strides; or two options exclude each other.
    """
    if spacing == "pretrained" and target_spacing is not None:
        raise UserError("--spacing pretrained and -overwrite_target_spacing exclude each other; leave one out")
    pretrained: dict[str, Any] = read_with_architecture(file)["vf"]
    architecture = pretrained["architecture"]
    if not can_be_planned(architecture):
        raise UserError(
            f"{file} holds weights of {architecture['network_class_name']}, which is two-dimensional or takes patches "
            "of one size only; legal: 3D U-Nets, residual encoder U-Nets, PCT-Net and FMUNet"
        )
    for option, value, key in (
        ("--spacing", spacing, "spacing"),
        ("--normalization", normalization, "normalization_schemes"),
    ):
        if value == "pretrained" and not pretrained.get(key):
            raise UserError(f"{option} pretrained, but {file} does not hold its {key}; legal: target")
    schemes = pretrained.get("normalization_schemes") or []
    if normalization == "pretrained" and _CT in schemes and "plans" not in pretrained:
        raise UserError(f"--normalization pretrained, but {file} does not hold its intensity statistics; legal: target")
    return pretrained


class LikePlanner(TopologyPlanner):
    """nnU-Net's planner with the network of pretrained weights in the 3D configurations.

    Args:
        pretrained: the ``vf`` metadata of the weights, from :func:`read_for_planning`.
        file: the file of the weights; the plans record its name.
        spacing: "target": nnU-Net's choice for the dataset; "pretrained": the spacing of the pretraining.
        normalization: "target": nnU-Net's choice for the dataset; "pretrained": the schemes of the pretraining and,
            for a scheme that uses intensity statistics, its statistics too, so that a voxel value means the same as
            in pretraining; "auto": "pretrained" if both are CT, which is normalised with the statistics of a dataset,
            the file records those of the pretraining, and they can be given to the target's channels; else "target".

    Raises:
        UserError: normalisation "pretrained", but its channels differ and the target has another number of them.
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
        file: Path,
        spacing: str = "target",
        normalization: str = "auto",
    ):
        self.pretrained = pretrained
        self.file, self.spacing, self.normalization = file, spacing, normalization
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or _default_plans_name(pretrained),
            overwrite_target_spacing,
            suppress_transpose,
        )
        if normalization == "auto":
            self.normalization = self._choose_normalization()
        if self.normalization == "pretrained" and _CT in pretrained["normalization_schemes"]:
            every_channel = self._one_per_channel(self._pretrained_statistics())
            self.dataset_fingerprint[_STATISTICS] = {str(i): entry for i, entry in enumerate(every_channel)}

    def _pretrained_statistics(self) -> list[dict[str, float]]:
        statistics = PlansManager(self.pretrained["plans"]).foreground_intensity_properties_per_channel
        return [statistics[str(channel)] for channel in range(len(statistics))]

    def _choose_normalization(self) -> str:
        """Return "pretrained" if each channel has the same scheme in both, and one uses recorded statistics of CT.

        Other schemes normalise each image by itself. If they differ, nnU-Net's choice for the target was better in
        benchmarks/normalization.py.
        """
        schemes = self.pretrained.get("normalization_schemes") or []
        own_schemes, _ = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        if _CT not in schemes or "plans" not in self.pretrained:
            return "target"
        are_all_ct = {*schemes} == {*own_schemes} == {_CT} and _are_equal(self._pretrained_statistics())
        return "pretrained" if list(schemes) == own_schemes or are_all_ct else "target"

    def choose_architecture(self, spacing: Sequence[float]) -> dict[str, Any]:
        architecture: dict[str, Any] = self.pretrained["architecture"]
        return architecture

    def determine_fullres_target_spacing(self) -> np.ndarray:
        """Return nnU-Net's spacing, or the pretrained one with its coarsest axis along the target's coarsest axis."""
        target: np.ndarray = super().determine_fullres_target_spacing()
        if self.spacing == "target" or self.overwrite_target_spacing is not None:
            return target
        coarsest = int(np.argmax(target))
        axes = [coarsest, *(axis for axis in range(3) if axis != coarsest)]
        coarsest_mm, *others_mm = np.roll(self.pretrained["spacing"], -int(np.argmax(self.pretrained["spacing"])))
        spacing = np.empty(3)
        spacing[axes] = coarsest_mm, *others_mm
        return spacing

    def determine_normalization_scheme_and_whether_mask_is_used_for_norm(self) -> tuple[list[str], list[bool]]:
        schemes, use_mask = super().determine_normalization_scheme_and_whether_mask_is_used_for_norm()
        if self.normalization == "target":
            return schemes, use_mask
        if "plans" in self.pretrained:
            configuration = PlansManager(self.pretrained["plans"]).get_configuration(self.pretrained["configuration"])
            use_mask = self._one_per_channel(configuration.use_mask_for_norm)
        return self._one_per_channel(self.pretrained["normalization_schemes"]), use_mask

    def _one_per_channel(self, pretrained: Sequence[_T]) -> list[_T]:
        """Return one entry per target channel; if the numbers of channels differ, all entries must be equal."""
        channels = self.number_of_channels
        if len(pretrained) == channels:
            return list(pretrained)
        if not _are_equal(pretrained):
            raise UserError(
                f"--normalization pretrained: {len(pretrained)} channels that differ cannot become {channels}; "
                "legal: target"
            )
        return [pretrained[0]] * channels

    def save_plans(self, plans: dict[str, Any]) -> None:
        options = {"spacing": self.spacing, "normalization": self.normalization}
        origin = {"file": self.file.name, "hub": self.pretrained.get("hub"), "dataset": self.pretrained.get("dataset")}
        plans[_RECORD] = {**origin, **options}
        super().save_plans(plans)


def _are_equal(entries: Sequence[Any]) -> bool:
    return all(entry == entries[0] for entry in entries)


def _default_plans_name(pretrained: Mapping[str, Any]) -> str:
    """Return ``PCTNetPlans`` or ``FMUNetPlans`` for these networks, else ``VFPlans``; nnU-Net uses other names."""
    names = {PCT_NET_PATH: PCTNetPlanner.default_plans_name, FMUNET_PATH: FMUNetPlanner.default_plans_name}
    return names.get(pretrained["architecture"]["network_class_name"], "VFPlans")


def _describe_plans(plans: dict[str, Any], name: str, pretrained: Mapping[str, Any], file: Path) -> str:
    commands = []
    if "3d_fullres" in plans["configurations"]:
        target = load_target(plans["dataset_name"], name, "3d_fullres")
        weights: Path | str = file
        if target.input_channels != pretrained["num_input_channels"]:
            commands.append(adapt_command(file, target))
            weights = adapted_file_name(file, target.dataset_id)
        elif file.suffix == SAFETENSORS_ENDING:  # nnU-Net's -pretrained_weights does not read them
            commands.append(convert_command(file))
            weights = converted_file_name(file)
        commands.append(finetune_command(target.dataset_id, "3d_fullres", target.first_fold, name, weights))
    is_pretrained = plans[_RECORD]["normalization"] == "pretrained"
    normalization = "the normalisation of its pretraining" if is_pretrained else "nnU-Net's normalisation"
    remark = f", with the network of {shlex.quote(str(file))} and {normalization}"
    return describe_plans(plans, name, remark, commands)
