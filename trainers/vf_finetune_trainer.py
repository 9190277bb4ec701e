"""``nnUNetv2_train DATASET 3d_fullres 0 -tr VFFinetuneTrainer -pretrained_weights vf_pretrained.pth``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_vf.errors import UserError, one_line_errors, printable
from nnunetv2_vf.nnunet_folders import require_configuration, require_variables
from nnunetv2_vf.settings import FINETUNE_RECIPES, FinetuneSettings
from nnunetv2_vf.training.checkpoints import BEST, FINAL, LATEST, read_checkpoint, require_same_plans
from nnunetv2_vf.training.finetune_schedule import (
    FinetuneLRScheduler,
    describe_schedule,
    parameter_groups,
    reinitialized_parameters,
)
from nnunetv2_vf.training.loggers import require_logger_packages
from nnunetv2_vf.training.optimizer import clip_gradients, make_optimizer
from nnunetv2_vf.training.preflight import check_fold, check_plans_name, preprocessed_cases, require_gpu
from nnunetv2_vf.training.random_state import get_random_state, seeded_initialization
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer
from nnunetv2_vf.transfer.kernel_norms import kernel_factors, scale_kernels
from nnunetv2_vf.transfer.network_fit import require_trainable
from nnunetv2_vf.transfer.pretrained_weights import (
    PretrainedWeights,
    are_same_weights,
    describe_origin,
    describe_starts,
    require_same_origin,
)
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.target_plans import TargetPlans

_ENCODER_SCHEDULES = ("encoder_only", "frozen_encoder")  # schedules that need a pretrained encoder
_PROVENANCE = "volume_fusion"  # our entry in a checkpoint: trainer, settings and pretrained weights


class VFFinetuneTrainer(ResumableTrainer):
    """nnU-Net's supervised training, with the recipe that the network of the plans needs.

    A U-Net is trained as nnU-Net does, but its pretrained kernels are first scaled to the norm of freshly initialised
    ones. PCT-Net gets AdamW with warm-up, weight decay and tight gradient clipping. Each part is a setting,
    ``nnUNet_vf_finetune_<field>`` (:class:`nnunetv2_vf.settings.FinetuneSettings`), and is recorded wherever nnU-Net
    stores the plans. Without ``-pretrained_weights`` it trains the baseline from scratch, with the same recipe.

    It refuses weights that do not fit before anything is written, and logs what differs between pretraining and this
    training. Its checkpoints name nnU-Net's trainer, so others can predict with them without this package.
    """

    settings: FinetuneSettings
    pretrained_weights: PretrainedWeights | None

    @one_line_errors()
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net records exactly this signature
    ):
        require_gpu(device)
        require_variables(nnUNet_preprocessed, nnUNet_results)
        plans_manager = PlansManager(plans)
        with malformed_file_errors(f"the file of the plans {plans.get('plans_name')}"):
            check_plans_name(plans, configuration)
            network = require_configuration(plans_manager, configuration).network_arch_class_name
            cases = preprocessed_cases(plans_manager, configuration)
        self.settings = FinetuneSettings.resolve(plans, os.environ, FINETUNE_RECIPES.get(network))
        require_logger_packages(self.settings.loggers)
        check_fold(plans_manager, cases, fold)
        target = TargetPlans(plans_manager, configuration, dataset_json)
        require_trainable(target)
        is_continued = plans.get("continue_training", False)  # nnU-Net's entry: this start continues
        self.pretrained_weights = PretrainedWeights.from_command_line(sys.argv, target, is_continued)
        # A resumed training takes the record from its checkpoint.
        self.pretrained_record = self.pretrained_weights.record if self.pretrained_weights else None
        plans = {**plans, FinetuneSettings.section: self.settings.as_dict()}
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._state_before_batch: dict[str, Any] | None = None

    # ------------------------------------------------------------------ training loop

    def on_train_start(self) -> None:
        if self.pretrained_weights is None and not self._is_resumed and self.settings.schedule in _ENCODER_SCHEDULES:
            raise UserError(
                f"schedule {self.settings.schedule!r} needs pretrained weights; add -pretrained_weights FILE (and no "
                "--c), or set nnUNet_vf_finetune_schedule=full"
            )
        if not self._is_resumed and not self.disable_checkpointing:
            self._require_same_weights()
        super().on_train_start()
        self._state_before_batch = get_random_state(self.device)
        if self.pretrained_weights is not None and not self.continue_training:
            self._prepare_pretrained_weights()
        self._log_settings()

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        # From scratch, the initial statistics would be those of no image.
        with_statistics = self.pretrained_record is not None
        self.lr_scheduler.freeze_parts_without_rate(self.bare_network(), with_statistics)

    def train_step(self, batch: dict) -> dict:
        self.between_steps()
        result: dict = super().train_step(batch)
        self.epoch_losses.append(float(result["loss"]))
        self._state_before_batch = get_random_state(self.device)
        return result

    def validation_step(self, batch: dict) -> dict:
        self.between_steps()
        result: dict = super().validation_step(batch)
        return result

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self._state_before_batch = get_random_state(self.device)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = make_optimizer(parameter_groups(self.bare_network(), self.settings), self.settings)
        clip_gradients(optimizer, self.settings.gradient_clip)
        return optimizer, FinetuneLRScheduler(optimizer, self.settings)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802  nnU-Net's name
        *others, axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if self.settings.mirroring == "off":
            axes = self.inference_allowed_mirroring_axes = None  # nnU-Net stores the attribute for prediction
        return (*others, axes)

    def _log_settings(self) -> None:
        schedule = describe_schedule(self.settings)
        self.print_to_log_file(f"Fine-tuning settings:\n{self.settings}\n{schedule}\n", add_timestamp=False)
        if warning := self.settings.without_effect_warning():
            self.print_to_log_file(warning)
        lines = ["Pretrained weights: none, this training started from scratch"]
        if self.pretrained_record is not None:
            origin = describe_origin(self.pretrained_record)
            lines = [printable(f"Pretrained weights: {origin}"), *self.pretrained_record["compared"]]
        self.print_to_log_file("\n  ".join(lines) + "\n", add_timestamp=False)

    # ------------------------------------------------------------------ pretrained weights

    def _require_same_weights(self) -> None:
        """Raise UserError if the folder holds a training from other weights, which a new training would replace."""
        folder = Path(self.output_folder)
        file = next((folder / name for name in (FINAL, LATEST, BEST) if (folder / name).is_file()), None)
        if file is None:
            return
        recorded = read_checkpoint(file).get(_PROVENANCE, {}).get("pretrained")
        if not are_same_weights(recorded, self.pretrained_record):
            before, now = describe_starts(recorded, self.pretrained_record)
            raise UserError(
                f"{file} was trained {before}; a training {now} would replace it. Write to another folder (export "
                f"nnUNet_results=FOLDER), or move {folder} away"
            )

    def _prepare_pretrained_weights(self) -> None:
        """Replace the weights that the schedule wants new, and scale pretrained kernels to the norm of new ones."""
        network = self.bare_network()
        weights = network.state_dict()
        reinitialized = reinitialized_parameters(weights, self.settings)
        scales_kernels = self.settings.kernel_norms == "fresh"
        if not reinitialized and not scales_kernels:
            return
        fresh_network = self._build_fresh_network()
        fresh_weights = fresh_network.state_dict()
        for name in reinitialized:
            weights[name].copy_(fresh_weights[name])
        if scales_kernels:
            self._scale_kernels(network, fresh_network, reinitialized)

    def _scale_kernels(self, network: torch.nn.Module, fresh: torch.nn.Module, reinitialized: set[str]) -> None:
        trained_parts = ["decoder"] if self.settings.schedule == "frozen_encoder" else ["encoder", "decoder"]
        factors = {
            name: factor
            for name, factor in kernel_factors(network, fresh, trained_parts).items()
            if f"{name}.weight" not in reinitialized
        }
        factors = self.ranks.broadcast_from_first(factors)  # norms differ in the last digits between devices
        scale_kernels(network, factors)
        if factors:  # only kernels before a norm are scaled; some networks have none
            extremes = f"by {min(factors.values()):.2f} to {max(factors.values()):.2f}"
            self.print_to_log_file(f"{len(factors)} pretrained kernels scaled to the norm of new ones, {extremes}")

    def _build_fresh_network(self) -> torch.nn.Module:
        """Return the network with the initial weights that a training from scratch would have."""
        with seeded_initialization(self.settings.seed):
            return self.build_network_architecture(
                self.plans_manager,
                self.configuration_manager,
                self.num_input_channels,
                self.label_manager.num_segmentation_heads,
                self.enable_deep_supervision,
            )

    # ------------------------------------------------------------------ checkpoints

    def random_state(self) -> dict[str, Any]:
        """Return the random state before the current batch was drawn, so that a resumed run draws it again.

        During a validation epoch it is the state before that epoch, which a resumed run starts again.
        """
        return self._state_before_batch or super().random_state()

    def amend_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name nnU-Net's trainer as the writer; store our trainer's name, settings and pretrained weights beside it."""
        if type(self).build_network_architecture is nnUNetTrainer.build_network_architecture:
            checkpoint["trainer_name"] = nnUNetTrainer.__name__
        checkpoint[_PROVENANCE] = {
            "trainer": type(self).__name__,
            "settings": self.settings.as_dict(),
            "pretrained": self.pretrained_record,
        }

    def require_same_run(self, checkpoint: dict[str, Any], file: Path) -> None:
        """Raise UserError if the checkpoint has another trainer, other settings or other plans than this run.

        Without ``--c`` (``--val``, ``--val_best``) the settings of the checkpoint replace this run's.
        """
        provenance = checkpoint.get(_PROVENANCE, {})
        recorded = provenance.get("settings")
        if recorded is None:
            raise UserError(
                f"{file} was written by {checkpoint['trainer_name']}, not by {type(self).__name__}; move it to another "
                "folder"
            )
        # Checkpoints written before these settings existed were trained as with these values.
        recorded = {"kernel_norms": "pretrained", "fresh_decoder_stages": 0, **recorded}
        if self.continue_training:
            self.settings.require_same(recorded, file)
        else:
            self.settings = FinetuneSettings.resolve({FinetuneSettings.section: recorded}, {})
            self.settings.apply_schedule(self)
        require_same_plans(
            PlansManager(checkpoint["init_args"]["plans"]), self.plans_manager, self.configuration_name, file
        )
        if self.continue_training:
            require_same_origin(provenance.get("pretrained"), self.pretrained_weights, file)
        self.pretrained_record = provenance.get("pretrained")
