"""nnU-Net's experiment planning with a topology of ours: patch and batch size fit what a training step takes."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import pad_shape
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_folders import dataset_name, require_variables
from nnunetv2_vf.planners.memory import GIB, StepMemory, measure_step
from nnunetv2_vf.transfer.target_plans import build_network

_INITIAL_VOXELS = 256**3  # of the largest patch that is considered, as in nnU-Net
_PRETEXT_CLASSES = 5  # of Volume Fusion, unless set otherwise: pretraining must fit as well
_USABLE = 0.9  # of the memory target; CUDA's context, cuDNN's workspaces and fragmentation take the rest
_MIN_BATCH = 2  # as in nnU-Net
# nnU-Net's own networks are measured with its yardstick, so that they get the patches its users know: the elements
# of all convolutions' outputs that its planners (ExperimentPlanner, ResEncUNetPlanner) put on 8 GB, in a batch of 2.
_NNUNET_ELEMENTS = {"PlainConvUNet": 560_000_000, "ResidualEncoderUNet": 680_000_000}
_NNUNET_BYTES = 8 * GIB
_Step = Callable[..., StepMemory]  # of a patch and a batch size


def plan_datasets(
    datasets: Sequence[str],
    planner: Callable[..., TopologyPlanner],
    gpu_memory_target: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    target_spacing: Sequence[float] | None = None,
    plans_name: str | None = None,
) -> list[tuple[dict[str, Any], str]]:
    """Plan datasets with a planner of topologies.

    Args:
        datasets: ids or names; their fingerprints must have been extracted.
        planner: called as nnU-Net calls its planner classes.
        gpu_memory_target: GB; default 8.
        target_spacing: of 3d_fullres, mm, in the axis order of the images.
        plans_name: default: the planner's.

    Returns:
        the content and the name of each plans file.

    Raises:
        UserError: a dataset or its fingerprint is missing, or an argument is not legal (before the first file is
            written); or a dataset's smallest patch does not fit the memory (then it gets no plans).
    """
    require_variables(nnUNet_raw, nnUNet_preprocessed)
    if target_spacing is not None and not all(0 < mm < math.inf for mm in target_spacing):
        raise UserError(f"-overwrite_target_spacing {list(target_spacing)}; legal: three positive numbers, mm")
    if get_allowed_n_proc_DA() < 1:
        raise UserError("nnUNet_n_proc_DA=0 is for training; nnU-Net's planning divides by it: unset nnUNet_n_proc_DA")
    if gpu_memory_target is not None and not 0 < gpu_memory_target < math.inf:
        raise UserError(f"-gpu_memory_target {gpu_memory_target:g}; legal: a positive number of GB")
    return [
        plan_experiment_dataset(
            dataset, planner, gpu_memory_target, preprocessor_name, target_spacing, plans_name
        )
        for dataset in [_dataset_with_fingerprint(dataset) for dataset in datasets]
    ]  # fmt: skip


def _dataset_with_fingerprint(dataset: str) -> str:
    name = dataset_name(dataset)
    if not (Path(nnUNet_raw) / name / "dataset.json").is_file():
        raise UserError(f"no dataset {dataset}: {nnUNet_raw}/{name}/dataset.json does not exist")
    if not (Path(nnUNet_preprocessed) / name / "dataset_fingerprint.json").is_file():
        raise UserError(
            f"dataset {name} has no fingerprint; make it: nnUNetv2_extract_fingerprint "
            f"-d {convert_dataset_name_to_id(name)}"
        )
    return name


def planned_configurations(plans: Mapping[str, Any]) -> dict[str, str]:
    """What was planned for each 3D configuration of a :class:`TopologyPlanner`, one line each."""
    return {
        name: f"patch {' x '.join(map(str, plan['patch_size']))} voxels of "
        f"{' x '.join(f'{mm:.3g}' for mm in plan['spacing'])} mm, batch {plan['batch_size']}, "
        f"about {plan['estimated_training_memory_gb']:g} GB in training on a GPU"
        for name, plan in plans["configurations"].items()
        if "estimated_training_memory_gb" in plan
    }


class TopologyPlanner(ExperimentPlanner):
    """All of nnU-Net's planning but the network of the 3D configurations, and the patch and batch that fit it.

    Spacings, normalisation, resampling, the decision for 3d_lowres and the configuration 2d stay nnU-Net's.
    """

    def topology(self, spacing: Sequence[float]) -> dict[str, Any]:
        """The plan's entry ``architecture`` for a 3D spacing (mm, in the axis order of the preprocessed cases)."""
        raise NotImplementedError

    def get_plans_for_configuration(
        self,
        spacing: Sequence[float],
        median_shape: Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[Any, Any],
    ) -> dict[str, Any]:
        """nnU-Net's plan of a configuration; for a 3D ``spacing`` (mm) with our topology.

        Raises:
            UserError: not even the smallest patch fits the memory target.
        """
        plan: dict[str, Any] = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        if len(spacing) == 2:
            return plan
        architecture = self.topology(spacing)
        step = functools.partial(self._step, _cache, architecture)
        divisor = patch_divisor(architecture)
        patches = candidate_patches(spacing, median_shape, divisor)
        patch = self._largest_that_fits(patches, step, self._guess(step, divisor))
        batch_size = self._batch_size(patch, approximate_n_voxels_dataset, step)
        return {
            **plan,
            "patch_size": patch,
            "batch_size": batch_size,
            "architecture": architecture,
            "estimated_training_memory_gb": round(step(patch, batch_size).total / GIB, 1),
        }

    def _step(
        self,
        cache: dict[Any, Any],
        architecture: Mapping[str, Any],
        patch: tuple[int, ...],
        batch_size: int = _MIN_BATCH,
    ) -> StepMemory:
        """What a training step takes; each is measured once."""
        key = (json.dumps(architecture), patch, batch_size)
        if key not in cache:
            channels = len(self.dataset_json.get("channel_names", self.dataset_json.get("modality")))
            classes = max(len(self.dataset_json["labels"]), _PRETEXT_CLASSES)
            build = functools.partial(build_network, architecture, channels, classes)
            reference = _NNUNET_ELEMENTS.get(architecture["network_class_name"].rpartition(".")[2])
            if reference is None:
                cache[key] = measure_step(functools.partial(build, device="cpu"), batch_size, channels, patch)
            else:
                network: Any = build()
                share = network.compute_conv_feature_map_size(patch) * batch_size / _MIN_BATCH / reference
                cache[key] = StepMemory(parameters=0, activations=int(share * _USABLE * _NNUNET_BYTES), transient=0)
        step: StepMemory = cache[key]
        return step

    def _guess(self, step: _Step, divisor: Sequence[int]) -> float:
        """Voxels of a patch that takes about all of the memory: activations grow almost linearly with them."""
        patch = tuple(4 * d for d in divisor)
        small = step(patch)
        return math.prod(patch) * (self._target_bytes - small.parameters) / (small.total - small.parameters)

    def _largest_that_fits(self, patches: list[tuple[int, ...]], step: _Step, guess: float) -> tuple[int, ...]:
        """The first of the shrinking patches that fits the memory target, looked for around ``guess`` voxels."""
        smallest = step(patches[-1]).total
        if smallest > self._target_bytes:
            needed = math.ceil(smallest / GIB / _USABLE * 10) / 10
            raise UserError(
                f"-gpu_memory_target {self.UNet_vram_target_GB:g} is too small for this network, whose smallest patch "
                f"is {patches[-1]}; use at least {needed:g} GB"
            )
        index = next((i for i, patch in enumerate(patches) if math.prod(patch) <= guess), len(patches) - 1)
        while step(patches[index]).total > self._target_bytes:
            index += 1
        while index > 0 and step(patches[index - 1]).total <= self._target_bytes:
            index -= 1
        return patches[index]

    def _batch_size(self, patch: tuple[int, ...], voxels_in_dataset: float, step: _Step) -> int:
        """As many samples as fit, but at most nnU-Net's 5 % of the dataset's voxels, and at least 2."""
        of_dataset = round(voxels_in_dataset * self.max_dataset_covered / np.prod(patch, dtype=np.float64))
        two = step(patch)
        room = (self._target_bytes - two.parameters) / (two.total - two.parameters)
        batch_size = max(_MIN_BATCH, min(int(_MIN_BATCH * room), of_dataset))
        while batch_size > _MIN_BATCH and step(patch, batch_size).total > self._target_bytes:
            batch_size -= 1
        return batch_size

    @property
    def _target_bytes(self) -> float:
        return _USABLE * self.UNet_vram_target_GB * GIB


def patch_divisor(architecture: Mapping[str, Any]) -> tuple[int, ...]:
    """Voxels of the input per voxel of the deepest level, along each axis: what a patch is a multiple of."""
    strides = architecture["arch_kwargs"]["strides"]
    return tuple(math.prod(axis) for axis in zip(*strides, strict=True))


def candidate_patches(
    spacing: Sequence[float], median_shape: Sequence[float], divisor: Sequence[int]
) -> list[tuple[int, ...]]:
    """Patches from the largest to the smallest, each shorter than the one before along one axis.

    As in nnU-Net the first covers 256^3 voxels in the aspect ratio of the spacing, at most the median shape, and it
    is the axis that covers most of the median shape that shrinks.

    Args:
        spacing: mm.
        median_shape: of the resampled cases, in voxels.
        divisor: each side of a patch is a multiple of it.
    """
    shortest = np.minimum(2, np.ceil(median_shape / np.array(divisor))).astype(int) * divisor
    if (shortest == divisor).all():  # a norm over the single voxel of the deepest level fails
        shortest *= 2
    per_mm = 1 / np.asarray(spacing, dtype=float)
    cube = np.round(per_mm * (_INITIAL_VOXELS / np.prod(per_mm)) ** (1 / 3))
    patch = np.maximum(pad_shape(np.minimum(cube, np.ceil(median_shape)).astype(int), divisor), shortest)
    patches = [tuple(int(side) for side in patch)]
    while (patch > shortest).any():
        coverage = np.where(patch > shortest, patch / np.asarray(median_shape), -1)
        axis = int(np.argmax(coverage))
        patch[axis] -= divisor[axis]
        patches.append(tuple(int(side) for side in patch))
    return patches
