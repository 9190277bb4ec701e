"""PCT-Net's whole road on the Hippocampus task, with stock nnU-Net commands and those of this project.

    python benchmarks/hippocampus_pct_net.py DATA --out FOLDER [--device cpu]

DATA is ``Dataset004_Hippocampus`` in nnU-Net's raw format. Plans with PCT-Net, preprocesses, pretrains on the images of
fold 0's training cases, fine-tunes fold 0 from the pretrained weights and from scratch, predicts fold 0's validation
cases with stock nnUNetv2_predict, and trains the same plan for a few iterations with stock nnUNetTrainer. A step whose
result is in FOLDER is not run again. Writes ``hippocampus_pct_net.json``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hippocampus import DATASET, copy_raw, split_validation_cases

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Host

PLANS = "PCTNetPlans"
GPU_MEMORY_GB = 2  # a small batch: a step takes seconds on 2 CPU cores
PRETRAINING = {"num_epochs": 10, "iterations_per_epoch": 12, "val_iterations_per_epoch": 4}
FINETUNING = {"num_epochs": 12, "iterations_per_epoch": 12, "val_iterations_per_epoch": 4}
STOCK_ITERATIONS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--arms", nargs="+", default=["pretrained", "scratch"], choices=("pretrained", "scratch"))
    parser.add_argument("--docs", type=Path, default=Path(__file__).parent.parent / "docs")
    args = parser.parse_args()
    with one_line_errors():
        host = Host(args.out, processes=2)
        prepare(host, args.data)
        pretrained = pretrain(host, args.device)
        arms = {
            "pretrained": (host.results, pretrained / "vf_pretrained.pth"),
            "scratch": (host.folder / "results_scratch", None),
        }
        dice = {arm: finetune(host, args.device, *arms[arm]) for arm in args.arms}
        losses = stock_losses(host, args.device)
    report = json.loads((pretrained / "pretext_report.json").read_text())
    results = {
        "pretraining": PRETRAINING,
        "finetuning": FINETUNING,
        "pretext_dice": report["dice_per_class"] | {"mean": report["mean_dice"]},
        "held_out_dice": dice,
        "stock_nnUNetTrainer_losses": losses,
    }
    (args.docs / "hippocampus_pct_net.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def prepare(host: Host, data: Path) -> None:
    """Copy the dataset, plan and preprocess it."""
    if (host.preprocessed / DATASET / f"{PLANS}_3d_fullres").is_dir():
        return
    copy_raw(host, data)
    host.run("nnUNetv2_extract_fingerprint", "-d", 4, "-np", 2)
    host.run("nnUNetv2_vf", "plan", "-d", 4, "-gpu_memory_target", GPU_MEMORY_GB)
    host.run("nnUNetv2_preprocess", "-d", 4, "-plans_name", PLANS, "-c", "3d_fullres", "-np", 2)


def pretrain(host: Host, device: str) -> Path:
    """Pretrain on fold 0; returns its folder."""
    fold = host.fold_folder(DATASET, "VFPretrainTrainer", 0, plans=PLANS)
    if not (fold / "pretext_report.json").is_file():
        variables = {f"nnUNet_vf_{name}": value for name, value in PRETRAINING.items()}
        host.run(
            "nnUNetv2_train", 4, "3d_fullres", 0, "-p", PLANS, "-tr", "VFPretrainTrainer", "-device", device,
            **variables,
        )  # fmt: skip
    return fold


def finetune(host: Host, device: str, results: Path, weights: Path | None) -> dict[str, float]:
    """Fine-tune fold 0, predict its validation cases, return their Dice per label."""
    fold = host.fold_folder(DATASET, "VFFinetuneTrainer", 0, results, PLANS)
    common = ("-p", PLANS, "-tr", "VFFinetuneTrainer", "-device", device)
    if not (fold / "checkpoint_final.pth").is_file():
        loaded = ("-pretrained_weights", weights) if weights else ()
        variables = {f"nnUNet_vf_finetune_{name}": value for name, value in FINETUNING.items()}
        host.run("nnUNetv2_train", 4, "3d_fullres", 0, *common, *loaded, nnUNet_results=results, **variables)
    images, labels = split_validation_cases(host)
    predictions = fold / "predicted"
    if not (predictions / "summary.json").is_file():
        host.run(
            "nnUNetv2_predict", "-d", 4, "-c", "3d_fullres", *common, "-f", 0, "-i", images, "-o", predictions,
            "-npp", 1, "-nps", 1, "--disable_tta", nnUNet_results=results,
        )  # fmt: skip
    return host.evaluate(labels, predictions)


def stock_losses(host: Host, device: str) -> list[float]:
    """Losses of the first iterations of stock nnUNetTrainer on the same plan."""
    out = host.folder / "stock_losses.json"
    if not out.is_file():
        script = Path(__file__).with_name("stock_iterations.py")
        host.run(
            "python", script, 4, PLANS, STOCK_ITERATIONS, out, "--device", device,
            nnUNet_results=host.folder / "results_stock",
        )  # fmt: skip
    losses: list[float] = json.loads(out.read_text())
    return losses


if __name__ == "__main__":
    main()
