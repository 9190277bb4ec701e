"""The whole journey on the Hippocampus task of the Medical Segmentation Decathlon, with nnU-Net's commands.

    python benchmarks/hippocampus.py DATA --work FOLDER [--network unet|pct_net] [--device cpu|cuda]

DATA is ``Dataset004_Hippocampus`` in nnU-Net's raw format. Both networks are pretrained on the images of fold 0's
training cases, fine-tuned on fold 0 with and without the pretrained weights, and scored on fold 0's validation cases
with nnUNetv2_predict.

- unet: nnU-Net's default U-Net, fine-tuned for 250 iterations by nnU-Net's own trainer (nnUNetTrainer_1epoch); also
  scores the pretext task of an untrained network and copies the pictures of the pretraining to ``docs/images``;
- pct_net: PCT-Net, fine-tuned for 144 iterations by VFFinetuneTrainer; also records the losses of the first iterations
  of nnU-Net's own trainer (SGD) on the same plans.

A step whose result is in FOLDER is not run again. Writes ``hippocampus_NETWORK.json``.

Duration: 1 to 2 hours for each network on 2 CPU cores. Needs: the dataset.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from common import IMAGES, RESULTS, make_parser, write_result

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace

DATASET_ID, DATASET = 4, "Dataset004_Hippocampus"
GPU_MEMORY_GB = 2  # for PCT-Net: the batch is small, so that a step takes seconds on 2 CPU cores
PLANS = {"unet": "nnUNetPlans", "pct_net": "PCTNetPlans"}
FINETUNE_TRAINER = {"unet": "nnUNetTrainer_1epoch", "pct_net": "VFFinetuneTrainer"}
PRETRAINING = {
    "unet": {"num_epochs": 24, "iterations_per_epoch": 25, "val_iterations_per_epoch": 8},
    "pct_net": {"num_epochs": 10, "iterations_per_epoch": 12, "val_iterations_per_epoch": 4},
}
UNTRAINED = {**PRETRAINING["unet"], "num_epochs": 1, "iterations_per_epoch": 1, "initial_lr": 1e-12}
FINETUNING = {"num_epochs": 12, "iterations_per_epoch": 12, "val_iterations_per_epoch": 4}  # of VFFinetuneTrainer
STOCK_ITERATIONS = 10
ARMS = ("pretrained", "scratch")


def main() -> None:
    parser = make_parser(__doc__, device=True, output=True, work=True)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--network", default="unet", choices=[*PLANS])
    parser.add_argument("--arms", nargs="+", default=[*ARMS], choices=ARMS)
    args = parser.parse_args()
    with one_line_errors():
        results = Journey(args.network, args.work, args.device).run(args)
    write_result(args.output or RESULTS / f"hippocampus_{args.network}.json", results)
    print(json.dumps(results, indent=2))


class Journey:
    """Data, trainings and predictions of one network below one folder."""

    def __init__(self, network: str, folder: Path, device: str):
        self.network, self.plans, self.device = network, PLANS[network], device
        self.workspace = Workspace(folder, processes=2)

    def run(self, args: argparse.Namespace) -> dict[str, Any]:
        """Run all steps that are not done yet; return the numbers."""
        self.prepare(args.data)
        pretrained = self.pretrain(PRETRAINING[self.network], self.workspace.results)
        pretext = read_pretext_dice(pretrained)
        weights = {"pretrained": pretrained / "vf_pretrained.pth", "scratch": None}
        dice = {arm: self.finetune(arm, weights[arm]) for arm in args.arms}
        if self.network == "pct_net":
            return {
                "pretraining": PRETRAINING[self.network],
                "finetuning": FINETUNING,
                "pretext_dice": pretext,
                "held_out_dice": dice,
                "stock_nnUNetTrainer_losses": self.stock_losses(),
            }
        for picture in ("progress", "preview", "pretext_report"):
            shutil.copyfile(pretrained / f"{picture}.png", IMAGES / f"hippocampus_{picture}.png")
        untrained = read_pretext_dice(self.pretrain(UNTRAINED, self.workspace.folder / "results_untrained"))
        both = {name: {"untrained": untrained[name], "pretrained": pretext[name]} for name in pretext}
        return {"pretext_dice": both, "held_out_dice": dice}

    def prepare(self, data: Path) -> None:
        """Copy the dataset, plan and preprocess it."""
        workspace = self.workspace
        prepared = workspace.folder / f"prepared_{self.plans}"
        if prepared.exists():
            return
        shutil.copytree(data, workspace.raw / DATASET, copy_function=shutil.copyfile, dirs_exist_ok=True)
        workspace.run("nnUNetv2_extract_fingerprint", "-d", DATASET_ID, "-np", 2)
        if self.network == "pct_net":
            workspace.run("nnUNetv2_vf", "plan", "-d", DATASET_ID, "-gpu_memory_target", GPU_MEMORY_GB)
        else:
            workspace.run("nnUNetv2_plan_experiment", "-d", DATASET_ID)
        workspace.run("nnUNetv2_preprocess", "-d", DATASET_ID, "-plans_name", self.plans, "-c", "3d_fullres", "-np", 2)
        prepared.touch()

    def pretrain(self, settings: dict[str, Any], results: Path) -> Path:
        """Pretrain on fold 0; return its folder."""
        fold = self.workspace.fold_folder(DATASET, "VFPretrainTrainer", 0, results, self.plans)
        if not (fold / "pretext_report.json").is_file():
            variables = {f"nnUNet_vf_{name}": value for name, value in settings.items()}
            self.train("VFPretrainTrainer", results, **variables)
        return fold

    def finetune(self, arm: str, weights: Path | None) -> dict[str, float]:
        """Fine-tune fold 0, predict its validation cases; return the Dice of each label and their mean."""
        workspace, trainer = self.workspace, FINETUNE_TRAINER[self.network]
        results = workspace.results if weights else workspace.folder / "results_scratch"
        fold = workspace.fold_folder(DATASET, trainer, 0, results, self.plans)
        if not (fold / "checkpoint_final.pth").is_file():
            flags = ("-pretrained_weights", weights) if weights else ()
            # nnUNetTrainer_1epoch has no settings and ignores the variables.
            self.train(trainer, results, *flags, **{f"nnUNet_vf_finetune_{k}": v for k, v in FINETUNING.items()})
        images, labels = self.copy_validation_cases()
        predictions = fold / "predicted"
        if not (predictions / "summary.json").is_file():
            workspace.run(
                "nnUNetv2_predict", "-d", DATASET_ID, "-c", "3d_fullres", "-p", self.plans, "-tr", trainer, "-f", 0,
                "-device", self.device, "-i", images, "-o", predictions, "-npp", 1, "-nps", 1,
                *(["--disable_tta"] if self.network == "pct_net" else []), nnUNet_results=results,
            )  # fmt: skip
        return workspace.evaluate(labels, predictions)

    def train(self, trainer: str, results: Path, *flags: object, **variables: object) -> None:
        common = ("-p", self.plans, "-tr", trainer, "-device", self.device)
        self.workspace.run(
            "nnUNetv2_train", DATASET_ID, "3d_fullres", 0, *common, *flags, nnUNet_results=results, **variables
        )

    def copy_validation_cases(self) -> tuple[Path, Path]:
        """Copy images and labels of fold 0's validation cases to two folders."""
        workspace = self.workspace
        cases = json.loads((workspace.preprocessed / DATASET / "splits_final.json").read_text())[0]["val"]
        images, labels = workspace.folder / "held_out_images", workspace.folder / "held_out_labels"
        for folder, source, ending in ((images, "imagesTr", "_0000.nii.gz"), (labels, "labelsTr", ".nii.gz")):
            folder.mkdir(exist_ok=True)
            for case in cases:
                shutil.copyfile(workspace.raw / DATASET / source / f"{case}{ending}", folder / f"{case}{ending}")
        return images, labels

    def stock_losses(self) -> list[float]:
        """Return the losses of the first iterations of nnUNetTrainer, which has no setting for a short run."""
        os.environ |= self.workspace.environment | {"nnUNet_results": str(self.workspace.folder / "results_stock")}
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args

        device = torch.device(self.device)
        trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", 0, "nnUNetTrainer", self.plans, device=device)
        trainer.on_train_start()
        batches = (next(trainer.dataloader_train) for _ in range(STOCK_ITERATIONS))
        losses = [round(float(trainer.train_step(batch)["loss"]), 3) for batch in batches]
        trainer.disable_checkpointing = True
        trainer.on_train_end()
        return losses


def read_pretext_dice(fold: Path) -> dict[str, float]:
    """Return the Dice of each fusion class and their mean from a pretraining's report."""
    report = json.loads((fold / "pretext_report.json").read_text())
    return {**report["dice_per_class"], "mean": report["mean_dice"]}


if __name__ == "__main__":
    main()
