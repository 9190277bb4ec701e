"""The whole journey on phantoms: pretrain on unlabelled ones, fine-tune on a few labelled ones, predict others."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path

import torch

from nnunetv2_vf.demo.phantoms import LABELS, write_dataset, write_images, write_labels
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.nnunet_commands import Host
from nnunetv2_vf.transfer.artifact import FILE_NAME

_UNLABELLED, _LABELLED = "Dataset901_VFDemoUnlabelled", "Dataset902_VFDemoLabelled"
_PRETRAIN, _FINETUNE = "VFPretrainTrainer", "VFFinetuneTrainer"
_PLANS = "VFPlans"  # of the labelled dataset, made like the artifact
_CPU_MEMORY_TARGET = 0.033  # GB: gives the reduced network a patch of 24x32x40 voxels
# Seeds of the phantoms. nnU-Net splits off nothing here: fold 'all' trains on all labelled ones.
_POOL, _FEW, _HELD_OUT = range(24), range(100, 104), range(200, 208)
_PRETRAINING = {
    "num_epochs": 16,
    "iterations_per_epoch": 25,
    "val_iterations_per_epoch": 4,
    # the phantoms' organs differ in little but their HU: an augmentation that changes it hides what is to be learnt
    "contrast_probability": 0,
    "gamma": "1,1",
    "invert_probability": 0,
}
_FINETUNING = {
    "num_epochs": 8,
    "iterations_per_epoch": 25,
    "val_iterations_per_epoch": 1,
    "optimizer": "adam",  # in so few steps it gets further than SGD, from scratch and from pretrained weights
    "initial_lr": 0.001,
}


def demo(folder: Path | None, device: str | None) -> None:
    """Run the journey and print one table.

    Args:
        folder: where everything is kept; must be new or empty. Default: a new temporary folder.
        device: 'cpu', 'cuda' or 'mps'. Default: cuda if there is one.

    Raises:
        UserError: the folder holds something, or a command failed.
    """
    start = time.monotonic()
    folder = folder or Path(tempfile.mkdtemp(prefix="nnunetv2_vf_demo_"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; name another with --out")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    host = Host(folder, processes=min(4, os.cpu_count() or 1))
    print(f"{len(_POOL)} unlabelled and {len(_FEW)} labelled phantoms in {host.folder}, on {device}")
    print(f"(follow a step with: tail -f {host.log})")

    _prepare(host, small=device == "cpu")
    pretrained = _pretrain(host, device)
    _plan_target(host, pretrained / FILE_NAME, small=device == "cpu")
    arms = {"pretrained": pretrained / FILE_NAME, "scratch": None}
    dice = {arm: _finetune(host, device, arm, weights) for arm, weights in arms.items()}
    _print_results(pretrained, dice)
    print(f"\nall of it in {host.folder}, in {time.monotonic() - start:.0f} s")


def _prepare(host: Host, small: bool) -> None:
    """Make both datasets; plan and preprocess the unlabelled one."""
    write_images(host.folder / "unlabelled", _POOL)
    write_dataset(host.raw / _LABELLED, _FEW)
    write_images(host.folder / "test_images", _HELD_OUT)
    write_labels(host.folder / "test_labels", _HELD_OUT)
    name = _UNLABELLED.partition("_")[2]
    host.run("nnUNetv2_vf", "import", "-d", 901, "-n", name, host.folder / "unlabelled", "-np", 2)
    host.run("nnUNetv2_extract_fingerprint", "-d", 901, 902)
    host.run("nnUNetv2_plan_experiment", "-d", 901)
    if small:
        _shrink(host.preprocessed / _UNLABELLED / "nnUNetPlans.json")
    host.run("nnUNetv2_preprocess", "-d", 901, "-c", "3d_fullres", "-np", 2)


def _shrink(plans_file: Path) -> None:
    """Reduce nnU-Net's plan for a machine without a GPU: a patch of 32 voxels a side, a quarter of the features."""
    plans = json.loads(plans_file.read_text())
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
    plans_file.write_text(json.dumps(plans, indent=2))
    print(f"(no GPU: {plans_file.name} reduced to patch 32x32x32 and {stages} stages)")


def _pretrain(host: Host, device: str) -> Path:
    """Pretrain on the unlabelled phantoms; returns the fold's folder."""
    variables = {f"nnUNet_vf_{name}": value for name, value in _PRETRAINING.items()}
    host.run("nnUNetv2_train", 901, "3d_fullres", "all", "-tr", _PRETRAIN, "-device", device, **variables)
    return host.fold_folder(_UNLABELLED, _PRETRAIN, "all")


def _plan_target(host: Host, artifact: Path, small: bool) -> None:
    """Plan the labelled dataset with the pretrained network, and preprocess it."""
    memory = ["-gpu_memory_target", _CPU_MEMORY_TARGET] if small else []
    host.run("nnUNetv2_vf", "plan", "-d", 902, "--like", artifact, *memory)
    host.run("nnUNetv2_preprocess", "-d", 902, "-plans_name", _PLANS, "-c", "3d_fullres", "-np", 2)


def _finetune(host: Host, device: str, arm: str, weights: Path | None) -> dict[str, float]:
    """Fine-tune on the labelled phantoms and predict held-out ones; returns their Dice per organ."""
    images, labels, predictions = (host.folder / f"test_{name}" for name in ("images", "labels", arm))
    results = host.folder / f"results_{arm}"
    variables = {f"nnUNet_vf_finetune_{name}": value for name, value in _FINETUNING.items()}
    given = ["-pretrained_weights", weights] if weights else []
    host.run(
        "nnUNetv2_train", 902, "3d_fullres", "all", "-p", _PLANS, "-tr", _FINETUNE, "-device", device, *given,
        nnUNet_results=results, **variables,
    )  # fmt: skip
    host.run(
        "nnUNetv2_predict", "-d", 902, "-c", "3d_fullres", "-p", _PLANS, "-tr", _FINETUNE, "-f", "all",
        "-device", device, "-i", images, "-o", predictions, "-npp", 1, "-nps", 1, "--disable_tta",
        nnUNet_results=results,
    )  # fmt: skip
    return host.evaluate(labels, predictions)


def _print_results(pretrained: Path, dice: dict[str, dict[str, float]]) -> None:
    report = json.loads((pretrained / "pretext_report.json").read_text())
    organs = {str(label): name for name, label in LABELS.items()} | {"mean": "mean"}
    print(f"\npretext Dice (mean over the fusion classes): {report['mean_dice']:.3f}")
    print(f"test Dice on {len(_HELD_OUT)} held-out phantoms, same fine-tuning for both:")
    print(f"  {'':12}" + "".join(f"{organs[label]:>9}" for label in dice["scratch"]))
    for arm, per_label in dice.items():
        print(f"  {arm:12}" + "".join(f"{value:9.3f}" for value in per_label.values()))
    print("\npictures:")
    for picture in ("preview.png", "progress.png", "pretext_report.png"):
        print(f"  {pretrained / picture}")
