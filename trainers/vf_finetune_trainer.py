"""``nnUNetv2_train DATASET 3d_fullres 0 -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth``."""

from __future__ import annotations

import os

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import one_line_errors
from nnunetv2_vf.optimizer import adaptive_optimizer, clip_gradients, poly_decay
from nnunetv2_vf.settings import FINETUNE_RECIPES, FinetuneSettings


class VFFinetuneTrainer(nnUNetTrainer):
    """nnU-Net's supervised training with the recipe that the plan's network needs.

    A U-Net is trained as by nnU-Net; PCT-Net gets AdamW with warm-up, decay and a tight gradient clipping. Every part
    is a setting, ``nnUNet_vf_finetune_<field>``: :class:`nnunetv2_vf.settings.FinetuneSettings`, recorded wherever
    nnU-Net stores the plans. Without ``-pretrained_weights`` it is the matched baseline from scratch.
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
        network = PlansManager(plans).get_configuration(configuration).network_arch_class_name
        self.settings = FinetuneSettings.resolve(plans, os.environ, FINETUNE_RECIPES.get(network))
        plans = {**plans, FinetuneSettings.section: self.settings.as_dict()}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings.apply_schedule(self)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        if self.settings.optimizer == "sgd":
            optimizer, _ = super().configure_optimizers()
        else:
            optimizer = adaptive_optimizer(self.network, self.settings)
        clip_gradients(optimizer, self.settings.gradient_clip)
        return optimizer, poly_decay(optimizer, self.settings, self.settings.warmup_fraction)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.print_to_log_file(f"Fine-tuning settings:\n{self.settings}\n", add_timestamp=False)
