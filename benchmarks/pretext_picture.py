"""The README's picture of the pretext task: a U-Net that has learnt it, on left atrium MR that it has not seen.

    python benchmarks/pretext_picture.py train --data FOLDER/Dataset101_LeftAtrium --epochs 26 --device cuda
    python benchmarks/pretext_picture.py draw

``train`` pretrains nnU-Net's default U-Net with the default settings on the training images of ``split.json``, with a
patch of 64x96x96 voxels and a batch of 4, and keeps the trainer's log and ``preview.png``, which shows validation
samples. About 8 minutes on one H100. ``draw`` makes the picture from that preview. Data: 2018 Atrial Segmentation
Challenge (Xiong et al., 2021).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Patch

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
DATASET_ID, DATASET = 101, "Dataset101_LeftAtrium"
PATCH, BATCH = [64, 96, 96], 4
PREVIEW = "pretext_preview.png"
# Pixels of the preview: the top of two examples' axial slices, the left of each image, and the side of an image.
ROWS = (601, 1185)
COLUMNS = {
    "foreground sub-volume": 35,
    "background sub-volume": 237,
    "fused (input)": 440,
    "fusion map (target)": 642,
    "prediction": 845,
}
SIDE = 189


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train")
    training.add_argument("--data", type=Path, required=True, help="Dataset101_LeftAtrium in nnU-Net raw format")
    training.add_argument("--work", type=Path, default=Path("pretext_picture"), help="folder for nnU-Net's files")
    training.add_argument("--epochs", type=int, default=26, help="of 250 iterations")
    training.add_argument("--device", default="cuda")
    training.add_argument("--out", type=Path, default=RESULTS)
    training.set_defaults(run=train)
    drawing = commands.add_parser("draw")
    drawing.add_argument("--preview", type=Path, default=RESULTS / PREVIEW)
    drawing.add_argument("--out", type=Path, default=IMAGES / "pretext.png")
    drawing.set_defaults(run=draw)
    arguments = parser.parse_args()
    arguments.run(arguments)


def train(arguments: argparse.Namespace) -> None:
    """Prepare the dataset, pretrain, and keep the preview and the scores."""
    _set_environment(arguments)
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    _prepare(arguments.data)
    start = time.monotonic()
    device = torch.device(arguments.device)
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "VFPretrainTrainer", device=device)
    trainer.disable_checkpointing = True
    trainer.run_training()
    trainer.perform_actual_validation()

    arguments.out.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(trainer.output_folder) / "preview.png", arguments.out / PREVIEW)
    report = json.loads((Path(trainer.output_folder) / "pretext_report.json").read_text())
    about = {
        "machine": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "training_cases": len(trainer._cases[0].identifiers),
        "iterations": arguments.epochs * 250,
        "seconds": round(time.monotonic() - start),
        "mean_dice": report["mean_dice"],
        "dice_per_class": report["dice_per_class"],
    }
    (arguments.out / "pretext_picture.json").write_text(json.dumps(about, indent=1))


def _set_environment(arguments: argparse.Namespace) -> None:
    """Set nnU-Net's folders and the schedule; nnU-Net reads them when it is imported."""
    from nnunetv2_vf.nnunet_commands import trainer_path

    work = arguments.work.resolve()
    cores = str(max(1, (os.cpu_count() or 1) - 2))
    for name in ("raw", "preprocessed", "results"):
        (work / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ |= {
        "nnUNet_extTrainer": trainer_path(""),
        "nnUNet_def_n_proc": cores,
        "nnUNet_n_proc_DA": cores,
        "nnUNet_vf_num_epochs": str(arguments.epochs),
        "nnUNet_vf_val_iterations_per_epoch": "10",
    }


def _prepare(data: Path) -> None:
    """Fingerprint, plans and preprocessing by nnU-Net; the fold is the published split of the cases that are here."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess

    raw, preprocessed = (Path(os.environ[f"nnUNet_{name}"]) / DATASET for name in ("raw", "preprocessed"))
    if not raw.exists():
        raw.symlink_to(data.resolve())
    cases = {path.name.removesuffix("_0000.nii.gz") for path in (raw / "imagesTr").iterdir()}
    split = json.loads((raw / "split.json").read_text())
    fold = {"train": sorted(cases & {*split["train"]}), "val": sorted(cases & {*split["valid"]})}
    print(f"{len(fold['train'])} training and {len(fold['val'])} validation cases")
    extract_fingerprints([DATASET_ID], num_processes=8)
    plan_experiments([DATASET_ID])
    plans_file = preprocessed / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_fullres"] |= {"patch_size": PATCH, "batch_size": BATCH}
    plans_file.write_text(json.dumps(plans))
    preprocess([DATASET_ID], "nnUNetPlans", configurations=["3d_fullres"], num_processes=[8])
    (preprocessed / "splits_final.json").write_text(json.dumps([fold]))


def draw(arguments: argparse.Namespace) -> None:
    """Draw the axial slices of two examples of the preview, with plain headings."""
    preview = imread(arguments.preview)
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    grid = figure.subplots(len(ROWS), len(COLUMNS))
    for axes, top in zip(grid, ROWS, strict=True):
        for cell, left in zip(axes, COLUMNS.values(), strict=True):
            cell.imshow(preview[top + 2 : top + SIDE - 2, left + 2 : left + SIDE - 2], interpolation="nearest")
            cell.set_axis_off()
    for cell, title in zip(grid[0], COLUMNS, strict=True):
        cell.set_title(title, fontsize=10)
    colours = colormaps["viridis"]
    handles = [Patch(facecolor=colours(i / 4), edgecolor="black", label=f"a = {i}/4") for i in range(5)]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)
    figure.savefig(arguments.out, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
