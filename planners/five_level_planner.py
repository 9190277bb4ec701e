"""nnU-Net's experiment planning with one of MIS-FM's networks: ``nnUNetv2_vf plan -d ID [--network FMUNet]``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunetv2_vf.five_level_network import MODES
from nnunetv2_vf.planners.topology_planner import TopologyPlanner, describe_plans, plan_datasets
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME
from nnunetv2_vf.transfer.target_plans import load_target


def plan_network(datasets: Sequence[str], planner: type[FiveLevelPlanner], **options: Any) -> Iterator[str]:
    """Write plans with the planner's network for datasets.

    Args:
        datasets: ids or names; their fingerprints must exist.
        options: of :func:`~nnunetv2_vf.planners.topology_planner.plan_datasets`.

    Yields:
        for each dataset a description of its plans and the next commands.

    Raises:
        UserError: see :func:`~nnunetv2_vf.planners.topology_planner.plan_datasets`.
    """
    for plans, name in plan_datasets(datasets, planner, **options):
        yield _describe_plans(plans, name)


class FiveLevelPlanner(TopologyPlanner):
    """Plan a network of five levels in the resolution mode that follows from the spacing."""

    default_plans_name: ClassVar[str]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = 8,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
    ):
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name or self.default_plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )

    def choose_architecture(self, spacing: Sequence[float]) -> dict[str, Any]:
        return self.published_architecture(MODES[resolution_mode(spacing)])

    @staticmethod
    def published_architecture(strides: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the plan's entry ``architecture`` for the published network.

        Args:
            strides: of a resolution mode, one of :data:`~nnunetv2_vf.five_level_network.MODES`.
        """
        raise NotImplementedError


def resolution_mode(spacing: Sequence[float]) -> int:
    """Return the paper's resolution mode: the number of levels that do not halve the slice axis, 0, 1 or 2.

    A level halves the slice axis if the slices are less than twice as far apart as the voxels along the coarser
    in-plane axis. nnU-Net also uses the factor 2, but it compares each axis with the finest one, and may skip the
    halving of any axis.

    Args:
        spacing: mm, slice axis first.
    """
    anisotropy = spacing[0] / max(spacing[1:])
    return min(math.floor(math.log2(max(anisotropy, 1))), len(MODES) - 1)


def _describe_plans(plans: dict[str, Any], name: str) -> str:
    planned_here = [plan for plan in plans["configurations"].values() if "estimated_training_memory_gb" in plan]
    modes = {resolution_mode(plan["spacing"]) for plan in planned_here}
    remark = f", resolution mode {' and '.join(map(str, sorted(modes)))}"
    dataset_id = convert_dataset_name_to_id(plans["dataset_name"])
    fold = f"$nnUNet_results/{plans['dataset_name']}/VFPretrainTrainer__{name}__3d_fullres/fold_all"
    train = f"nnUNetv2_train {dataset_id} 3d_fullres"
    weights = f"{fold}/{ARTIFACT_NAME}"  # not quoted: the shell replaces $nnUNet_results
    has_3d = "3d_fullres" in plans["configurations"]
    first_fold = load_target(plans["dataset_name"], name, "3d_fullres").first_fold if has_3d else 0
    commands = [
        f"{train} all -p {name} -tr VFPretrainTrainer      # pretrain on this dataset",
        f"{train} {first_fold} -p {name} -tr VFFinetuneTrainer -pretrained_weights {weights}"
        "      # fine-tune on the labels of this dataset; for another one: nnUNetv2_vf plan --like",
    ]
    return describe_plans(plans, name, remark, commands)
