"""``nnUNetv2_train DATASET 3d_fullres 0 -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.settings import FINETUNE_RECIPES, FinetuneSettings
from nnunetv2_vf.training.finetune_schedule import (
    FinetuneLRScheduler,
    describe_schedule,
    parameter_groups,
    reinitialized_parameters,
)
from nnunetv2_vf.training.optimizer import clip_gradients, make_optimizer
from nnunetv2_vf.training.preflight import preprocessed_cases
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer, current_random_state
from nnunetv2_vf.transfer.compatibility import PretrainedWeights
from nnunetv2_vf.transfer.kernel_norms import kernel_factors, scale_kernels
from nnunetv2_vf.transfer.target_plans import TargetPlans

_OF_AN_ENCODER = ("encoder_only", "frozen_encoder")  # schedules that mean nothing without one
_PROVENANCE = "volume_fusion"  # of a checkpoint: who wrote it, with what settings, from what weights


class VFFinetuneTrainer(ResumableTrainer):
    """nnU-Net's supervised training with the recipe that the plan's network needs.

    A U-Net is trained as by nnU-Net, its pretrained kernels scaled to the norm of new ones first; PCT-Net gets AdamW
    with warm-up, decay and a tight gradient clipping. Every part is a setting, ``nnUNet_vf_finetune_<field>``:
    :class:`nnunetv2_vf.settings.FinetuneSettings`, recorded wherever nnU-Net stores the plans. Without
    ``-pretrained_weights`` it is the matched baseline from scratch.

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
        target = TargetPlans(plans_manager, configuration, dataset_json)
        self.pretrained_weights = PretrainedWeights.of_command(sys.argv, target)
        self.pretrained = self.pretrained_weights.record if self.pretrained_weights else None
        plans = {**plans, FinetuneSettings.section: self.settings.as_dict()}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._losses: list[float] = []  # of the steps of this epoch that are done, also before an interruption
        self._between_draws: dict[str, Any] | None = None

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.lr_scheduler.take_gradients()
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch - len(self._losses)

    def train_step(self, batch: dict) -> dict:
        self.between_steps()
        result: dict = super().train_step(batch)
        self._losses.append(float(result["loss"]))
        self._between_draws = current_random_state(self.device)
        return result

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end([{"loss": np.float32(loss)} for loss in self._losses])

    def validation_step(self, batch: dict) -> dict:
        self.between_steps()
        result: dict = super().validation_step(batch)
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self._losses = []
        self._between_draws = current_random_state(self.device)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = make_optimizer(parameter_groups(self.bare_network(), self.settings), self.settings)
        clip_gradients(optimizer, self.settings.gradient_clip)
        return optimizer, FinetuneLRScheduler(optimizer, self.settings)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802  nnU-Net's name
        *others, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.settings.mirroring == "off":
            axes = self.inference_allowed_mirroring_axes = None  # the latter for prediction, recorded in checkpoints
        return (*others, axes)

    @one_line_errors()
    def on_train_start(self) -> None:
        if self.pretrained_weights is None and not self._resumed and self.settings.schedule in _OF_AN_ENCODER:
            raise UserError(
                f"schedule {self.settings.schedule!r} is for pretrained weights, and there are none; add "
                "-pretrained_weights FILE (and no --c), or nnUNet_vf_finetune_schedule=full"
            )
        super().on_train_start()
        self._between_draws = current_random_state(self.device)
        if self.pretrained_weights is not None and not self._continues:
            self._begin_with_pretrained_weights()
        self.print_to_log_file(
            f"Fine-tuning settings:\n{self.settings}\n{describe_schedule(self.settings)}\n", add_timestamp=False
        )
        lines = ["Pretrained weights: none, this training began from scratch"]
        if self.pretrained is not None:
            dataset = self.pretrained["dataset"] or "an unknown dataset"
            lines = [f"Pretrained weights: {self.pretrained['file']} of {dataset}", *self.pretrained["compared"]]
        self.print_to_log_file("\n  ".join(lines) + "\n", add_timestamp=False)

    def _begin_with_pretrained_weights(self) -> None:
        """Change of them what the settings say."""
        network = self.bare_network()
        weights = network.state_dict()
        anew = reinitialized_parameters(weights, self.settings)
        if not anew and self.settings.kernel_norms == "pretrained":
            return
        fresh = self._fresh_network()
        new = fresh.state_dict()
        for name in anew:
            weights[name].copy_(new[name])
        if self.settings.kernel_norms == "fresh":
            trained_on = ["decoder"] if self.settings.schedule == "frozen_encoder" else ["encoder", "decoder"]
            factors = {
                name: factor
                for name, factor in kernel_factors(network, fresh, trained_on).items()
                if f"{name}.weight" not in anew
            }
            factors = self.ranks.from_first(factors)  # norms of other devices differ in the last digits
            scale_kernels(network, factors)
            told = [f"by {min(factors.values()):.2f} to {max(factors.values()):.2f}"] if factors else []
            self.print_to_log_file(
                ", ".join([f"{len(factors)} pretrained kernels scaled to the norm of new ones", *told])
            )

    def _fresh_network(self) -> torch.nn.Module:
        """With the weights that this training, without pretrained ones, would have begun with."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.settings.seed)
            return self.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                self.num_input_channels,
                self.label_manager.num_segmentation_heads,
                self.enable_deep_supervision,
            )

    def random_state(self) -> dict[str, Any]:
        """Of before the batch at hand was drawn, or a validation begun: both are drawn anew."""
        return self._between_draws or super().random_state()

    def state(self) -> dict[str, Any]:
        return {"losses": [fmean(of_step) for of_step in zip(*self.ranks.gather(self._losses), strict=True)]}

    def restore(self, state: dict[str, Any]) -> None:
        self._losses = list(state.get("losses", ()))

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
        """Refuse other settings than this run's; what is kept of the first start is its record of pretrained weights.

        Without ``--c`` (``--val``, ``--val_best``) the settings are the checkpoint's.
        """
        provenance = checkpoint.get(_PROVENANCE, {})
        recorded = provenance.get("settings")
        if recorded is None:
            raise UserError(
                f"{file} was written by {checkpoint['trainer_name']}, not by {type(self).__name__}; move it"
            )
        recorded = {"kernel_norms": "pretrained", "fresh_decoder_stages": 0, **recorded}  # from before they existed
        if self._continues:
            self.settings.require_same(recorded, file)
        else:
            self.settings = FinetuneSettings.resolve({FinetuneSettings.section: recorded}, {})
            self.settings.apply_schedule(self)
        self.pretrained = provenance.get("pretrained")
