"""nnU-Net's experiment planning with PCT-Net in the 3D configurations: ``nnUNetv2_vf plan -d ID``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import pad_shape
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.host import require_variables
from nnunetv2_vf.memory import GIB, StepMemory, measure_step
from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet, total_stride

_INITIAL_VOXELS = 256**3  # of the largest patch that is considered, as in nnU-Net
_PRETEXT_CLASSES = 5  # of Volume Fusion, unless set otherwise: pretraining must fit as well
_USABLE = 0.9  # of the memory target; CUDA's context, cuDNN's workspaces and fragmentation take the rest
_MIN_BATCH = 2  # as in nnU-Net
_Step = Callable[..., StepMemory]  # of a patch and a batch size


def plan(
    datasets: Sequence[str],
    gpu_memory_target: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    target_spacing: Sequence[float] | None = None,
    plans_name: str | None = None,
) -> None:
    """Plan datasets with PCT-Net, and print what the plans hold and the commands that come next.

    Args:
        datasets: ids or names; their fingerprints must have been extracted.
        gpu_memory_target: GB; default 8.
        target_spacing: of 3d_fullres, mm, in the axis order of the images.
        plans_name: default ``PCTNetPlans``.

    Raises:
        UserError: a dataset or its fingerprint is missing, or an argument is not legal (before the first file is
            written); or a dataset's smallest patch does not fit the memory (then it gets no plans).
    """
    require_variables(nnUNet_raw, nnUNet_preprocessed)
    if target_spacing is not None and not all(0 < mm < math.inf for mm in target_spacing):
        raise UserError(f"-overwrite_target_spacing {list(target_spacing)}; legal: three positive numbers, mm")
    if gpu_memory_target is not None and not 0 < gpu_memory_target < math.inf:
        raise UserError(f"-gpu_memory_target {gpu_memory_target:g}; legal: a positive number of GB")
    for dataset in [_dataset_with_fingerprint(dataset) for dataset in datasets]:
        plans, name = plan_experiment_dataset(
            dataset, PCTNetPlanner, gpu_memory_target, preprocessor_name, target_spacing, plans_name
        )
        print(_summary(plans, name, convert_dataset_name_to_id(dataset)))


def _dataset_with_fingerprint(dataset: str) -> str:
    try:
        name: str = maybe_convert_to_dataset_name(int(dataset) if dataset.isdecimal() else dataset)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"no dataset {dataset}: {error}") from error
    if not (Path(nnUNet_raw) / name / "dataset.json").is_file():
        raise UserError(f"no dataset {dataset}: {nnUNet_raw}/{name}/dataset.json does not exist")
    if not (Path(nnUNet_preprocessed) / name / "dataset_fingerprint.json").is_file():
        raise UserError(
            f"dataset {name} has no fingerprint; make it: nnUNetv2_extract_fingerprint "
            f"-d {convert_dataset_name_to_id(name)}"
        )
    return name


def _summary(plans: dict[str, Any], name: str, dataset_id: int) -> str:
    lines = [f"{name} of {plans['dataset_name']}:"]
    for configuration, plan in plans["configurations"].items():
        if "estimated_training_memory_gb" in plan:
            lines.append(
                f"  {configuration}: patch {' x '.join(map(str, plan['patch_size']))} voxels of "
                f"{' x '.join(f'{mm:.3g}' for mm in plan['spacing'])} mm, batch {plan['batch_size']}, "
                f"resolution mode {resolution_mode(plan['spacing'])}, "
                f"about {plan['estimated_training_memory_gb']:g} GB in training on a GPU"
            )
    if len(lines) == 1:
        return f"{lines[0]} only the configuration 2d, with nnU-Net's U-Net: the images are two-dimensional"
    train = f"nnUNetv2_train {dataset_id} 3d_fullres"
    fold = f"$nnUNet_results/{plans['dataset_name']}/VFPretrainTrainer__{name}__3d_fullres/fold_all"
    finetune = f"-tr VFFinetuneTrainer -pretrained_weights {fold}/vf_pretrained.pth"
    return "\n".join(
        [
            *lines,
            "Next:",
            f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {name} -c 3d_fullres",
            f"  {train} all -p {name} -tr VFPretrainTrainer      # if it is to pretrain on",
            f"  {train} 0 -p {name} {finetune}      # or another dataset's",
        ]
    )


class PCTNetPlanner(ExperimentPlanner):
    """All of nnU-Net's planning; topology, patch and batch size of the 3D configurations are PCT-Net's.

    Spacings, normalisation, resampling, the decision for 3d_lowres and the configuration 2d stay nnU-Net's.
    """

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = "PCTNetPlans",
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )

    def get_plans_for_configuration(
        self,
        spacing: Sequence[float],
        median_shape: Sequence[float],
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[Any, Any],
    ) -> dict[str, Any]:
        """nnU-Net's plan of a configuration; for a 3D ``spacing`` (mm) with PCT-Net's topology.

        Raises:
            UserError: not even the smallest patch fits the memory target.
        """
        plan: dict[str, Any] = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        if len(spacing) == 2:
            return plan
        mode = resolution_mode(spacing)
        step = functools.partial(self._step, _cache, mode)
        divisor = total_stride(MODES[mode])
        patches = candidate_patches(spacing, median_shape, divisor)
        patch = self._largest_that_fits(patches, step, self._guess(step, divisor))
        batch_size = self._batch_size(patch, approximate_n_voxels_dataset, step)
        return {
            **plan,
            "patch_size": patch,
            "batch_size": batch_size,
            "architecture": architecture(mode),
            "estimated_training_memory_gb": round(step(patch, batch_size).total / GIB, 1),
        }

    def _step(
        self, cache: dict[Any, Any], mode: int, patch: tuple[int, ...], batch_size: int = _MIN_BATCH
    ) -> StepMemory:
        """What a training step takes; each is measured once."""
        key = ("PCTNet", mode, patch, batch_size)
        if key not in cache:
            channels = len(self.dataset_json.get("channel_names", self.dataset_json.get("modality")))
            classes = max(len(self.dataset_json["labels"]), _PRETEXT_CLASSES)
            build = functools.partial(PCTNet, channels, PUBLISHED_FEATURES, MODES[mode], classes, deep_supervision=True)
            cache[key] = measure_step(build, batch_size, channels, patch)
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
                f"-gpu_memory_target {self.UNet_vram_target_GB:g} is too small for PCT-Net, whose smallest patch is "
                f"{patches[-1]}; use at least {needed:g} GB"
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


def resolution_mode(spacing: Sequence[float]) -> int:
    """The paper's resolution mode for a spacing (mm), slices first: 0, 1 or 2 levels that leave the slices alone.

    The slices are halved once they are less than twice as far apart as the voxels along the coarser of the other
    axes, which is nnU-Net's factor. (nnU-Net compares with the finest axis, but can also leave other axes alone.)
    """
    anisotropy = spacing[0] / max(spacing[1:])
    return min(int(np.floor(np.log2(max(anisotropy, 1)))), len(MODES) - 1)


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


def architecture(mode: int) -> dict[str, Any]:
    """The plan's entry for PCT-Net as published, in a resolution mode."""
    return {
        "network_class_name": f"{PCTNet.__module__}.{PCTNet.__qualname__}",
        "arch_kwargs": {
            "features_per_stage": list(PUBLISHED_FEATURES),
            "strides": [list(stride) for stride in MODES[mode]],
            "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
            "norm_op_kwargs": {"affine": True},
        },
        "_kw_requires_import": ["norm_op"],
    }
