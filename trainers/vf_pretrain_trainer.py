"""``nnUNetv2_train DATASET 3d_fullres all -tr VFPretrainTrainer``: pretrain any 3D plan with Volume Fusion."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.pretext.fusion import fuse_batch
from nnunetv2_vf.pretext.pictures import colour_of_class, draw_examples, make_examples, plane_names
from nnunetv2_vf.pretext.report import count_confusion, pretext_warning, write_report
from nnunetv2_vf.pretext.sampling import (
    TRAINING,
    VALIDATION,
    FusionDataset,
    Rejected,
    collate,
    make_loader,
    sample_indices,
)
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training.monitoring import DataWaitTimer, NotFiniteError, Quarantine, StepWatch
from nnunetv2_vf.training.optimizer import make_optimizer
from nnunetv2_vf.training.preflight import check_pretraining, patch_warning
from nnunetv2_vf.training.progress_plot import PretextLogger
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer
from nnunetv2_vf.training.step import Precision, training_step
from nnunetv2_vf.transfer import artifact as weights
from nnunetv2_vf.transfer.compatibility import PretrainedWeights
from nnunetv2_vf.transfer.model_card import CARD_NAME, write_model_card
from nnunetv2_vf.transfer.target_plans import TargetPlans

_PREVIEW_EXAMPLES = 3


class DoneStep(NamedTuple):
    """Takes the place of the batch of a step that was done before the training was interrupted."""

    loss: Tensor


class VFPretrainTrainer(ResumableTrainer):
    """Pretrains encoder and decoder: segment fused sub-volumes into their K + 1 fusion coefficients.

    The dataset's labels are ignored. To nnU-Net the fusion classes are this training's labels, so that network
    heads, loss, optimiser, schedule, pseudo Dice, logging and checkpoints stay its own. Beside its checkpoints it
    leaves ``vf_pretrained.pth``, ``preview.png`` and a final ``pretext_report.json`` and ``.png``.

    Settings: :class:`nnunetv2_vf.settings.VFSettings`. Source: arXiv 2306.16925, section "Volume Fusion".
    """

    settings: VFSettings

    @one_line_errors()
    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net records exactly this signature
    ):
        settings = VFSettings.resolve(plans, os.environ)
        check_pretraining(plans, configuration, fold, settings)
        self.settings = settings
        self.precision = Precision.choose(settings.precision, device)
        # What nnU-Net gets to see is copies: the settings are recorded wherever it stores the plans, and the
        # fusion classes take the place of the dataset's labels.
        plans = {**plans, VFSettings.section: settings.as_dict()}
        dataset_json = _with_fusion_labels(dataset_json, settings)
        target = TargetPlans(PlansManager(plans), configuration, dataset_json)
        self.pretrained_weights = PretrainedWeights.of_command(sys.argv, target)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.grad_scaler = self.precision.scaler()
        self.logger.local_logger = PretextLogger(colour_of_class(settings.coefficient_steps))
        self.quarantine = Quarantine(settings.quarantine_limit, Path(self.output_folder) / "quarantine.json")
        self._reported: set[str] = set()
        self._done: list[DoneStep] = []  # of the epoch that an interrupted training goes on in
        self._losses: list[Tensor] = []  # of this epoch
        self._step_done = torch.cuda.Event() if self.device.type == "cuda" else None

    # ------------------------------------------------------------------ the pretext task in nnU-Net's training

    def train_step(self, batch: dict | DoneStep) -> dict:
        """As nnU-Net's, but what it returns stays on the device: :func:`nnunetv2_vf.training.step.training_step`."""
        if isinstance(batch, DoneStep):
            loss = batch.loss.to(self.device)
        else:
            self.between_steps()
            fused = self._fuse(batch)
            loss, counts = training_step(
                self.network, self.optimizer, self.grad_scaler, lambda: self._forward(fused)[1]
            )
            self._watch(
                self.step_watch.add, self.current_epoch * self.num_iterations_per_epoch + len(self._losses), counts
            )
        self._losses.append(loss)
        if self._step_done is not None:
            self._step_done.record()
        return {"loss": loss}

    def validation_step(self, batch: dict) -> dict:
        """The loss and the confusion matrix, which stay on the device."""
        self.between_steps()
        return self._validate(batch)

    def _validate(self, batch: dict) -> dict:
        batch = self._fuse(batch)
        output, loss = self._forward(batch)
        answer, truth = (x[0] if self.enable_deep_supervision else x for x in (output, batch["target"]))
        return {"loss": loss, "confusion": count_confusion(answer.argmax(1), truth[:, 0], answer.shape[1])}

    def _fuse(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Samples of a :class:`FusionDataset` -> what nnU-Net's training step takes."""
        self._note(batch["rejected"])
        if "tensors" not in batch:
            raise UserError(f"found no usable sub-volume; look at the images of {', '.join(sorted(self._reported))}")
        fused = fuse_batch(batch["tensors"], self.settings.coefficient_steps, self.device)
        return {"data": fused.fused, "target": self._targets(fused.fusion_map)}

    def _targets(self, fusion_map: Tensor) -> Tensor | list[Tensor]:
        """The map (B, D, H, W) at every resolution of the deep supervision: (B, 1, D, H, W) each."""
        if not self.enable_deep_supervision:
            return fusion_map[:, None]
        downsample = DownsampleSegForDSTransform(self._get_deep_supervision_scales())
        return [target[:, None] for target in downsample(segmentation=fusion_map)["segmentation"]]

    def _forward(self, fused: dict[str, Any]) -> tuple[Any, Tensor]:
        """The network's output and the loss."""
        with self.precision.autocast():
            output = self.network(fused["data"])
            return output, self.loss(output, fused["target"])

    def _build_loss(self) -> torch.nn.Module:
        loss = super()._build_loss()
        dice = (loss.loss if self.enable_deep_supervision else loss).dc
        getattr(dice, "_orig_mod", dice).do_bg = True  # class 0 is a real class
        return loss

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        fused = self.settings.fused_optimizer == "on"
        optimizer = make_optimizer(self.network.parameters(), self.settings, fused)
        return optimizer, PolyLRScheduler(optimizer, self.settings.initial_lr, self.settings.num_epochs)

    # ------------------------------------------------------------------ epochs, and what is watched

    def initialize(self) -> None:
        self.precision.apply_to_single_precision()
        super().initialize()
        self.step_watch = StepWatch(self.bare_network())

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._epoch_started, self._waiting.seconds = time.monotonic(), 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        losses = torch.stack([output["loss"] for output in train_outputs]).cpu()
        finite = losses.isfinite()
        losses[~finite] = losses[finite].mean()  # their steps were left out
        super().on_train_epoch_end([{"loss": loss} for loss in losses.numpy()])
        self._watch(self.step_watch.look)
        for theirs in self.ranks.gather(self.quarantine.cases):
            self._note([Rejected(case, reason, True) for case, reason in theirs.items()])
        self._log_watched(time.monotonic() - self._epoch_started)

    def _log_watched(self, seconds: float) -> None:
        steps = self.num_iterations_per_epoch - len(self._done)  # that were done in this time
        self._done = []
        on_gpu = self.device.type == "cuda"
        watched = {
            "samples_per_second": steps * self._global_batch / seconds if steps else float("nan"),
            "data_wait_share": self._waiting.seconds / seconds if steps else float("nan"),
            "gpu_memory_gb": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else float("nan"),
            "skipped_steps": self.step_watch.skipped,
            "quarantined_cases": len(self.quarantine.cases),
        }
        for name, value in watched.items():
            self.logger.log(name, value, self.current_epoch)
        memory = f", {watched['gpu_memory_gb']:.1f} GB of GPU memory" if on_gpu else ""
        self.print_to_log_file(
            f"{watched['samples_per_second']:.3g} samples/s, waiting for data {watched['data_wait_share']:.1%} of the "
            f"time{memory}; so far {watched['skipped_steps']} steps left out, {watched['quarantined_cases']} cases in "
            "quarantine"
        )

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """As nnU-Net's, but class 0 counts: it is a real class here."""
        losses, confusions = (
            torch.stack([output[name] for output in val_outputs]).cpu().numpy() for name in ("loss", "confusion")
        )
        hits = confusions.diagonal(axis1=1, axis2=2)
        counts = {"tp_hard": hits, "fp_hard": confusions.sum(1) - hits, "fn_hard": confusions.sum(2) - hits}
        super().on_validation_epoch_end(
            [{"loss": loss, **{name: n[i] for name, n in counts.items()}} for i, loss in enumerate(losses)]
        )
        warning = pretext_warning(sum(self.ranks.gather(confusions.sum(0))))
        if warning:
            self.print_to_log_file(warning)
        self._losses = []

    def _note(self, rejected: list[Rejected]) -> None:
        """Log every case once that gave no sub-volumes; raises UserError if there are too many that never will."""
        for line in self.quarantine.add({case.case: case.reason for case in rejected if case.unusable}):
            self.print_to_log_file(line)
        for case in rejected:
            if case.case not in self._reported and not case.unusable:
                self.print_to_log_file(f"WARNING: case {case.case} {case.reason}; such sub-volumes are skipped")
            self._reported.add(case.case)
        if rejected:
            self.quarantine.require_few(len({*self._cases[0].identifiers, *self._cases[1].identifiers}))

    def _watch(self, look: Callable[..., None], *arguments: Any) -> None:
        """Look at the steps; if too many were not finite, leave what they were made of and end."""
        try:
            look(*arguments)
        except NotFiniteError as error:
            samples = self._samples(TRAINING)
            indices = list(self._batches(error.steps))
            file = Path(self.output_folder) / f"not_finite_{self.ranks.rank}.pth"
            content = {
                "steps": error.steps,
                "sample_indices": [list(batch) for batch in indices],
                "cases": [[samples[index].get("cases") for index in batch] for batch in indices],
                "first_batch": collate([samples[index] for index in indices[0]]),
            }
            torch.save(content, file)
            raise UserError(
                f"{error}, from step {error.steps[0]} on; {file} holds their samples. Go on from the last checkpoint "
                "(--c) with nnUNet_vf_precision=fp32, or train anew with a lower nnUNet_vf_initial_lr"
            ) from error

    # ------------------------------------------------------------------ data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Iterators over the whole of the remaining training: every epoch new samples, and the fixed ones."""
        first = self.current_epoch * self.num_iterations_per_epoch + len(self._done)
        last = self.num_epochs * self.num_iterations_per_epoch
        idle = {} if self._step_done is None else {"idle": self._step_done.query}
        self._waiting = DataWaitTimer(self._loader(TRAINING, [range(first, last)]), **idle)
        fixed = self._loader(VALIDATION, self._fixed_steps(self.num_epochs - self.current_epoch))
        return itertools.chain(self._done, self._waiting), iter(fixed)

    def _fixed_steps(self, epochs: int) -> list[range]:
        return [range(self.num_val_iterations_per_epoch)] * epochs

    @functools.cached_property
    def _cases(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """This fold's cases: for TRAINING and for VALIDATION."""
        return self.get_tr_and_val_datasets()

    def _samples(self, stream: int) -> FusionDataset:
        patch_size = self.configuration_manager.patch_size
        return FusionDataset(self._cases[stream], patch_size, self.settings, stream, self.num_input_channels)

    def _loader(self, stream: int, epochs: list[range]) -> torch.utils.data.DataLoader:
        batches = itertools.chain.from_iterable(map(self._batches, epochs))
        workers = get_allowed_n_proc_DA()
        if stream == VALIDATION:
            workers = (workers + 1) // 2
        return make_loader(self._samples(stream), batches, workers, pin_memory=self.device.type == "cuda")

    @property
    def _global_batch(self) -> int:
        """Samples of a step on all ranks."""
        return self.settings.batch_per_gpu * self.ranks.size or self.configuration_manager.batch_size

    def _set_batch_size_and_oversample(self) -> None:
        if self.settings.batch_per_gpu:
            self.batch_size = self.settings.batch_per_gpu
        else:
            super()._set_batch_size_and_oversample()

    def _batches(self, steps: Iterable[int]) -> Iterable[range]:
        """This rank's sample indices; nnU-Net gives the first ranks the remainder of a batch it splits."""
        rank, ranks, whole = self.ranks.rank, self.ranks.size, self._global_batch
        offset = whole // ranks * rank + min(rank, whole % ranks)
        return sample_indices(steps, whole, offset, self.batch_size)

    # ------------------------------------------------------------------ where stock commands enter

    def on_train_start(self) -> None:
        super().on_train_start()
        self.print_to_log_file(f"Volume Fusion settings:\n{self.settings}\n", add_timestamp=False)
        self.print_to_log_file(f"Computing in {self.precision.name} on {self.device}\n", add_timestamp=False)
        warning = patch_warning(self.configuration_manager)
        if warning:
            self.print_to_log_file(warning)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None
        self._waiting = DataWaitTimer(())  # with the last reference to them, the workers end

    def state(self) -> dict[str, Any]:
        self._watch(self.step_watch.look)
        losses = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        return {
            "losses": torch.stack(self.ranks.gather(losses)).mean(0),
            "skipped": self.step_watch.skipped,
            "in_a_row": self.step_watch.in_a_row,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._done = [DoneStep(loss) for loss in state.get("losses", ())]
        self.step_watch.restore(state.get("skipped", 0), state.get("in_a_row", []))

    def accept(self, checkpoint: dict[str, Any], file: Path) -> None:
        """Refuse another trainer's, or other settings or plans than this run's.

        Without ``--c`` (``--val``, ``--val_best``) the settings are the checkpoint's.
        """
        recorded = PlansManager(checkpoint["init_args"]["plans"])
        if checkpoint["trainer_name"] != type(self).__name__ or VFSettings.section not in recorded.plans:
            writer = checkpoint["trainer_name"]
            raise UserError(f"{file} was written by {writer}, not by {type(self).__name__}; move it away")
        theirs = VFSettings.resolve(recorded.plans, {})
        if not self._continues and theirs.coefficient_steps == self.settings.coefficient_steps:
            self.settings = theirs
            self.precision = Precision.choose(theirs.precision, self.device)
            theirs.apply_schedule(self)
        self._refuse_differences(recorded, file)

    def _refuse_differences(self, recorded: PlansManager, filename: Path) -> None:
        self.settings.require_same(recorded.plans[VFSettings.section], filename)
        known = self.configuration_name in recorded.available_configurations
        theirs = recorded.get_configuration(self.configuration_name).configuration if known else {}
        ours = self.configuration_manager.configuration
        changed = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
        if recorded.dataset_name != self.plans_manager.dataset_name or changed:
            raise UserError(
                f"{filename} was trained on {recorded.dataset_name} with other plans (different: "
                f"{', '.join(changed) or 'the dataset'}); restore them, or train anew without --c"
            )

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's; beside the best and the final checkpoint the artifact and the pictures are refreshed."""
        super().save_checkpoint(filename)
        folder = Path(self.output_folder)
        if self.ranks.rank == 0 and Path(filename).stem in ("checkpoint_best", "checkpoint_final"):
            with self.tolerate_write_failure(folder / "preview.png"):
                self._draw_preview()
            if not self.disable_checkpointing:
                with self.tolerate_write_failure(folder / weights.FILE_NAME):
                    self._write_artifact()

    @one_line_errors()
    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """The pretext report, in the place of nnU-Net's prediction of whole volumes, which has no meaning here.

        Per-class Dice and the confusion matrix over the fixed validation samples, logged and written to
        ``pretext_report.json`` and ``pretext_report.png``.
        """
        self.set_deep_supervision_enabled(self.enable_deep_supervision)
        self.network.eval()
        loader = self._loader(VALIDATION, self._fixed_steps(1))
        with torch.no_grad():
            confusion = sum(self._validate(batch)["confusion"] for batch in loader).cpu().numpy()
        confusion = sum(self.ranks.gather(confusion))
        if self.ranks.rank == 0:
            samples = self.num_val_iterations_per_epoch * self._global_batch
            report = write_report(confusion, samples, self.settings.as_dict(), Path(self.output_folder))
            dice = {**report["dice_per_class"], "mean": report["mean_dice"]}
            lines = "\n".join(f"  {name}: Dice {value:.4f}" for name, value in dice.items())
            self.print_to_log_file(f"Pretext report, fixed validation samples:\n{lines}")
            for name, value in report["dice_per_class"].items():
                self.logger.log_summary(f"final_val/{name}_dice", value)

    # ------------------------------------------------------------------ what it leaves behind

    def _draw_preview(self) -> None:
        """Draw the first fixed validation samples with the network's answer to ``preview.png``."""
        self.network.eval()
        samples = self._samples(VALIDATION)
        batch = collate([samples[index] for index in range(self.batch_size)])
        examples = make_examples(batch, self.settings, self.device, self._answer)[:_PREVIEW_EXAMPLES]
        path = Path(self.output_folder) / "preview.png"
        draw_examples(
            examples, plane_names(self.plans_manager.transpose_forward), self.settings.coefficient_steps, path
        )

    @torch.no_grad()
    def _answer(self, data: Tensor) -> Tensor:
        # rank 0 answers alone: no collective calls
        network: nn.Module = self.network.module if self.is_ddp else self.network  # type: ignore[assignment]
        with self.precision.autocast():
            output = network(data)
        return (output[0] if self.enable_deep_supervision else output).argmax(1)

    def _write_artifact(self) -> None:
        metadata = weights.describe_pretraining(
            self.plans_manager,
            self.configuration_manager,
            self.configuration_name,
            self.dataset_json,
            self.settings,
            self.fold,
            len(self._cases[TRAINING].identifiers),
            self.logger.get_value("dice_per_class_or_region", step=-1),
        )
        folder = Path(self.output_folder)
        weights.write_artifact(folder / weights.FILE_NAME, self.bare_network().state_dict(), metadata)
        write_model_card(folder / CARD_NAME, metadata)


def _with_fusion_labels(dataset_json: dict, settings: VFSettings) -> dict:
    """A copy of dataset.json whose labels are the fusion classes; regions, ignore label and list of cases are gone."""
    steps = settings.coefficient_steps
    names = ["background", *(f"fusion_{label}_of_{steps}" for label in range(1, steps + 1))]
    kept = {key: value for key, value in dataset_json.items() if key not in ("regions_class_order", "dataset")}
    return {**kept, "labels": {name: label for label, name in enumerate(names)}}
