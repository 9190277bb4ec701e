"""The documentation's picture of the pretext task: a U-Net that has learnt it, on left atrium MR that it has not seen.

    python benchmarks/pretext_picture.py DATA --work FOLDER [--epochs 26] [--device cuda]

DATA is ``Dataset101_LeftAtrium`` in nnU-Net's raw format (2018 Atrial Segmentation Challenge, Xiong et al., 2021), with
the split by case name in ``split.json``. nnU-Net's default U-Net is pretrained with the default settings on the
training images, with a patch of 64x96x96 voxels and a batch of 4. The picture shows the axial slices of two validation
samples. Writes ``docs/images/pretext.png`` and ``pretext_picture.json``.

Duration: 8 minutes on one H100. Needs: the dataset, a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import IMAGES, RESULTS, describe_device, make_parser, write_result
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_vf.nnunet_commands import Workspace
from nnunetv2_vf.pretext.dataset import VALIDATION
from nnunetv2_vf.pretext.loader import collate
from nnunetv2_vf.pretext.pictures import Example, class_colours, make_examples

DATASET_ID, DATASET = 101, "Dataset101_LeftAtrium"
PATCH, BATCH = [64, 96, 96], 4
ITERATIONS_PER_EPOCH = 250
SHOWN_SAMPLES = (1, 2)  # of the first validation batch
CLASSES = 5


def main() -> None:
    parser = make_parser(__doc__, device=True, output=True, work=True)
    parser.set_defaults(device="cuda")
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--epochs", type=int, default=26, help=f"of {ITERATIONS_PER_EPOCH} iterations")
    args = parser.parse_args()
    workspace = Workspace(args.work, processes=max(1, (os.cpu_count() or 1) - 2))
    prepare(workspace, args.data)
    os.environ |= workspace.environment | {  # nnU-Net reads its variables when it is imported
        "nnUNet_vf_num_epochs": str(args.epochs),
        "nnUNet_vf_iterations_per_epoch": str(ITERATIONS_PER_EPOCH),
        "nnUNet_vf_val_iterations_per_epoch": "10",
    }
    trainer, result = pretrain(args)
    draw(make_shown_examples(trainer), IMAGES / "pretext.png")
    write_result(args.output or RESULTS / "pretext_picture.json", result)


def prepare(workspace: Workspace, data: Path) -> None:
    """Plan and preprocess with nnU-Net's commands; write fold 0 from the published split."""
    raw, preprocessed = workspace.raw / DATASET, workspace.preprocessed / DATASET
    if not raw.exists():
        raw.symlink_to(data.resolve())
    workspace.run("nnUNetv2_extract_fingerprint", "-d", DATASET_ID)
    workspace.run("nnUNetv2_plan_experiment", "-d", DATASET_ID)
    plans_file = preprocessed / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_fullres"] |= {"patch_size": PATCH, "batch_size": BATCH}
    plans_file.write_text(json.dumps(plans))
    workspace.run("nnUNetv2_preprocess", "-d", DATASET_ID, "-c", "3d_fullres")
    cases = {path.name.removesuffix("_0000.nii.gz") for path in (raw / "imagesTr").iterdir()}
    split = json.loads((raw / "split.json").read_text())
    fold = {"train": sorted(cases & {*split["train"]}), "val": sorted(cases & {*split["valid"]})}
    (preprocessed / "splits_final.json").write_text(json.dumps([fold]))


def pretrain(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Pretrain on fold 0; return the trainer and the numbers."""
    from nnunetv2.run.run_training import get_trainer_from_args

    start = time.monotonic()
    device = torch.device(args.device)
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFPretrainTrainer", device=device)
    trainer.disable_checkpointing = True
    trainer.run_training()
    trainer.perform_actual_validation()
    report = json.loads((Path(trainer.output_folder) / "pretext_report.json").read_text())
    training_cases, validation_cases = (len(cases.identifiers) for cases in trainer._cases)
    return trainer, {
        "machine": describe_device(args.device),
        "training_cases": training_cases,
        "validation_cases": validation_cases,
        "iterations": args.epochs * ITERATIONS_PER_EPOCH,
        "seconds": round(time.monotonic() - start),
        "mean_dice": report["mean_dice"],
        "dice_per_class": report["dice_per_class"],
    }


def make_shown_examples(trainer: Any) -> list[Example]:
    trainer.network.eval()
    samples = trainer._samples(VALIDATION)
    batch = collate([samples[index] for index in SHOWN_SAMPLES])
    return make_examples(batch, trainer.settings, trainer.device, trainer._predict)


def draw(examples: Sequence[Example], file: Path) -> None:
    """Draw the middle axial slices of the examples."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    for row, example in zip(figure.subplots(len(examples), 5, squeeze=False), examples, strict=True):
        for axes, (title, volume) in zip(row, {**example.volumes, **example.maps}.items(), strict=True):
            is_map = title in example.maps
            colours = {"cmap": "viridis", "vmin": 0, "vmax": CLASSES - 1} if is_map else {"cmap": "gray"}
            axes.imshow(volume[len(volume) // 2], interpolation="nearest", **colours)
            axes.set_title(title if example is examples[0] else "", fontsize=10)
            axes.set_axis_off()
    colours_by_class = class_colours(CLASSES - 1).items()
    handles = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in colours_by_class]
    figure.legend(handles=handles, loc="outside lower center", ncols=CLASSES)
    figure.savefig(file, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
