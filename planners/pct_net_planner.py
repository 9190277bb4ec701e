"""nnU-Net's experiment planning with PCT-Net in the 3D configurations: ``nnUNetv2_vf plan -d ID``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2_vf.pct_net import PCT_NET_PATH, PUBLISHED_FEATURES
from nnunetv2_vf.planners.five_level_planner import FiveLevelPlanner


class PCTNetPlanner(FiveLevelPlanner):
    """Plan PCT-Net; the plans are called ``PCTNetPlans``."""

    default_plans_name = "PCTNetPlans"

    @staticmethod
    def published_architecture(strides: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {
            "network_class_name": PCT_NET_PATH,
            "arch_kwargs": {
                "features_per_stage": list(PUBLISHED_FEATURES),
                "strides": [list(stride) for stride in strides],
                "norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
                "norm_op_kwargs": {"affine": True},
            },
            "_kw_requires_import": ["norm_op"],
        }
