"""``nnUNetv2_train DATASET 3d_fullres all -tr VFPretrainTrainer``: pretrain any 3D plan with Volume Fusion."""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import save_json
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor
from torch._dynamo import OptimizedModule

from nnunetv2_vf import weights
from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.fusion import fuse_batch
from nnunetv2_vf.model_card import CARD_NAME, write_model_card
from nnunetv2_vf.optimizer import make_optimizer, poly_decay
from nnunetv2_vf.preflight import check_pretraining
from nnunetv2_vf.preview import class_names, draw_confusion, draw_examples, make_examples, plane_names
from nnunetv2_vf.progress import PretextLogger
from nnunetv2_vf.sampling import TRAINING, VALIDATION, FusionDataset, collate, make_loader, sample_indices
from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.training_step import Precision, training_step

_PREVIEW_EXAMPLES = 3


class VFPretrainTrainer(nnUNetTrainer):
    """Pretrains encoder and decoder: segment fused sub-volumes into their K + 1 fusion coefficients.

    The dataset's labels are ignored. To nnU-Net the fusion classes are this training's labels, so that network
    heads, loss, optimiser, schedule, pseudo Dice, logging and checkpoints stay its own. Beside its checkpoints it
    leaves ``vf_pretrained.pth``, ``preview.png`` and a final ``pretext_report.json`` and ``.png``.

    Settings: :class:`nnunetv2_vf.settings.VFSettings`. Source: arXiv 2306.16925, section "Volume Fusion".
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
        settings = VFSettings.resolve(plans, os.environ)
        check_pretraining(plans, configuration, fold, settings)
        self.settings = settings
        self.precision = Precision.choose(settings.precision, device)
        self._continues = bool(plans.get("continue_training"))  # nnU-Net puts its flag --c here
        # What nnU-Net gets to see is copies: the settings are recorded wherever it stores the plans, and the
        # fusion classes take the place of the dataset's labels.
        plans = {**plans, VFSettings.section: settings.as_dict()}
        super().__init__(plans, configuration, fold, _with_fusion_labels(dataset_json, settings), device)
        settings.apply_schedule(self)
        self.grad_scaler = self.precision.scaler()
        self.logger.local_logger = PretextLogger(class_names(settings.coefficient_steps))
        self._reported: set[str] = set()

    # ------------------------------------------------------------------ the pretext task in nnU-Net's training

    def train_step(self, batch: dict) -> dict:
        """As nnU-Net's, but what it returns stays on the device: :func:`nnunetv2_vf.training_step.training_step`."""
        fused = self._fuse(batch)
        loss, _ = training_step(self.network, self.optimizer, self.grad_scaler, lambda: self._forward(fused)[1])
        return {"loss": loss}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        losses = torch.stack([output["loss"] for output in train_outputs])
        super().on_train_epoch_end([{"loss": loss} for loss in losses.cpu().numpy()])

    def validation_step(self, batch: dict) -> dict:
        """The loss and the confusion matrix, which stay on the device."""
        batch = self._fuse(batch)
        output, loss = self._forward(batch)
        answer, truth = (x[0] if self.enable_deep_supervision else x for x in (output, batch["target"]))
        confusion = _confusion(answer.argmax(1), truth[:, 0], self.settings.coefficient_steps + 1)
        return {"loss": loss, "confusion": confusion}

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

    def _fuse(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Samples of a :class:`FusionDataset` -> what nnU-Net's training step takes."""
        for case, reason in batch["rejected"]:
            if case not in self._reported:
                self._reported.add(case)
                self.print_to_log_file(f"WARNING: case {case} {reason}; such sub-volumes are skipped")
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
        optimizer = make_optimizer(self.network, self.settings, fused=self.settings.fused_optimizer == "on")
        return optimizer, poly_decay(optimizer, self.settings)

    # ------------------------------------------------------------------ data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Iterators over the whole of the remaining training: every epoch new samples, and the fixed ones."""
        first = self.current_epoch * self.num_iterations_per_epoch
        last = self.num_epochs * self.num_iterations_per_epoch
        train = self._loader(TRAINING, [range(first, last)])
        fixed = self._loader(VALIDATION, self._fixed_steps(self.num_epochs - self.current_epoch))
        return iter(train), iter(fixed)

    def _fixed_steps(self, epochs: int) -> list[range]:
        return [range(self.num_val_iterations_per_epoch)] * epochs

    @functools.cached_property
    def _cases(self) -> tuple[nnUNetBaseDataset, nnUNetBaseDataset]:
        """This fold's cases: for TRAINING and for VALIDATION."""
        return self.get_tr_and_val_datasets()

    def _samples(self, stream: int) -> FusionDataset:
        return FusionDataset(self._cases[stream], self.configuration_manager.patch_size, self.settings, stream)

    def _loader(self, stream: int, epochs: list[range]) -> torch.utils.data.DataLoader:
        batches = itertools.chain.from_iterable(map(self._batches, epochs))
        workers = get_allowed_n_proc_DA()
        if stream == VALIDATION:
            workers = (workers + 1) // 2
        return make_loader(self._samples(stream), batches, workers, pin_memory=self.device.type == "cuda")

    def _batches(self, steps: range) -> Any:
        """This rank's sample indices; nnU-Net gives the first ranks the remainder of a batch it splits."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if self.is_ddp else (0, 1)
        whole = self.configuration_manager.batch_size
        offset = whole // ranks * rank + min(rank, whole % ranks)
        return sample_indices(steps.start, steps.stop, whole, offset, self.batch_size)

    # ------------------------------------------------------------------ where stock commands enter

    @one_line_errors()
    def run_training(self) -> None:
        super().run_training()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.precision.apply_to_single_precision()
        self.print_to_log_file(f"Volume Fusion settings:\n{self.settings}\n", add_timestamp=False)
        self.print_to_log_file(f"Computing in {self.precision.name} on {self.device}\n", add_timestamp=False)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.dataloader_train = self.dataloader_val = None  # ends their workers

    @one_line_errors()
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As nnU-Net's. Without ``--c`` (``--val``, ``--val_best``) the settings are the checkpoint's.

        Raises:
            SystemExit: the checkpoint is damaged, another trainer's, or has other settings or plans than this run.
        """
        recorded = PlansManager(weights.recorded_plans(Path(filename_or_checkpoint), type(self).__name__))
        theirs = VFSettings.resolve(recorded.plans, {})
        if not self._continues and theirs.coefficient_steps == self.settings.coefficient_steps:
            self.settings = theirs
            theirs.apply_schedule(self)
        self._refuse_differences(recorded, filename_or_checkpoint)
        super().load_checkpoint(filename_or_checkpoint)
        # nnU-Net writes checkpoint_latest before it compares the epoch with the best one so far
        self._best_ema = max(self.logger.get_value("ema_fg_dice", step=None), default=None)

    def _refuse_differences(self, recorded: PlansManager, filename: str) -> None:
        differences = self.settings.differences(recorded.plans[VFSettings.section])
        if differences:
            raise UserError(
                f"the settings differ from those of {filename}: {'; '.join(differences)}. Set them back "
                f"(export {VFSettings.prefix}NAME=VALUE), or train anew without --c"
            )
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
        if self.local_rank == 0 and Path(filename).stem in ("checkpoint_best", "checkpoint_final"):
            self._draw_preview()
            if not self.disable_checkpointing:
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
            confusion = sum(self.validation_step(batch)["confusion"] for batch in loader).cpu().numpy()
        if self.is_ddp:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, confusion)
            confusion = sum(parts)
        if self.local_rank == 0:
            self._write_report(confusion)

    # ------------------------------------------------------------------ what it leaves behind

    def _write_report(self, confusion: np.ndarray) -> None:
        dice = _dice_per_class(confusion)
        names = class_names(self.settings.coefficient_steps)
        report = {
            "mean_dice": float(np.nanmean(dice)),
            "dice_per_class": dict(zip(names, map(float, dice), strict=True)),
            "confusion_rows_are_the_truth": confusion.tolist(),
            "samples": self.num_val_iterations_per_epoch * self.configuration_manager.batch_size,
            "settings": self.settings.as_dict(),
        }
        folder = Path(self.output_folder)
        save_json(report, str(folder / "pretext_report.json"), sort_keys=False)
        draw_confusion(confusion, dice.tolist(), folder / "pretext_report.png")
        lines = [f"  {name}: Dice {value:.4f}" for name, value in zip(names, dice, strict=True)]
        lines.append(f"  mean: Dice {report['mean_dice']:.4f}")
        self.print_to_log_file("Pretext report, fixed validation samples:\n" + "\n".join(lines))
        for name, value in zip(names, dice, strict=True):
            self.logger.log_summary(f"final_val/{name}_dice", value)

    def _draw_preview(self) -> None:
        """Draw the first fixed validation samples with the network's answer to ``preview.png``."""
        self.network.eval()
        samples = self._samples(VALIDATION)
        batch = collate([samples[index] for index in range(self.batch_size)])
        examples = make_examples(batch, self.settings, self.device, self._answer)[:_PREVIEW_EXAMPLES]
        path = Path(self.output_folder) / "preview.png"
        draw_examples(examples, plane_names(self.plans_manager), self.settings.coefficient_steps, path)

    @torch.no_grad()
    def _answer(self, data: Tensor) -> Tensor:
        network = self._bare_network() if self.is_ddp else self.network  # rank 0 answers alone: no collective calls
        with self.precision.autocast():
            output = network(data)
        return (output[0] if self.enable_deep_supervision else output).argmax(1)

    def _bare_network(self) -> torch.nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if self.is_ddp else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

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
        weights.write_artifact(folder / weights.FILE_NAME, self._bare_network().state_dict(), metadata)
        write_model_card(folder / CARD_NAME, metadata)


def _with_fusion_labels(dataset_json: dict, settings: VFSettings) -> dict:
    """A copy of dataset.json whose labels are the fusion classes; regions, ignore label and list of cases are gone."""
    steps = settings.coefficient_steps
    names = ["background", *(f"fusion_{label}_of_{steps}" for label in range(1, steps + 1))]
    kept = {key: value for key, value in dataset_json.items() if key not in ("regions_class_order", "dataset")}
    return {**kept, "labels": {name: label for label, name in enumerate(names)}}


def _confusion(answer: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count voxels by (true class, answered class)."""
    pairs = truth.long().flatten() * num_classes + answer.flatten()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def _dice_per_class(confusion: np.ndarray) -> np.ndarray:
    """Dice of every class; NaN for a class that is neither true nor answered anywhere."""
    marked = confusion.sum(axis=0) + confusion.sum(axis=1)
    return np.divide(2 * confusion.diagonal(), marked, out=np.full(len(marked), np.nan), where=marked > 0)
