"""``nnUNetv2_train DATASET 3d_fullres all -tr VFPretrainTrainer``: pretrain the network of any 3D plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunetv2_vf.durable_files import write_durably
from nnunetv2_vf.errors import UserError, one_line_errors, printable
from nnunetv2_vf.pretext.cases import RejectedCase
from nnunetv2_vf.pretext.dataset import TRAINING, VALIDATION, PretextDataset
from nnunetv2_vf.pretext.loader import RankShare, collate, describe_batches, make_loader
from nnunetv2_vf.pretext.masking import restoration_sums, restored_share
from nnunetv2_vf.pretext.pictures import draw_examples, make_examples, score_colours, view_names
from nnunetv2_vf.pretext.report import count_confusion, name_scores, pretext_warnings, write_report
from nnunetv2_vf.pretext.task import PretextBatch, PretextLoss, make_batch, output_names, split_output
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training.checkpoints import BEST, FINAL, STATE, require_same_plans
from nnunetv2_vf.training.loggers import require_logger_packages
from nnunetv2_vf.training.monitoring import DataWaitTimer, EpochMeter
from nnunetv2_vf.training.non_finite_steps import NotFiniteError, StepMonitor
from nnunetv2_vf.training.optimizer import make_optimizer
from nnunetv2_vf.training.preflight import check_plans_name, check_pretraining, require_gpu
from nnunetv2_vf.training.progress_plot import PretrainLogger
from nnunetv2_vf.training.quarantine import Quarantine
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer
from nnunetv2_vf.training.step import Precision, take_step
from nnunetv2_vf.transfer import artifact
from nnunetv2_vf.transfer.architectures import refusal_warning
from nnunetv2_vf.transfer.metadata import describe_pretraining, read_channel_names, read_pretext
from nnunetv2_vf.transfer.model_card import CARD_NAME, write_model_card
from nnunetv2_vf.transfer.network_fit import require_trainable
from nnunetv2_vf.transfer.pretrained_weights import PretrainedWeights, describe_origin, require_same_origin
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.target_plans import TargetPlans

_PREVIEW_EXAMPLES = 3


class VFPretrainTrainer(ResumableTrainer):
    """Pretrains encoder and decoder: predict the fusion coefficient of every voxel, restore hidden blocks, or both.

    The setting ``pretext`` chooses the task; Volume Fusion is the default. Labels of the dataset are ignored. nnU-Net
    sees the K + 1 fusion classes, and each restored channel, as the labels of this training, so the network's heads,
    loss, schedule, pseudo Dice, logging and checkpoints are nnU-Net's own. Besides checkpoints it writes
    ``vf_pretrained.pth``, ``MODEL_CARD.md``, ``preview.png`` and, at the end, ``pretext_report.json`` and ``.png``.

    Settings: :class:`nnunetv2_vf.settings.VFSettings`. Source: arXiv 2306.16925, section "Volume Fusion"; for hidden
    blocks see :mod:`nnunetv2_vf.pretext.masking`.
    """

    settings: VFSettings
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
        settings = VFSettings.resolve(plans, os.environ)
        require_logger_packages(settings.loggers)
        with malformed_file_errors(f"the file of the plans {plans.get('plans_name')}"):
            check_plans_name(plans, configuration)
            warnings = check_pretraining(plans, configuration, fold, settings)
        self.settings = settings
        self.precision = Precision.choose(settings.precision, device)
        # Copies: nnU-Net stores the plans in several places, and the settings with them.
        plans = {**plans, VFSettings.section: settings.as_dict()}
        dataset_json = _with_pretext_labels(dataset_json, settings)
        target = TargetPlans(PlansManager(plans), configuration, dataset_json)
        require_trainable(target)
        is_continued = plans.get("continue_training", False)  # nnU-Net's entry: this start continues
        self.pretrained_weights = PretrainedWeights.from_command_line(sys.argv, target, is_continued)
        # A resumed training takes the record from its checkpoint.
        self.pretrained_record = self.pretrained_weights.record if self.pretrained_weights else None
        refusal = refusal_warning(target.architecture, artifact.ARTIFACT_NAME)
        self._preflight_warnings = warnings if refusal is None else [*warnings, refusal]
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.grad_scaler = self.precision.scaler()
        self.logger.local_logger = PretrainLogger(score_colours(settings, target.input_channels))
        self.quarantine = Quarantine(settings.quarantine_limit, Path(self.output_folder) / "quarantine.json")
        self._step_finished = torch.cuda.Event() if self.device.type == "cuda" else None
        # How many more samples the steps so far have used than they would have with the batch of this start.
        self._extra_samples = 0
        self._recorded_cases: str | None = None

    # ------------------------------------------------------------------ the pretext task

    def train_step(self, batch: dict) -> dict:
        """Make the batch, predict, compare, step. Loss and gradient stay on the device: no step waits for it."""
        self.between_steps()
        pretext = self._make_batch(batch)
        with self.precision.autocast():
            loss = self._compute_loss(self.network(pretext.data), pretext)
        is_finite = take_step(loss, self.network, self.optimizer, self.grad_scaler)
        self._record_step(loss.detach(), is_finite)
        return {"loss": loss.detach()}

    def validation_step(self, batch: dict) -> dict:
        self.between_steps()
        return self._evaluate(batch)

    def _evaluate(self, batch: dict) -> dict:
        """Return loss, confusion matrix and restoration sums of a batch, on the device."""
        pretext = self._make_batch(batch)
        with self.precision.autocast():
            output = self.network(pretext.data)
            loss = self._compute_loss(output, pretext)
        logits, restored = split_output(self._full_resolution(output), self.settings)
        result = {"loss": loss}
        if pretext.fusion_map is not None:
            result["confusion"] = count_confusion(logits.argmax(1), pretext.fusion_map, logits.shape[1])
        if pretext.restoration is not None:
            result["restoration"] = restoration_sums(restored, pretext.restoration)
        return result

    def _make_batch(self, batch: dict[str, Any]) -> PretextBatch:
        """Return input and targets of a collated batch of :class:`PretextDataset`.

        Raises:
            UserError: none of the drawn cases can be used.
        """
        self._log_rejected(batch["rejected"])
        if "tensors" not in batch:
            cases = ", ".join(sorted(self.quarantine.reported))
            raise UserError(f"found no usable sub-volume; check the images of {cases}")
        return make_batch(batch["tensors"], self.settings, self.device)

    def _compute_loss(self, output: Any, pretext: PretextBatch) -> Tensor:
        classes = None if pretext.fusion_map is None else self._targets(pretext.fusion_map)
        if pretext.restoration is None:
            return self.loss(output, classes)
        return self.loss(output, classes, pretext.restoration)

    def _full_resolution(self, output: Any) -> Tensor:
        return output[0] if self.enable_deep_supervision else output

    def _targets(self, fusion_map: Tensor) -> Tensor | list[Tensor]:
        """Return a fusion map (B, D, H, W) as (B, 1, D, H, W), at every resolution of the deep supervision."""
        if not self.enable_deep_supervision:
            return fusion_map[:, None]
        downsample = DownsampleSegForDSTransform(self._get_deep_supervision_scales())
        return [target[:, None] for target in downsample(segmentation=fusion_map)["segmentation"]]

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        dice = (loss.loss if self.enable_deep_supervision else loss).dc
        getattr(dice, "_orig_mod", dice).do_bg = True  # class 0 is a class like the others
        if not self.settings.has_mask:
            return loss
        return PretextLoss(loss, loss.weight_factors if self.enable_deep_supervision else (1,), self.settings)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        # On Apple GPUs, torch's fused optimisers do not skip a step with a non-finite gradient (pytorch #186360).
        is_fused = self.settings.fused_optimizer == "on" and self.device.type != "mps"
        optimizer = make_optimizer(self.network.parameters(), self.settings, is_fused)
        return optimizer, PolyLRScheduler(optimizer, self.settings.initial_lr, self.settings.num_epochs)

    # ------------------------------------------------------------------ data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Return iterators over all remaining batches: new training samples, and the same validation samples again."""
        self._unpack_cases()
        if self._recorded_cases not in (None, self._cases_digest()):
            self.print_to_log_file(
                "WARNING: the cases of this fold are others than before this training was interrupted; samples and "
                "validation are others too, so scores before and after cannot be compared"
            )
        all_steps = self.num_epochs * self.settings.iterations_per_epoch
        training = self._loader(TRAINING, range(self._complete_steps, all_steps))
        remaining_epochs = self.num_epochs - self.current_epoch
        validation = self._loader(VALIDATION, list(range(self.num_val_iterations_per_epoch)) * remaining_epochs)
        is_idle = {} if self._step_finished is None else {"is_device_idle": self._step_finished.query}
        return DataWaitTimer(training, **is_idle), iter(validation)

    @property
    def _complete_steps(self) -> int:
        """Number of training steps that are complete, in all epochs."""
        return self.current_epoch * self.settings.iterations_per_epoch + len(self.epoch_losses)

    def _unpack_cases(self) -> None:
        """Let nnU-Net unpack ``.npz`` cases now: it would do so after the workers have begun to read them."""
        with self.ranks.rank_0_first():
            if self.ranks.rank == 0:
                processes = max(1, get_allowed_n_proc_DA() // 2)
                self.dataset_class.unpack_dataset(self.preprocessed_dataset_folder, False, processes, verify=True)

    @functools.cached_property
    def _cases(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """The fold's cases for TRAINING and for VALIDATION."""
        return self.get_tr_and_val_datasets()

    def _samples(self, stream: int) -> PretextDataset:
        patch_size = self.configuration_manager.patch_size
        return PretextDataset(self._cases[stream], patch_size, self.settings, stream, self.num_input_channels)

    def _loader(self, stream: int, steps: Iterable[int]) -> torch.utils.data.DataLoader:
        workers = get_allowed_n_proc_DA()
        if stream == VALIDATION:
            workers = (workers + 1) // 2
        pin_memory = self.device.type == "cuda"
        return make_loader(self._samples(stream), self._batches(stream, steps), workers, pin_memory=pin_memory)

    def _batches(self, stream: int, steps: Iterable[int]) -> Iterator[range]:
        """Yield the indices of this rank's samples for each step."""
        extra = self._extra_samples if stream == TRAINING else 0
        return self._share._replace(first=self._share.first + extra).batches(steps)

    @property
    def _share(self) -> RankShare:
        """This rank's share of each batch. If a batch cannot be split evenly, the first ranks get one sample more."""
        rank, ranks = self.ranks.rank, self.ranks.size
        batch = self.settings.batch_per_gpu * ranks or self.configuration_manager.batch_size
        return RankShare(batch, batch // ranks * rank + min(rank, batch % ranks), self.batch_size)

    def _set_batch_size_and_oversample(self) -> None:
        if self.settings.batch_per_gpu:
            self.batch_size = self.settings.batch_per_gpu
        else:
            super()._set_batch_size_and_oversample()

    # ------------------------------------------------------------------ epochs and monitoring

    def initialize(self) -> None:
        self.precision.set_float32_precision()
        super().initialize()
        self.step_monitor = StepMonitor(self.bare_network())

    def on_train_start(self) -> None:
        if not self._is_resumed and not self.disable_checkpointing:
            self._require_same_pretext()
        super().on_train_start()
        self.print_to_log_file(f"Pretraining settings:\n{self.settings}\n", add_timestamp=False)
        self.print_to_log_file(f"Precision: {self.precision.name} on {self.device}\n", add_timestamp=False)
        if self.pretrained_record is not None:
            self.print_to_log_file(printable(f"Pretrained weights: {describe_origin(self.pretrained_record)}"))
        for warning in self._preflight_warnings:
            self.print_to_log_file(warning)

    def _require_same_pretext(self) -> None:
        """Raise UserError if the folder holds weights of another pretext, which a new training would replace."""
        file, pretext = Path(self.output_folder) / artifact.ARTIFACT_NAME, self.settings.pretext
        if not file.is_file():
            return
        with malformed_file_errors(file):
            recorded = read_pretext(artifact.read_artifact(file)["vf"])
        if recorded not in (pretext, None):
            raise UserError(
                f"{file} was pretrained with pretext = {recorded}, and a training with pretext = {pretext} would "
                f"replace it; write to another folder (export nnUNet_results=FOLDER), or move {file.parent} away"
            )

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._epoch_meter = EpochMeter(self.device)
        self.dataloader_train.reset()

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        self.step_monitor.check()
        for reasons in self.ranks.gather(self.quarantine.cases):
            self._log_rejected([RejectedCase(case, reason, True) for case, reason in reasons.items()])
        self._log_monitored()

    def losses_of_epoch(self) -> Tensor:
        """Return the losses of this epoch; a loss that is not finite is replaced by the mean of the finite ones."""
        losses = super().losses_of_epoch()
        finite = losses.isfinite()
        return torch.where(finite, losses, losses[finite].mean())

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Let nnU-Net log a score for each output channel: Dice of a fusion class, restored share of an image channel.

        nnU-Net computes the Dice 2 tp / (2 tp + fp + fn) from summed counts. Class 0 is a class like the others. With
        tp = s and fp = fn = 1 - s, the Dice is the share s. A share has no lower bound, and is NaN if an output is. So
        it is logged as at least 0: it must not outweigh the Dice in the mean that decides which checkpoint is best.
        """
        losses, confusion, sums = self._collect(val_outputs)
        hits = confusion.diagonal()
        raw_share = restored_share(sum(self.ranks.gather(sums)))
        share = np.nan_to_num(raw_share, nan=0.0, neginf=0.0).clip(0, 1)
        counts = {
            "tp_hard": np.concatenate([hits, share]),
            "fp_hard": np.concatenate([confusion.sum(0) - hits, 1 - share]),
            "fn_hard": np.concatenate([confusion.sum(1) - hits, 1 - share]),
        }
        super().on_validation_epoch_end([{"loss": losses.mean(), **counts}])
        if self.settings.has_mask:  # nnU-Net logs all scores under the name of Dice
            dice = self.logger.get_value("dice_per_class_or_region", step=-1)[: len(hits)]
            scores = name_scores([*dice], [*raw_share])
            self.print_to_log_file("Scores: " + ", ".join(f"{name}: {score:.4f}" for name, score in scores.items()))
        for warning in pretext_warnings(sum(self.ranks.gather(confusion)), raw_share):
            self.print_to_log_file(warning)

    def _collect(self, outputs: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the losses of this rank's batches, their confusion matrix and their restoration sums.

        The matrix has no rows without fusion, and the sums have none without a mask.
        """
        names = {"loss", "confusion", "restoration"} & outputs[0].keys()
        stacked = {name: torch.stack([output[name] for output in outputs]).cpu().numpy() for name in names}
        confusion = stacked["confusion"].sum(0) if self.settings.has_fusion else np.zeros((0, 0), int)
        sums = stacked["restoration"].sum(0, dtype=float) if self.settings.has_mask else np.zeros((0, 4))
        return stacked["loss"], confusion, sums

    def on_train_end(self) -> None:
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None  # ends the workers

    def _record_step(self, loss: Tensor, is_finite: Tensor) -> None:
        step = self._complete_steps
        self.epoch_losses.append(loss)
        with self._save_samples_of_non_finite_steps():
            self.step_monitor.add(step, is_finite)
        if self._step_finished is not None:
            self._step_finished.record()

    @contextmanager
    def _save_samples_of_non_finite_steps(self) -> Iterator[None]:
        """If too many steps in a row were not finite, save what they saw and end the training with a UserError."""
        try:
            yield
        except NotFiniteError as error:
            file = Path(self.output_folder) / f"not_finite_{self.ranks.rank}.pth"
            batches = describe_batches(self._samples(TRAINING), self._batches(TRAINING, error.steps))
            saved = f"{file} has the cases of these steps and the samples of the first"
            try:
                write_durably({"steps": error.steps, **batches}, file)
            except OSError as write_error:
                saved = f"{file} was not written ({write_error})"
            raise UserError(
                f"{error}, from step {error.steps[0]} on; {saved}. Continue from the last checkpoint (--c) with "
                "nnUNet_vf_precision=fp32, or train again with a lower nnUNet_vf_initial_lr"
            ) from error

    def _log_monitored(self) -> None:
        values = self._epoch_meter.measure(
            self.num_iterations_per_epoch * self._share.batch, self.dataloader_train.seconds
        )
        values |= {"skipped_steps": self.step_monitor.skipped, "quarantined_cases": len(self.quarantine.cases)}
        for name, value in values.items():
            self.logger.log(name, value, self.current_epoch)
        speed = "all steps of this epoch were complete before the training was continued"
        if self.num_iterations_per_epoch:
            share = values["data_wait_share"]
            speed = f"{values['samples_per_second']:.3g} samples/s, waiting for data {share:.1%} of the time"
        memory = f", {values['gpu_memory_gb']:.1f} GB of GPU memory" if self.device.type == "cuda" else ""
        self.print_to_log_file(
            f"{speed}{memory}; {values['skipped_steps']} steps skipped so far, {values['quarantined_cases']} cases in "
            "quarantine since the last start"
        )

    def _log_rejected(self, rejected: list[RejectedCase]) -> None:
        """Log each case that gave no sub-volume once; quarantine those that never will.

        Raises:
            UserError: too many cases are in quarantine.
        """
        for case in rejected:
            line = self.quarantine.add(*case)
            if line:
                self.print_to_log_file(line)
        if any(case.unusable for case in rejected):
            self.quarantine.require_within_limit(len({*self._cases[0].identifiers, *self._cases[1].identifiers}))

    # ------------------------------------------------------------------ checkpoints

    def state(self) -> dict[str, Any]:
        self.step_monitor.check()
        return {
            **super().state(),
            "skipped": self.step_monitor.skipped,
            "in_a_row": self.step_monitor.in_a_row,
            "pretrained": self.pretrained_record,
            "batch": self._share.batch,
            "extra_samples": self._extra_samples,
            "cases": self._cases_digest(),
        }

    def _cases_digest(self) -> str:
        """Return a hash of the names of the fold's cases, on which the samples depend."""
        names = [list(cases.identifiers) for cases in self._cases]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.step_monitor.restore(state.get("skipped", 0), state.get("in_a_row", []))
        self.pretrained_record = state.get("pretrained")
        self._recorded_cases = state.get("cases")  # checkpoints of earlier versions do not have it
        batch, earlier_batch = self._share.batch, state.get("batch", self._share.batch)
        self._extra_samples = state.get("extra_samples", 0) + self._complete_steps * (earlier_batch - batch)
        if earlier_batch != batch:
            self.print_to_log_file(
                f"WARNING: the batch has {batch} samples, before it had {earlier_batch} (batch_per_gpu, another number "
                "of ranks); validation has other samples too, so scores before and after cannot be compared"
            )

    def require_same_run(self, checkpoint: dict[str, Any], file: Path) -> None:
        """Raise UserError if the checkpoint has another trainer, other settings or other plans than this run.

        Without ``--c`` (``--val``, ``--val_best``) the settings of the checkpoint replace this run's.
        """
        recorded = PlansManager(checkpoint["init_args"]["plans"])
        writer = checkpoint["trainer_name"]
        if writer != type(self).__name__ or VFSettings.section not in recorded.plans:
            raise UserError(f"{file} was written by {writer}, not by {type(self).__name__}; move it to another folder")
        settings = VFSettings.resolve(recorded.plans, {})
        if not self.continue_training:
            self._require_same_heads(settings, file)
            self.settings = dataclasses.replace(settings, precision=self.settings.precision)
            self.settings.apply_schedule(self)
        self.settings.require_same(recorded.plans[VFSettings.section], file)
        require_same_plans(recorded, self.plans_manager, self.configuration_name, file)
        state = checkpoint.get(STATE, {})
        if self.continue_training and "pretrained" in state:  # checkpoints of earlier versions do not have it
            require_same_origin(state["pretrained"], self.pretrained_weights, file)

    def _require_same_heads(self, recorded: VFSettings, file: Path) -> None:
        """Raise UserError if a checkpoint's network has other outputs than this run's."""
        if _heads(recorded) != _heads(self.settings):
            names = ("pretext", "coefficient_steps", "mask_side")  # mask_side: the default may not fit the patch
            used = [name for name in names if name not in recorded.without_effect]
            values = " ".join(f"{recorded.prefix}{name}={getattr(recorded, name)}" for name in used)
            raise UserError(
                f"the network of {file} has other outputs than that of these settings; restore them: export {values}"
            )

    def save_checkpoint(self, filename: str) -> None:
        """Write the checkpoint; with the best and the final one also the preview, the artifact and its model card.

        While the final checkpoint of an earlier training is there, so are its artifact and model card: only the final
        checkpoint of this training replaces them, as in nnU-Net.
        """
        super().save_checkpoint(filename)
        folder, name = Path(self.output_folder), Path(filename).name
        if self.ranks.rank > 0 or name not in (BEST, FINAL):
            return
        with self.tolerate_write_failure(folder / "preview.png"):
            self._draw_preview(folder / "preview.png")
        if not self.disable_checkpointing and (name == FINAL or not (folder / FINAL).is_file()):
            with self.tolerate_write_failure(folder / artifact.ARTIFACT_NAME, is_essential=name == FINAL):
                self._write_artifact(folder)

    # ------------------------------------------------------------------ results

    def _draw_preview(self, file: Path) -> None:
        """Draw the first validation samples with the network's prediction."""
        self.network.eval()
        samples = self._samples(VALIDATION)
        # A full batch: for another size, a compiled network would be compiled again.
        batch = collate([samples[index] for index in range(self.batch_size)])
        examples = make_examples(batch, self.settings, self.device, self._predict)[:_PREVIEW_EXAMPLES]
        views = view_names(self.plans_manager.transpose_forward)
        draw_examples(examples, views, self.settings, file)

    @torch.no_grad()
    def _predict(self, data: Tensor) -> Tensor:
        """Return the output (B, channels, D, H, W); only rank 0 calls it, so the network must not use collectives."""
        network: Any = self.network.module if self.is_ddp else self.network
        with self.precision.autocast():
            return self._full_resolution(network(data)).float()

    def _write_artifact(self, folder: Path) -> None:
        metadata = describe_pretraining(
            self.plans_manager,
            self.configuration_manager,
            self.configuration_name,
            self.dataset_json,
            self.settings,
            self.fold,
            len(self._cases[TRAINING].identifiers),
            self._share.batch,
            self.pretrained_record,
            self.logger.get_value("dice_per_class_or_region", step=-1),
        )
        artifact.write_artifact(folder / artifact.ARTIFACT_NAME, self.bare_network().state_dict(), metadata)
        write_model_card(folder / CARD_NAME, metadata)

    @one_line_errors()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Report the pretext task on the fixed validation samples, where nnU-Net predicts whole volumes.

        Logs the Dice of each fusion class and the restored share of each channel, and writes them to
        ``pretext_report.json`` and ``.png``.
        """
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.network.eval()
        loader = self._loader(VALIDATION, range(self.num_val_iterations_per_epoch))
        with torch.no_grad():
            _, confusion, sums = self._collect([self._evaluate(batch) for batch in loader])
        confusion, sums = sum(self.ranks.gather(confusion)), sum(self.ranks.gather(sums))
        folder = Path(self.output_folder)
        if self.ranks.rank == 0:
            samples = self.num_val_iterations_per_epoch * self._share.batch
            with self.tolerate_write_failure(folder / "pretext_report.json", is_essential=True):
                report = write_report(confusion, sums, samples, self.settings.as_dict(), folder)
            scores = name_scores([*report["dice_per_class"].values()], [])
            if scores:
                scores["mean Dice"] = report["mean_dice"]
            scores |= name_scores([], [*report["restored_share"].values()])
            lines = "\n".join(f"  {name}: {value:.4f}" for name, value in scores.items())
            self.print_to_log_file(f"Pretext report, fixed validation samples:\n{lines}")
            for name, value in report["dice_per_class"].items():
                self.logger.log_summary(f"final_val/{name}_dice", value)
            for name, value in report["restored_share"].items():
                self.logger.log_summary(f"final_val/{name}_share", value)
            self.log_picture(folder / "pretext_report.png")


def _with_pretext_labels(dataset_json: dict, settings: VFSettings) -> dict:
    """Return a copy of dataset.json with a label for each output of the pretext, without regions and list of cases."""
    outputs = output_names(settings, len(read_channel_names(dataset_json)))
    names = ["background", *outputs[1:]]  # nnU-Net requires this name for label 0
    kept = {key: value for key, value in dataset_json.items() if key not in ("regions_class_order", "dataset")}
    return {**kept, "labels": {name: label for label, name in enumerate(names)}}


def _heads(settings: VFSettings) -> tuple[int, bool]:
    """Return what the number of the network's output channels depends on."""
    return settings.num_fusion_classes, settings.has_mask
