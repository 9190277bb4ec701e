"""``nnUNetv2_train DATASET 3d_fullres 0 -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth``."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.compatibility import fit_in_words, pretrained_weights_argument, require_fit
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.optimizer import clip_gradients, make_optimizer, poly_decay
from nnunetv2_vf.preflight import preprocessed_cases
from nnunetv2_vf.settings import FINETUNE_RECIPES, FinetuneSettings
from nnunetv2_vf.target import Target
from nnunetv2_vf.trust import as_described
from nnunetv2_vf.weights import read_pretrained, save_whole

_PROVENANCE = "volume_fusion"  # of a checkpoint: who wrote it, with what settings, from what weights


class VFFinetuneTrainer(nnUNetTrainer):
    """nnU-Net's supervised training with the recipe that the plan's network needs.

    A U-Net is trained as by nnU-Net; PCT-Net gets AdamW with warm-up, decay and a tight gradient clipping. Every part
    is a setting, ``nnUNet_vf_finetune_<field>``: :class:`nnunetv2_vf.settings.FinetuneSettings`, recorded wherever
    nnU-Net stores the plans. Without ``-pretrained_weights`` it is the matched baseline from scratch.

    Weights that do not fit are refused before anything is written, and the log says what differs between pretraining
    and this training. Checkpoints name nnU-Net's trainer, whose network and inference these are, so that others can
    predict with them without this package.
    """

    @one_line_errors()
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net records exactly this signature
    ):
        plans_manager = PlansManager(plans)
        network = plans_manager.get_configuration(configuration).network_arch_class_name
        self.settings = FinetuneSettings.resolve(plans, os.environ, FINETUNE_RECIPES.get(network))
        preprocessed_cases(plans_manager, configuration)
        self.pretrained: dict[str, Any] | None = None
        weights_file = pretrained_weights_argument(sys.argv)
        if weights_file is not None:
            self.pretrained = _check_weights(weights_file, Target(plans_manager, configuration, dataset_json))
        plans = {**plans, FinetuneSettings.section: self.settings.as_dict()}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings.apply_schedule(self)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = make_optimizer(self.network, self.settings)
        clip_gradients(optimizer, self.settings.gradient_clip)
        return optimizer, poly_decay(optimizer, self.settings, self.settings.warmup_fraction)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.print_to_log_file(f"Fine-tuning settings:\n{self.settings}\n", add_timestamp=False)
        lines = ["Pretrained weights: none, this training began from scratch"]
        if self.pretrained is not None:
            dataset = self.pretrained["dataset"] or "an unknown dataset"
            lines = [f"Pretrained weights: {self.pretrained['file']} of {dataset}", *self.pretrained["compared"]]
        self.print_to_log_file("\n  ".join(lines) + "\n", add_timestamp=False)

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's, under the name of nnU-Net's trainer; ours, settings and weights are in a field of their own."""
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with io.BytesIO() as file:  # nnU-Net makes and writes a checkpoint in one go
            super().save_checkpoint(file)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        if type(self).build_network_architecture is nnUNetTrainer.build_network_architecture:
            checkpoint["trainer_name"] = nnUNetTrainer.__name__
        checkpoint[_PROVENANCE] = {
            "trainer": type(self).__name__,
            "settings": self.settings.as_dict(),
            "pretrained": self.pretrained,
        }
        save_whole(checkpoint, Path(filename))

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As nnU-Net's; a continued training keeps the record of the weights that it began with."""
        super().load_checkpoint(filename_or_checkpoint)
        checkpoint = torch.load(filename_or_checkpoint, map_location="cpu", mmap=True, weights_only=False)
        self.pretrained = checkpoint.get(_PROVENANCE, {}).get("pretrained")


def _check_weights(file: Path, target: Target) -> dict[str, Any]:
    """What is recorded of the weights that training starts from; raises UserError if they do not fit."""
    weights = read_pretrained(file)
    metadata = weights["vf"]
    with as_described(file):
        require_fit(file, weights, target)
        compared = fit_in_words(metadata, target)
    return {
        "file": file.name,  # not its folder: what is recorded leaves with a shared model
        "dataset": metadata.get("dataset"),
        "num_cases": metadata.get("num_cases"),
        "adapted": metadata.get("adapted"),
        "compared": compared,
    }
