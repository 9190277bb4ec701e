"""nnU-Net's experiment planning with PCT-Net in the 3D configurations: ``nnUNetv2_vf plan -d ID``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunetv2_vf.pct_net import MODES, PUBLISHED_FEATURES, PCTNet
from nnunetv2_vf.planners.memory_fitting import TopologyPlanner, planned_configurations


class PCTNetPlanner(TopologyPlanner):
    """Plans PCT-Net in the resolution mode that follows from the spacing, as ``PCTNetPlans``."""

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

    def topology(self, spacing: Sequence[float]) -> dict[str, Any]:
        return architecture(resolution_mode(spacing))


def resolution_mode(spacing: Sequence[float]) -> int:
    """The paper's resolution mode for a spacing (mm), slices first: 0, 1 or 2 levels that leave the slices alone.

    The slices are halved once they are less than twice as far apart as the voxels along the coarser of the other
    axes, which is nnU-Net's factor. (nnU-Net compares with the finest axis, but can also leave other axes alone.)
    """
    anisotropy = spacing[0] / max(spacing[1:])
    return min(int(np.floor(np.log2(max(anisotropy, 1)))), len(MODES) - 1)


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


def next_steps(plans: dict[str, Any], name: str) -> str:
    """What was planned, and the commands that come next."""
    planned = planned_configurations(plans)
    if not planned:
        return (
            f"{name} of {plans['dataset_name']}: only the configuration 2d, with nnU-Net's U-Net: the images are "
            "two-dimensional"
        )
    dataset_id = convert_dataset_name_to_id(plans["dataset_name"])
    train = f"nnUNetv2_train {dataset_id} 3d_fullres"
    fold = f"$nnUNet_results/{plans['dataset_name']}/VFPretrainTrainer__{name}__3d_fullres/fold_all"
    finetune = f"-tr VFFinetuneTrainer -pretrained_weights {fold}/vf_pretrained.pth"
    modes = {each: resolution_mode(plans["configurations"][each]["spacing"]) for each in planned}
    return "\n".join(
        [
            f"{name} of {plans['dataset_name']}:",
            *(f"  {each}: resolution mode {modes[each]}, {about}" for each, about in planned.items()),
            "Next:",
            f"  nnUNetv2_preprocess -d {dataset_id} -plans_name {name} -c 3d_fullres",
            f"  {train} all -p {name} -tr VFPretrainTrainer      # if it is to pretrain on",
            f"  {train} 0 -p {name} {finetune}      # its labels; for another dataset: plan --like",
        ]
    )
