"""nnU-Net's experiment planning with FMUNet in the 3D configurations: ``nnUNetv2_vf plan -d ID --network FMUNet``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnunetv2_vf.fmunet import FMUNET_PATH, PUBLISHED_FEATURES
from nnunetv2_vf.planners.five_level_planner import FiveLevelPlanner


class FMUNetPlanner(FiveLevelPlanner):
    """Plan FMUNet; the plans are called ``FMUNetPlans``."""

    default_plans_name = "FMUNetPlans"

    @staticmethod
    def published_architecture(strides: Sequence[Sequence[int]]) -> dict[str, Any]:
        return {
            "network_class_name": FMUNET_PATH,
            "arch_kwargs": {
                "features_per_stage": list(PUBLISHED_FEATURES),
                "strides": [list(stride) for stride in strides],
            },
            "_kw_requires_import": [],
        }
