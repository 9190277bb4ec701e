"""The whole road on the Hippocampus task of the Medical Segmentation Decathlon, with stock nnU-Net commands.

    python benchmarks/hippocampus.py DATA --out FOLDER [--device cpu]

DATA is ``Dataset004_Hippocampus`` in nnU-Net's raw format. Pretrains on the images of fold 0's training cases,
then trains one epoch of stock nnU-Net (250 iterations) with and without the pretrained weights, and predicts the
cases of fold 0's validation set, which neither training saw. A step whose result is in FOLDER is not run again.
Writes ``hippocampus.json`` and the pictures that ``docs/hippocampus.md`` shows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Host

DATASET = "Dataset004_Hippocampus"
PRETRAIN = "VFPretrainTrainer"
FINETUNE = "nnUNetTrainer_1epoch"  # stock: 250 iterations
EPOCHS, ITERATIONS, VAL_ITERATIONS = 24, 25, 8  # pretraining: 600 iterations; 32 fixed validation samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "mps"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    parser.add_argument("--arms", nargs="+", default=["pretrained", "scratch"], choices=("pretrained", "scratch"))
    args = parser.parse_args()
    with one_line_errors():
        host = Host(args.out, processes=2)
        prepare(host, args.data)
        untrained = untrained_dice(host, args.device)
        pretrained = pretrain(host, args.device)
        arms = {"pretrained": ("results", pretrained / "vf_pretrained.pth"), "scratch": ("results_scratch", None)}
        dice = {arm: finetune(host, args.device, *arms[arm]) for arm in args.arms}
        write_results(args.docs, pretrained, untrained, dice)


def prepare(host: Host, data: Path) -> None:
    """Copy the dataset, plan and preprocess it."""
    if not (host.preprocessed / DATASET / "nnUNetPlans_3d_fullres").is_dir():
        copy_raw(host, data)
        host.run("nnUNetv2_plan_and_preprocess", "-d", 4, "-c", "3d_fullres", "-np", 2)


def copy_raw(host: Host, data: Path) -> None:
    """Copy the dataset to the host's raw folder."""
    shutil.copytree(data, host.raw / DATASET, copy_function=shutil.copyfile, dirs_exist_ok=True)


def untrained_dice(host: Host, device: str) -> dict:
    """The pretext report of a network after one step at a learning rate of nothing."""
    results = host.folder / "results_untrained"
    fold = host.fold_folder(DATASET, PRETRAIN, 0, results)
    if not (fold / "pretext_report.json").is_file():
        host.run(
            "nnUNetv2_train", 4, "3d_fullres", 0, "-tr", PRETRAIN, "-device", device, nnUNet_results=results,
            nnUNet_vf_num_epochs=1, nnUNet_vf_iterations_per_epoch=1,
            nnUNet_vf_val_iterations_per_epoch=VAL_ITERATIONS, nnUNet_vf_initial_lr=1e-12,
        )  # fmt: skip
    return json.loads((fold / "pretext_report.json").read_text())


def pretrain(host: Host, device: str) -> Path:
    """Pretrain on fold 0; returns its folder."""
    fold = host.fold_folder(DATASET, PRETRAIN, 0)
    if not (fold / "pretext_report.json").is_file():
        start = time.monotonic()
        host.run(
            "nnUNetv2_train", 4, "3d_fullres", 0, "-tr", PRETRAIN, "-device", device,
            nnUNet_vf_num_epochs=EPOCHS, nnUNet_vf_iterations_per_epoch=ITERATIONS,
            nnUNet_vf_val_iterations_per_epoch=VAL_ITERATIONS,
        )  # fmt: skip
        print(f"pretraining took {(time.monotonic() - start) / 60:.0f} minutes")
    return fold


def finetune(host: Host, device: str, results_name: str, weights: Path | None) -> dict[str, float]:
    """Train stock nnU-Net's fold 0, predict its validation cases, return their Dice per label."""
    results = host.folder / results_name
    fold = host.fold_folder(DATASET, FINETUNE, 0, results)
    predictions = fold / "predicted"
    if not (fold / "checkpoint_final.pth").is_file():
        loaded = ["-pretrained_weights", weights] if weights else []
        host.run(
            "nnUNetv2_train", 4, "3d_fullres", 0, "-tr", FINETUNE, "-device", device, *loaded, nnUNet_results=results
        )
    images, labels = split_validation_cases(host)
    if not (predictions / "summary.json").is_file():  # nnU-Net predicts all again after an interruption
        host.run(
            "nnUNetv2_predict", "-d", 4, "-c", "3d_fullres", "-tr", FINETUNE, "-f", 0, "-device", device,
            "-i", images, "-o", predictions, "-npp", 1, "-nps", 1, nnUNet_results=results,
        )  # fmt: skip
    return host.evaluate(labels, predictions)


def split_validation_cases(host: Host) -> tuple[Path, Path]:
    """Copy images and labels of fold 0's validation cases to two folders."""
    cases = json.loads((host.preprocessed / DATASET / "splits_final.json").read_text())[0]["val"]
    images, labels = host.folder / "held_out_images", host.folder / "held_out_labels"
    for folder, source, ending in ((images, "imagesTr", "_0000.nii.gz"), (labels, "labelsTr", ".nii.gz")):
        folder.mkdir(exist_ok=True)
        for case in cases:
            shutil.copyfile(host.raw / DATASET / source / f"{case}{ending}", folder / f"{case}{ending}")
    return images, labels


def write_results(docs: Path, pretrained: Path, untrained: dict, dice: dict[str, dict[str, float]]) -> None:
    """Write the numbers and copy the pictures; print them as tables."""
    report = json.loads((pretrained / "pretext_report.json").read_text())
    docs.mkdir(exist_ok=True)
    for picture in ("progress.png", "preview.png", "pretext_report.png"):
        shutil.copyfile(pretrained / picture, docs / f"hippocampus_{picture}")
    pretext = {
        name: {"untrained": untrained["dice_per_class"][name], "pretrained": report["dice_per_class"][name]}
        for name in report["dice_per_class"]
    } | {"mean": {"untrained": untrained["mean_dice"], "pretrained": report["mean_dice"]}}
    results = {"pretext_dice": pretext, "held_out_dice": dice}
    (docs / "hippocampus.json").write_text(json.dumps(results, indent=2) + "\n")
    print("\n| fusion class | untrained | pretrained |\n|---|---|---|")
    for name, row in pretext.items():
        print(f"| {name} | {row['untrained']:.3f} | {row['pretrained']:.3f} |")
    print("\n| trained from | " + " | ".join(next(iter(dice.values()))) + " |\n|---|---|---|---|")
    for arm, row in dice.items():
        print(f"| {arm} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")


if __name__ == "__main__":
    main()
