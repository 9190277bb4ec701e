"""Plans that the user has changed so that their network cannot be trained are refused with one line."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
from conftest import DATASET_ID, edit_json
from nnunetv2.run.run_training import run_training
from torch import device

from nnunetv2_vf.doctor import FAIL, examine
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.network_fit import require_trainable
from nnunetv2_vf.transfer.target_plans import load_target


def set_option(name, value):
    def change(configuration):
        configuration["architecture"]["arch_kwargs"][name] = value

    return change


def set_patch(*patch):
    return lambda configuration: configuration.update(patch_size=list(patch))


@pytest.mark.parametrize("trainer", ["VFPretrainTrainer", "VFFinetuneTrainer"])
@pytest.mark.parametrize(
    ("network", "change", "message"),
    [
        ("FMUNet", set_option("dropout_per_stages", [0] * 5), "'dropout_per_stages'.*; legal: features_per_stage, str"),
        ("FMUNet", set_option("features_per_stage", [8, 16]), r"features_per_stage = \[8, 16\]; legal: 5"),
        ("FMUNet", set_patch(40, 40, 36), r"FMUNet cannot take the patch_size \[40, 40, 36\] of 3d_fullres of FMU"),
        ("FMUNet", set_patch(16, 16, 16), "one voxel in the deepest level"),
        ("PCTNet", set_patch(40, 40, 36), "PCTNet cannot take the patch_size"),
        ("U-Net", set_patch(17, 16, 24), "PlainConvUNet cannot take the patch_size"),
        ("U-Net", set_option("kernel_sizes", [[3, 3]] * 3), "missing or wrong entries: IndexError"),
        ("U-Net", set_option("strides", 2), "3d_fullres of nnUNetPlans .*has missing or wrong entries: TypeError"),
        ("U-Net", lambda entry: entry["architecture"].pop("arch_kwargs"), "missing or wrong entries: KeyError"),
        ("U-Net", lambda entry: entry["architecture"].pop("_kw_requires_import"), "missing or wrong entries: KeyError"),
    ],
)
def test_plans_that_cannot_be_trained_are_refused_in_one_line(
    pct_plans, fmunet_plans, copied_dataset, trainer, network, change, message
):
    name = {"FMUNet": fmunet_plans, "PCTNet": pct_plans, "U-Net": "nnUNetPlans"}[network]
    edit_json(copied_dataset / f"{name}.json", lambda content: change(content["configurations"]["3d_fullres"]))
    with pytest.raises(SystemExit, match=f"^nnUNetv2_vf: error: .*{message}"):
        run_training(str(DATASET_ID), "3d_fullres", 0, trainer, name, device=device("cpu"))
    failures = [finding.text for finding in examine(str(DATASET_ID), name) if finding.state == FAIL]
    assert any(re.search(message, text) for text in failures)


@pytest.mark.parametrize("trainer", ["VFPretrainTrainer", "VFFinetuneTrainer"])
def test_a_copy_of_plans_that_kept_the_name_of_the_original_is_refused(copied_dataset, tmp_path, trainer):
    """nnU-Net would train it into the results of the original."""
    shutil.copy(copied_dataset / "nnUNetPlans.json", copied_dataset / "CopiedPlans.json")
    edit_json(
        copied_dataset / "CopiedPlans.json", lambda plans: set_patch(8, 16, 16)(plans["configurations"]["3d_fullres"])
    )
    with pytest.raises(SystemExit, match=r'CopiedPlans.json states .* into the copy: "plans_name": "CopiedPlans"$'):
        run_training(str(DATASET_ID), "3d_fullres", 0, trainer, "CopiedPlans", device=device("cpu"))
    message = 'states .*"plans_name": "nnUNetPlans"; .*"plans_name": "CopiedPlans"'
    failures = [finding.text for finding in examine(str(DATASET_ID), "CopiedPlans") if finding.state == FAIL]
    assert any(re.search(message, text) for text in failures)


def test_plans_copied_from_another_dataset_are_refused(copied_dataset):
    edit_json(copied_dataset / "nnUNetPlans.json", lambda plans: plans.update(dataset_name="Dataset008_Other"))
    with pytest.raises(UserError, match='states "dataset_name": "Dataset008_Other", "plans_name": "nnUNetPlans"; '):
        load_target(str(DATASET_ID), "nnUNetPlans", "3d_fullres")


def test_the_smallest_patch_of_pct_net_is_accepted(pct_plans, copied_dataset):
    """Its deepest level has one voxel, with which batch norms train if the batch has two samples."""
    smallest = set_patch(16, 16, 16)
    edit_json(copied_dataset / f"{pct_plans}.json", lambda content: smallest(content["configurations"]["3d_fullres"]))
    require_trainable(load_target(str(DATASET_ID), pct_plans, "3d_fullres"))


@pytest.mark.parametrize(("cases", "fold"), [(4, "all"), (5, 0)])
def test_suggested_commands_train_a_fold_that_nnunet_can_make(target, cases, fold):
    assert dataclasses.replace(target, dataset_json={"numTraining": cases}).first_fold == fold
