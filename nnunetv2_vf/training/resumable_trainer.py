"""A trainer that can stop at any step and continue there: the base class of both our trainers.

It saves on the signals of a cluster, writes checkpoints that cannot be lost, and survives full disks. Everything hooks
into nnU-Net's own methods and attributes.
"""

from __future__ import annotations

import io
import math
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_vf.durable_files import write_durably
from nnunetv2_vf.errors import UserError, one_line_errors, printable
from nnunetv2_vf.training.checkpoints import BEST, FINAL, LATEST, PREVIOUS, STATE, newest_undamaged, read_checkpoint
from nnunetv2_vf.training.distributed_trainer import DistributedTrainer
from nnunetv2_vf.training.loggers import ExtraLogger, Run, make_loggers
from nnunetv2_vf.training.progress_plot import PlotLogger
from nnunetv2_vf.training.random_state import get_random_state, seed_process, set_random_state
from nnunetv2_vf.training.signals import EXIT_CTRL_C, EXIT_RESUBMIT, StopSignals


class Action(IntEnum):
    """What a rank wants to do before its next step. All ranks do what the largest value says."""

    CONTINUE = 0
    SAVE = 1
    SAVE_AND_RESUBMIT = 2  # a cluster's signal: the exit status asks for a restart
    SAVE_AND_STOP = 3  # Ctrl-C: the exit status asks for no restart


class ResumableTrainer(DistributedTrainer):
    """nnU-Net's trainer for long trainings: with ``--c`` it continues at the step at which it stopped.

    A subclass calls :meth:`between_steps` before every step, appends the loss of every training step to
    :attr:`epoch_losses`, and extends :meth:`state` and :meth:`restore` if its checkpoints need more.

    Attributes:
        epoch_losses: losses of the completed training steps of this epoch, including those before an interruption.
    """

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net records exactly this signature
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.logger.local_logger = PlotLogger()
        if self.ranks.rank == 0:
            run = Run(Path(self.output_folder), self.settings.as_dict(), self.continue_training)
            self.logger.loggers += make_loggers(self.settings.loggers, run, self.print_to_log_file)
        self.stop_signals = StopSignals()
        self.epoch_losses: list[float | Tensor] = []
        self._is_resumed = False
        self._has_lost_best = False
        self._last_save = time.monotonic()
        self._saved_random_states: list[dict[str, Any]] = []  # by rank, from the checkpoint
        self._run_id = uuid.uuid4().hex  # stays the same when the training is continued

    # ------------------------------------------------------------------ training loop

    @one_line_errors()
    def run_training(self) -> None:
        with self.stop_signals, self._errors_in_log():
            try:
                super().run_training()
                # The final validation, which comes next, does not look for signals.
                self._exit_if(self.ranks.largest(self._requested_action()))
            except UserError:
                raise
            except Exception:  # data loaders raise various errors when a signal ends their workers
                if self.stop_signals.received:
                    self.between_steps()
                raise

    @contextmanager
    def _errors_in_log(self) -> Iterator[None]:
        """Write a UserError to the log file too: nnU-Net has begun this file, and it should say why it ends."""
        try:
            yield
        except UserError as error:
            self.print_to_log_file(printable(f"error: {error}", limit=2000), also_print_to_console=False)
            raise

    def on_train_start(self) -> None:
        self.continue_training = self._is_resumed  # False with --c if there was no checkpoint yet
        super().on_train_start()
        self.stop_signals.report_dead_workers_at_next_batch()
        if self.ranks.rank < len(self._saved_random_states):
            set_random_state(self._saved_random_states[self.ranks.rank], self.device)
        else:
            seed_process(self.settings.seed, self.ranks.rank)
        self._saved_random_states = []  # their tensors would keep the file of the checkpoint open
        self._last_save = time.monotonic()
        if self.pretrained_weights is not None and not self.continue_training:
            # Save before the first step: with --c nnU-Net accepts no -pretrained_weights, so a training killed before
            # its first checkpoint would start again from random weights.
            self._last_save = -math.inf

    def on_train_epoch_start(self) -> None:
        if self._has_lost_best:
            self._has_lost_best = False
            self._save_between_steps(BEST)
        super().on_train_epoch_start()
        self.num_iterations_per_epoch = self.settings.iterations_per_epoch - len(self.epoch_losses)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """Log the mean loss of the whole epoch, including steps before an interruption."""
        super().on_train_epoch_end([{"loss": loss} for loss in self.losses_of_epoch().numpy()])

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        super().on_validation_epoch_end(val_outputs)
        self.epoch_losses = []

    def losses_of_epoch(self) -> Tensor:
        """Return the losses of this epoch's completed steps, (steps,) float32 on the CPU. Waits for the device."""
        if not self.epoch_losses:
            return torch.zeros(0)
        losses = [torch.as_tensor(loss, dtype=torch.float32, device=self.device) for loss in self.epoch_losses]
        return torch.stack(losses).cpu()

    def on_train_end(self) -> None:
        super().on_train_end()
        for name in ("preview.png", "progress.png"):
            self.log_picture(Path(self.output_folder) / name)
        for logger in self.logger.loggers:
            if isinstance(logger, ExtraLogger):
                logger.log_end()
        if self.ranks.rank == 0:
            (Path(self.output_folder) / PREVIOUS).unlink(missing_ok=True)  # nnU-Net deletes the latest one

    def log_picture(self, file: Path) -> None:
        """Pass a picture on to the loggers that take pictures; nnU-Net's own take numbers only."""
        for logger in self.logger.loggers:
            if isinstance(logger, ExtraLogger) and file.is_file():
                logger.log_picture(file, self.current_epoch)

    # ------------------------------------------------------------------ saving and stopping between steps

    def between_steps(self) -> None:
        """Save if a save is due; save and exit if a signal came. Every rank has to call this before every step."""
        action = self.ranks.largest(self._requested_action())
        if action == Action.CONTINUE:
            return
        self._save_between_steps(LATEST)
        self._exit_if(action)

    def _save_between_steps(self, name: str) -> None:
        # save_checkpoint records current_epoch + 1, the epoch to continue with, which is this epoch.
        self.current_epoch -= 1
        try:
            self.save_checkpoint(str(Path(self.output_folder) / name))
        finally:
            self.current_epoch += 1

    def _requested_action(self) -> Action:
        if self.stop_signals.by_ctrl_c:
            return Action.SAVE_AND_STOP
        if self.stop_signals.received:
            return Action.SAVE_AND_RESUBMIT
        return Action.SAVE if self._is_save_due() else Action.CONTINUE

    def _is_save_due(self) -> bool:
        if self.ranks.rank > 0 or self.disable_checkpointing:
            return False
        return time.monotonic() - self._last_save > 60 * self.settings.save_every_minutes

    def _exit_if(self, action: int) -> None:
        """Exit with the status of an action that the ranks agreed on; return if it is not an action that exits."""
        if action < Action.SAVE_AND_RESUBMIT:
            return
        status = EXIT_CTRL_C if action == Action.SAVE_AND_STOP else EXIT_RESUBMIT
        signal_name = self.stop_signals.received or "A signal to another rank"
        hint = "nothing is saved (--disable_checkpointing)" if self.disable_checkpointing else "continue with --c"
        self.print_to_log_file(f"{signal_name}: exit in epoch {self.current_epoch}, status {status}; {hint}")
        # Wait for rank 0 to write: when one process exits, torchrun ends the others.
        self.ranks.largest(Action.CONTINUE)
        # End the data workers now: Python would end them at exit, and nnU-Net's thread would report them as dead.
        self.dataloader_train = self.dataloader_val = None
        sys.exit(status)

    # ------------------------------------------------------------------ checkpoints: hooks for subclasses

    def random_state(self) -> dict[str, Any]:
        """Return the random state of this process that a resumed training starts with."""
        return get_random_state(self.device)

    def state(self) -> dict[str, Any]:
        """Return what to store in a checkpoint beside nnU-Net's entries; called on every rank, stored by rank 0."""
        losses = torch.stack(self.ranks.gather(self.losses_of_epoch())).mean(0)
        return {"losses": losses}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over the :meth:`state` of a checkpoint."""
        self.epoch_losses = [float(loss) for loss in state.get("losses", ())]

    def require_same_run(self, checkpoint: dict[str, Any], file: Path) -> None:
        """Raise UserError if the training must not continue from a checkpoint."""

    def amend_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Change or add entries of a checkpoint before it is written."""

    # ------------------------------------------------------------------ checkpoints: writing and reading

    def save_checkpoint(self, filename: str) -> None:
        """Write nnU-Net's checkpoint and our state durably; on a full disk, warn and keep the file that is there.

        Raises:
            UserError: the final checkpoint cannot be written.
        """
        random_states = self.ranks.gather(self.random_state())  # collective calls: every rank has to come here
        state = self.state()
        if self.ranks.rank > 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with io.BytesIO() as buffer:  # nnU-Net has no method that builds a checkpoint without writing it
            super().save_checkpoint(buffer)
            buffer.seek(0)
            checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)
        complete_epochs = checkpoint["current_epoch"]
        checkpoint["logging"] = {name: values[:complete_epochs] for name, values in checkpoint["logging"].items()}
        checkpoint[STATE] = {"run": self._run_id, "random_states": random_states, **state}
        self.amend_checkpoint(checkpoint)
        path = Path(filename)
        self._last_save = time.monotonic()  # also if writing fails: the next try is due after save_every_minutes
        with self.tolerate_write_failure(path, is_essential=path.name == FINAL):
            write_durably(checkpoint, path, previous=path.with_name(PREVIOUS) if path.name == LATEST else None)

    @contextmanager
    def tolerate_write_failure(self, file: Path, is_essential: bool = False) -> Iterator[None]:
        """Warn if a file cannot be written, for example because the disk is full, and continue training.

        Raises:
            UserError: the file could not be written and is essential.
        """
        try:
            yield
        except OSError as error:
            message = f"{file} was not written ({error})"
            if is_essential:
                raise UserError(
                    f"{message}; the earlier checkpoints are complete: free disk space and continue with --c"
                ) from error
            self.print_to_log_file(f"WARNING: {message}; the training continues")

    @one_line_errors()
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint; with ``--c``, the one of the folder that is furthest and not damaged.

        Raises:
            SystemExit: all checkpoints are damaged, or the training must not continue from this one.
        """
        file = Path(filename_or_checkpoint)
        # After training nnU-Net also loads the best checkpoint, for --val_best: that one is taken as it is.
        if self.continue_training and not self._is_resumed:
            newest = newest_undamaged(file, self.print_to_log_file) if self.ranks.rank == 0 else None
            file = self.ranks.broadcast_from_first(newest)
        with self._errors_in_log():
            checkpoint = read_checkpoint(file)
            self.require_same_run(checkpoint, file)
        super().load_checkpoint(str(file))
        self._restore_from(checkpoint)
        if self.continue_training:
            steps = f", {len(self.epoch_losses)} steps of it are complete" if self.epoch_losses else ""
            self.print_to_log_file(f"Continuing from {file.name}: epoch {self.current_epoch}{steps}")

    def _restore_from(self, checkpoint: dict[str, Any]) -> None:
        state = dict(checkpoint.get(STATE, {}))
        self._saved_random_states = state.pop("random_states", [])
        self._run_id = state.pop("run", self._run_id)
        self.restore(state)
        # nnU-Net writes checkpoint_latest before it compares the epoch with the best one so far, and writes that one.
        scores = self.logger.get_value("ema_fg_dice", step=None)
        self._best_ema = max(scores, default=None)
        self._is_resumed = True
        self.require_agreement("the checkpoint", (self._run_id, self.current_epoch, len(self.epoch_losses)))
        is_last_best = scores and scores[-1] > max(scores[:-1], default=-math.inf)
        if self.continue_training and is_last_best and not self.epoch_losses:
            self._has_lost_best = self.ranks.broadcast_from_first(self.ranks.rank == 0 and self._is_best_older())

    def _is_best_older(self) -> bool:
        """Return True if the best checkpoint is not that of the last complete epoch: a kill has prevented it."""
        file = Path(self.output_folder) / BEST
        if not file.is_file():
            return True
        best = read_checkpoint(file)
        return (best.get(STATE, {}).get("run"), best["current_epoch"]) != (self._run_id, self.current_epoch)
