"""nnU-Net's trainer for trainings of weeks: on several machines, under a cluster's time limits, on disks that fill up.

What both our trainers have beside their task. The seams are nnU-Net's own methods and attributes.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_vf.durable_files import write_durably
from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.settings import ScheduleSettings
from nnunetv2_vf.training.checkpoints import FINAL, LATEST, PREVIOUS, STATE, newest_whole, read_checkpoint
from nnunetv2_vf.training.progress_plot import SparingLogger
from nnunetv2_vf.training.ranks import Ranks
from nnunetv2_vf.training.signals import EXIT_STATUS, STOPPED, Interruption

_GO_ON, _SAVE, _LEAVE, _STOP = range(4)  # what a rank wishes before a step; the largest wish counts


class WeightSource(Protocol):
    """Pretrained weights that fit the network."""

    def copy_into(self, network: nn.Module) -> None: ...


class ResumableTrainer(nnUNetTrainer):
    """Ranks on any number of machines; checkpoints that are whole or not there; signals and Ctrl-C save and leave.

    A subclass sets :attr:`settings` and :attr:`pretrained_weights` before it calls ``super().__init__``, and calls
    :meth:`between_steps` before every step. In its checkpoints it keeps :meth:`state`, and gets it back by
    :meth:`restore`.
    """

    settings: ScheduleSettings
    pretrained_weights: WeightSource | None = None  # that the training starts from
    # nnU-Net's
    is_ddp: bool
    network: nn.Module
    loss: Any
    grad_scaler: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net records exactly this signature
    ):
        self._continues = bool(plans.get("continue_training"))  # nnU-Net puts its flag --c here
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.ranks = Ranks.current()
        self.device = self.ranks.device(device)
        if self.device.type == "cpu" and self.is_ddp:
            # nnU-Net takes every rank for a GPU, and all cores for one rank's
            self.grad_scaler = None
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.ranks.local_size))
        self.logger.local_logger = SparingLogger()
        self.settings.apply_schedule(self)
        self.interruption = Interruption()
        self._saved_at = time.monotonic()
        self._random_states: list[dict[str, Any]] = []  # of a checkpoint, by rank
        self._run = uuid.uuid4().hex  # stays the same when the training is continued
        self._resumed = False
        self._require_agreement("the settings", self.settings.as_dict())

    def print_to_log_file(self, *args: object, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """As nnU-Net's; of the other ranks only the warnings, on the console."""
        if self.local_rank == 0:  # nnU-Net's name for the rank among all
            super().print_to_log_file(*args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)
        elif str(args[0]).startswith("WARNING"):
            print(f"rank {self.local_rank}:", *args)

    # ------------------------------------------------------------------ ranks

    @one_line_errors()
    def initialize(self) -> None:
        """As nnU-Net's, which would take a rank among all machines for the number of a GPU, and CPUs for GPUs.

        So it would where it loads pretrained weights, too: among ranks that happens here.
        """
        distributed, self.is_ddp = self.is_ddp, False
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.settings.seed)
            super().initialize()
        self.is_ddp = distributed
        if distributed:
            if self.pretrained_weights is not None and not self._continues:
                self.pretrained_weights.copy_into(self.network)
            self._set_batch_size_and_oversample()
            self.network = self.ranks.parallel(self.network, self.device)
            alone, self.loss = self.loss, self._build_loss()  # whose Dice is of all ranks
            if self.enable_deep_supervision:
                # for DDP's sake nnU-Net gives the lowest resolution, which has none, a small weight: not needed here
                self.loss.weight_factors = alone.weight_factors

    def _set_batch_size_and_oversample(self) -> None:
        ranks, batch = self.ranks.size, self.configuration_manager.batch_size
        uneven = batch % ranks > 0 and self.configuration_manager.batch_dice  # nnU-Net's loss gathers parts of one size
        if self.is_ddp and (ranks > batch or uneven):
            raise UserError(f"{ranks} ranks cannot share the plans' batch of {batch}; legal: a number that divides it")
        super()._set_batch_size_and_oversample()

    def do_split(self) -> tuple[list[str], list[str]]:
        with self.ranks.first_goes_first():  # it writes the splits if there are none
            split: tuple[list[str], list[str]] = super().do_split()
        return split

    def _require_agreement(self, what: str, mine: Any) -> None:
        """Raise UserError if the ranks differ in something: on a machine whose environment or folders are others."""
        theirs = self.ranks.gather(mine)
        different = [rank for rank, value in enumerate(theirs) if value != theirs[0]]
        if different:
            raise UserError(
                f"rank {different[0]} differs from rank 0 in {what}: {theirs[different[0]]} and {theirs[0]}; all need "
                "the same nnUNet_vf_ variables, and nnUNet_results on a file system that they share"
            )

    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    # ------------------------------------------------------------------ a training that can be left at any step

    @one_line_errors()
    def run_training(self) -> None:
        with self.interruption:
            try:
                super().run_training()
                self._leave(
                    self.ranks.agree(self._requested_action())
                )  # the validation that follows would not hear of it
            except Exception:  # there is no telling what a loader makes of its workers' death
                if self.interruption.received:  # the workers have received it too
                    self.between_steps()
                raise

    def on_train_start(self) -> None:
        super().on_train_start()
        self.interruption.defer_the_death_of_workers()
        if self.is_ddp:
            parts = " + ".join(map(str, self.ranks.gather(self.batch_size)))
            self.print_to_log_file(
                f"{self.ranks.size} ranks, {self.ranks.local_size} on this machine: a batch of {parts} samples; the "
                f"learning rate stays what it is set to, {self.initial_lr:g}\n",
                add_timestamp=False,
            )
        if self.ranks.rank < len(self._random_states):
            _set_random_state(self._random_states[self.ranks.rank], self.device)
        else:
            _seed(self.settings.seed, self.ranks.rank)
        self._saved_at = time.monotonic()
        if self.pretrained_weights is not None and not self._continues:
            self._saved_at = -math.inf  # --c, which cannot be given weights, would begin without them

    def between_steps(self) -> None:
        """Save when it is time to, save and leave when a signal says so; all ranks alike, before every step."""
        agreed = self.ranks.agree(self._requested_action() or (_SAVE if self._save_is_due() else _GO_ON))
        if agreed == _GO_ON:
            return
        # nnU-Net records the epoch that comes next, which is this one: see its on_train_end
        self.current_epoch -= 1
        self.save_checkpoint(str(Path(self.output_folder) / LATEST))
        self.current_epoch += 1
        self._leave(agreed)

    def _requested_action(self) -> int:
        if not self.interruption.received:
            return _GO_ON
        return _STOP if self.interruption.by_ctrl_c else _LEAVE

    def _leave(self, agreed: int) -> None:
        """If the ranks have agreed to."""
        if agreed < _LEAVE:
            return
        status = STOPPED if agreed == _STOP else EXIT_STATUS
        why = self.interruption.received or "A signal to another rank"
        how = "nothing is saved, as you asked for" if self.disable_checkpointing else "--c goes on"
        self.print_to_log_file(f"{why}: leaving in epoch {self.current_epoch}, exit status {status}; {how}")
        self.ranks.agree(_GO_ON)  # the first to go may take the others along: not before rank 0 has written
        sys.exit(status)

    def _save_is_due(self) -> bool:
        if self.ranks.rank > 0 or self.disable_checkpointing:
            return False
        return time.monotonic() - self._saved_at > 60 * self.settings.save_every_minutes

    def on_train_end(self) -> None:
        if self.ranks.size > 1 and len(set(self.ranks.gather(fingerprint(self.network)))) > 1:
            self.print_to_log_file("WARNING: the weights of the ranks have drifted apart; rank 0's are kept")
        super().on_train_end()
        if self.ranks.rank == 0:
            (Path(self.output_folder) / PREVIOUS).unlink(missing_ok=True)  # as nnU-Net does with the latest

    # ------------------------------------------------------------------ checkpoints

    def random_state(self) -> dict[str, Any]:
        """The random numbers of this process that a continued training begins with."""
        return current_random_state(self.device)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside what nnU-Net keeps; called on every rank, kept of the first."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's :meth:`state`."""

    def accept(self, checkpoint: dict[str, Any], file: Path) -> None:
        """Raise UserError if training must not go on from a checkpoint."""

    def complete(self, checkpoint: dict[str, Any]) -> None:
        """Change or add entries of a checkpoint that is about to be written."""

    def save_checkpoint(self, filename: str) -> None:
        """As nnU-Net's, durably; in a training that goes on, a disk that is full is reported and nothing is lost."""
        states = self.ranks.gather(self.random_state())  # of every rank, so every rank has to come here
        state = self.state()
        if self.ranks.rank > 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with io.BytesIO() as file:  # nnU-Net makes and writes a checkpoint in one go
            super().save_checkpoint(file)
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        complete_epochs = checkpoint["current_epoch"]
        checkpoint["logging"] = {name: values[:complete_epochs] for name, values in checkpoint["logging"].items()}
        checkpoint[STATE] = {"run": self._run, "random_states": states, **state}
        self.complete(checkpoint)
        path = Path(filename)
        with self.tolerate_write_failure(path, unless=path.name == FINAL):
            write_durably(checkpoint, path, previous=path.with_name(PREVIOUS) if path.name == LATEST else None)
            self._saved_at = time.monotonic()

    @contextmanager
    def tolerate_write_failure(self, file: Path, unless: bool = False) -> Iterator[None]:
        """A file that cannot be written (the disk is full) is no reason to end; but ``unless``."""
        try:
            yield
        except OSError as error:
            what = f"{file} was not written ({error})"
            if unless:
                raise UserError(f"{what}; the checkpoints before it are whole: make room and go on with --c") from error
            self.print_to_log_file(f"WARNING: {what}; what was there before is left as it was")
            self._saved_at = time.monotonic()  # not again before the next step

    @one_line_errors()
    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """As nnU-Net's; with ``--c``, from the furthest checkpoint of the folder that is not damaged.

        Raises:
            SystemExit: all are damaged, or it was not accepted.
        """
        file = Path(filename_or_checkpoint)
        if self._continues and not self._resumed:  # nnU-Net loads the best one too, after training, for --val_best
            mine = newest_whole(file, self.print_to_log_file) if self.ranks.rank == 0 else None
            file = self.ranks.from_first(mine)
        checkpoint = read_checkpoint(file)
        self.accept(checkpoint, file)
        super().load_checkpoint(str(file))
        state = dict(checkpoint.get(STATE, {}))
        self._random_states = state.pop("random_states", [])
        self._run = state.pop("run", self._run)
        self.restore(state)
        # nnU-Net writes checkpoint_latest before it compares the epoch with the best one so far
        self._best_ema = max(self.logger.get_value("ema_fg_dice", step=None), default=None)
        self._resumed = True
        steps = len(state.get("losses", ()))
        self._require_agreement("the checkpoint", (self._run, self.current_epoch, steps))
        if self._continues:
            within = f", {steps} steps of which are done" if steps else ""
            self.print_to_log_file(f"Going on from {file.name}: epoch {self.current_epoch}{within}")


def fingerprint(network: nn.Module) -> str:
    """The same for the same weights, bit by bit."""
    found = hashlib.sha256()
    for parameter in network.parameters():
        found.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _seed(seed: int, rank: int) -> None:
    """Of what dropout draws from, and, where no workers do it, nnU-Net's augmentation: the states of this process."""
    number = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def current_random_state(device: torch.device) -> dict[str, Any]:
    """Of this process: dropout takes its numbers from torch's, nnU-Net's augmentation from NumPy's and Python's."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    numpy_state = (legacy[0], legacy[1].tolist(), *legacy[2:])  # with an array a checkpoint would not load safely
    state = {"torch": torch.get_rng_state(), "numpy": numpy_state, "python": random.getstate()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
