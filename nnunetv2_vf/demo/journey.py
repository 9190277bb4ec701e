"""Pretrain on unlabelled phantoms, fine-tune on a few labelled ones, predict held-out ones."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import torch

from nnunetv2_vf.demo.phantoms import LABELS, write_dataset, write_images, write_labels
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Workspace
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME

_UNLABELLED_ID, _LABELLED_ID = 901, 902
_UNLABELLED, _LABELLED = f"Dataset{_UNLABELLED_ID}_VFDemoUnlabelled", f"Dataset{_LABELLED_ID}_VFDemoLabelled"
_PRETRAIN, _FINETUNE = "VFPretrainTrainer", "VFFinetuneTrainer"
_PLANS = "VFPlans"  # of the labelled dataset, made with plan --like
_CPU_MEMORY_TARGET = 0.033  # GB: gives the reduced network a patch of 24x32x40 voxels
# Seeds of the phantoms. The fold 'all' trains on all labelled ones; the test phantoms are written separately.
_UNLABELLED_SEEDS, _LABELLED_SEEDS, _TEST_SEEDS = range(24), range(100, 104), range(200, 208)
_PRETRAINING = {
    "num_epochs": 16,
    "iterations_per_epoch": 25,
    "val_iterations_per_epoch": 4,
    # The phantoms' organs differ mainly in their HU. Augmentations that change the HU would hide that difference.
    "contrast_probability": 0,
    "gamma": "1,1",
    "invert_probability": 0,
}
_FINETUNING = {
    "num_epochs": 8,
    "iterations_per_epoch": 25,
    "val_iterations_per_epoch": 1,
    "optimizer": "adam",  # better than SGD after so few steps, both from scratch and from pretrained weights
    "initial_lr": 0.001,
}


def demo(folder: Path | None, device: str | None) -> None:
    """Pretrain, fine-tune with and without the pretrained weights, predict, and print a table of Dice.

    Args:
        folder: keeps all files; must be new or empty. Default: a new temporary folder.
        device: 'cpu', 'cuda' or 'mps'. Default: cuda if available, else cpu.

    Raises:
        UserError: the folder is not empty, or a command failed.
    """
    start = time.monotonic()
    folder = folder or Path(tempfile.mkdtemp(prefix="nnunetv2_vf_demo_"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name another with --out")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    workspace = Workspace(folder, processes=min(4, os.cpu_count() or 1))
    print(f"{len(_UNLABELLED_SEEDS)} unlabelled and {len(_LABELLED_SEEDS)} labelled phantoms, on {device}")
    print(f"(to follow a step: tail -f {workspace.log})")

    _prepare_datasets(workspace, small=device == "cpu")
    pretrained = _pretrain(workspace, device)
    _plan_target(workspace, pretrained / ARTIFACT_NAME, small=device == "cpu")
    arms = {"pretrained": pretrained / ARTIFACT_NAME, "scratch": None}
    dice = {arm: _finetune(workspace, device, arm, weights) for arm, weights in arms.items()}
    _print_results(pretrained, dice)
    print(f"\nall files are in {workspace.folder}; the demo took {time.monotonic() - start:.0f} s")


def _prepare_datasets(workspace: Workspace, small: bool) -> None:
    """Write all phantoms; import, plan and preprocess the unlabelled dataset; compute the fingerprints of both."""
    write_images(workspace.folder / "unlabelled", _UNLABELLED_SEEDS)
    write_dataset(workspace.raw / _LABELLED, _LABELLED_SEEDS)
    write_images(workspace.folder / "test_images", _TEST_SEEDS)
    write_labels(workspace.folder / "test_labels", _TEST_SEEDS)
    name = _UNLABELLED.partition("_")[2]
    workspace.run("nnUNetv2_vf", "import", "-d", _UNLABELLED_ID, "-n", name, workspace.folder / "unlabelled", "-np", 2)
    workspace.run("nnUNetv2_extract_fingerprint", "-d", _UNLABELLED_ID, _LABELLED_ID)
    workspace.run("nnUNetv2_plan_experiment", "-d", _UNLABELLED_ID)
    if small:
        shrink_plans(workspace.preprocessed / _UNLABELLED / "nnUNetPlans.json")
    workspace.run("nnUNetv2_preprocess", "-d", _UNLABELLED_ID, "-c", "3d_fullres", "-np", 2)


def shrink_plans(file: Path) -> None:
    """Reduce nnU-Net's plans for a CPU: a patch of 32 voxels per side, 4 stages, a quarter of the features."""
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    network = configuration["architecture"]["arch_kwargs"]
    stages = 4
    network.update(
        {name: value[:stages] for name, value in network.items() if isinstance(value, list)},
        n_stages=stages,
        features_per_stage=[8, 16, 32, 64],
        n_conv_per_stage_decoder=network["n_conv_per_stage_decoder"][: stages - 1],
    )
    configuration.update(patch_size=[32, 32, 32], batch_size=2)
    file.write_text(json.dumps(plans, indent=2))
    print(f"({file.name} reduced to patch 32x32x32 and {stages} stages)")


def _pretrain(workspace: Workspace, device: str) -> Path:
    """Pretrain on the unlabelled phantoms; return the fold's folder."""
    variables = {f"nnUNet_vf_{name}": value for name, value in _PRETRAINING.items()}
    workspace.run(
        "nnUNetv2_train", _UNLABELLED_ID, "3d_fullres", "all", "-tr", _PRETRAIN, "-device", device, **variables
    )
    return workspace.fold_folder(_UNLABELLED, _PRETRAIN, "all")


def _plan_target(workspace: Workspace, artifact: Path, small: bool) -> None:
    """Plan the labelled dataset with the pretrained network, and preprocess it."""
    memory = ["-gpu_memory_target", _CPU_MEMORY_TARGET] if small else []
    workspace.run("nnUNetv2_vf", "plan", "-d", _LABELLED_ID, "--like", artifact, *memory)
    workspace.run("nnUNetv2_preprocess", "-d", _LABELLED_ID, "-plans_name", _PLANS, "-c", "3d_fullres", "-np", 2)


def _finetune(workspace: Workspace, device: str, arm: str, weights: Path | None) -> dict[str, float]:
    """Fine-tune and predict the test phantoms; return the Dice by label ("1", "2", ...) and their "mean"."""
    images, labels, predictions = (workspace.folder / f"test_{name}" for name in ("images", "labels", arm))
    results = workspace.folder / f"results_{arm}"
    variables = {f"nnUNet_vf_finetune_{name}": value for name, value in _FINETUNING.items()}
    pretrained_weights = ["-pretrained_weights", weights] if weights else []
    workspace.run(
        "nnUNetv2_train", _LABELLED_ID, "3d_fullres", "all", "-p", _PLANS, "-tr", _FINETUNE, "-device", device,
        *pretrained_weights, nnUNet_results=results, **variables,
    )  # fmt: skip
    workspace.run(
        "nnUNetv2_predict", "-d", _LABELLED_ID, "-c", "3d_fullres", "-p", _PLANS, "-tr", _FINETUNE, "-f", "all",
        "-device", device, "-i", images, "-o", predictions, "-npp", 1, "-nps", 1, "--disable_tta",
        nnUNet_results=results,
    )  # fmt: skip
    return workspace.evaluate(labels, predictions)


def _print_results(pretrained: Path, dice: dict[str, dict[str, float]]) -> None:
    report = json.loads((pretrained / "pretext_report.json").read_text())
    columns = {str(label): name for name, label in LABELS.items()} | {"mean": "mean"}
    print(f"\npretext Dice (mean over the fusion classes): {report['mean_dice']:.3f}")
    print(f"test Dice on {len(_TEST_SEEDS)} held-out phantoms, same fine-tuning for both:")
    print(f"  {'':12}" + "".join(f"{columns[label]:>9}" for label in dice["scratch"]))
    for arm, per_label in dice.items():
        print(f"  {arm:12}" + "".join(f"{value:9.3f}" for value in per_label.values()))
    print("\npictures:")
    for picture in ("preview.png", "progress.png", "pretext_report.png"):
        print(f"  {pretrained / picture}")
