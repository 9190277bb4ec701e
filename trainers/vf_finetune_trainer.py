"""``nnUNetv2_train DATASET 3d_fullres 0 -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.compatibility import check_weights, pretrained_weights_argument
from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.long_training import LongTraining
from nnunetv2_vf.optimizer import clip_gradients, make_optimizer, poly_decay
from nnunetv2_vf.preflight import preprocessed_cases
from nnunetv2_vf.settings import FINETUNE_RECIPES, FinetuneSettings
from nnunetv2_vf.target import Target

_PROVENANCE = "volume_fusion"  # of a checkpoint: who wrote it, with what settings, from what weights


class VFFinetuneTrainer(LongTraining):
    """nnU-Net's supervised training with the recipe that the plan's network needs.

    A U-Net is trained as by nnU-Net; PCT-Net gets AdamW with warm-up, decay and a tight gradient clipping. Every part
    is a setting, ``nnUNet_vf_finetune_<field>``: :class:`nnunetv2_vf.settings.FinetuneSettings`, recorded wherever
    nnU-Net stores the plans. Without ``-pretrained_weights`` it is the matched baseline from scratch.

    Weights that do not fit are refused before anything is written, and the log says what differs between pretraining
    and this training. Checkpoints name nnU-Net's trainer, whose network and inference these are, so that others can
    predict with them without this package.
    """

    settings: FinetuneSettings

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
        self.weights_file = pretrained_weights_argument(sys.argv)
        if self.weights_file is not None:
            self.pretrained = check_weights(self.weights_file, Target(plans_manager, configuration, dataset_json))
        plans = {**plans, FinetuneSettings.section: self.settings.as_dict()}
        super().__init__(plans, configuration, fold, dataset_json, device)

    def train_step(self, batch: dict) -> dict:
        self.between_steps()
        result: dict = super().train_step(batch)
        return result

    def validation_step(self, batch: dict) -> dict:
        self.between_steps()
        result: dict = super().validation_step(batch)
        return result

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

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Name nnU-Net's trainer as the writer; ours, settings and weights are in a field of their own."""
        if type(self).build_network_architecture is nnUNetTrainer.build_network_architecture:
            checkpoint["trainer_name"] = nnUNetTrainer.__name__
        checkpoint[_PROVENANCE] = {
            "trainer": type(self).__name__,
            "settings": self.settings.as_dict(),
            "pretrained": self.pretrained,
        }

    def accept(self, checkpoint: dict[str, Any], file: Path) -> None:
        """A continued training keeps the record of the weights that it began with."""
        self.pretrained = checkpoint.get(_PROVENANCE, {}).get("pretrained")
