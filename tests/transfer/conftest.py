from __future__ import annotations

import copy
from pathlib import Path

import pytest
from conftest import DATASET_ID

from nnunetv2_vf.transfer.target_plans import TargetPlans, load_target


@pytest.fixture
def artifact(artifacts: dict[str, Path]) -> Path:
    """The artifact of a U-Net that was pretrained on the dataset of ``target``."""
    return artifacts["U-Net"]


@pytest.fixture
def target(copied_dataset: Path) -> TargetPlans:
    return load_target(str(DATASET_ID), "nnUNetPlans", "3d_fullres")


@pytest.fixture
def change_target(target: TargetPlans):
    """Return a function that makes a copy of ``target`` with other channel names or changes of its plans."""

    def change(channel_names=None, arch_kwargs=None, **configuration) -> TargetPlans:
        plans = copy.deepcopy(target.plans_manager.plans)
        plans["configurations"]["3d_fullres"] |= configuration
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] |= arch_kwargs or {}
        names = dict(enumerate(channel_names)) if channel_names else target.channel_names
        dataset_json = {**target.dataset_json, "channel_names": {str(number): name for number, name in names.items()}}
        return TargetPlans(type(target.plans_manager)(plans), "3d_fullres", dataset_json)

    return change
