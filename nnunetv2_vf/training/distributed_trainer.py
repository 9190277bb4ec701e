"""nnU-Net's trainer on any number of ranks: GPUs or CPUs, on one machine or several."""

from __future__ import annotations

import hashlib
import os
from typing import Any, Protocol

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.settings import TrainingSettings
from nnunetv2_vf.training.random_state import seeded_initialization
from nnunetv2_vf.training.ranks import Ranks


class WeightSource(Protocol):
    """Pretrained weights that fit the network."""

    def copy_into(self, network: nn.Module) -> None:
        """Copy all weights but the heads' into the network."""
        ...


class DistributedTrainer(nnUNetTrainer):
    """nnU-Net's trainer, whose ranks may be CPUs and may be spread over several machines.

    nnU-Net uses the rank among all processes as the number of a GPU of this machine. Here, every rank gets a GPU of its
    own machine. A subclass sets :attr:`settings` and :attr:`pretrained_weights` before it calls ``super().__init__``.
    """

    settings: TrainingSettings
    pretrained_weights: WeightSource | None = None
    continue_training: bool  # nnU-Net's flag --c
    # Attributes of nnUNetTrainer, which has no types.
    is_ddp: bool
    network: nn.Module
    loss: Any
    dataloader_train: Any
    dataloader_val: Any
    grad_scaler: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net records exactly this signature
    ):
        self.continue_training = bool(plans.get("continue_training"))  # nnU-Net stores its flag --c in the plans
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.ranks = Ranks.current()
        self.device = self.ranks.own_device(device)
        if self.device.type == "cpu" and self.is_ddp:
            self.grad_scaler = None
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.ranks.local_size))
        self.settings.apply_schedule(self)
        self.require_agreement("the settings", self.settings.as_dict())

    @one_line_errors()
    def initialize(self) -> None:
        """Build network, optimiser and loss as nnU-Net does, then make them parallel.

        nnU-Net wraps the network and loads pretrained weights with the rank among all machines as the number of the
        GPU, which is wrong on several machines. So nnU-Net's method runs as if there were one rank; then this method
        loads the weights and wraps the network.
        """
        is_ddp, self.is_ddp = self.is_ddp, False
        with seeded_initialization(self.settings.seed):
            super().initialize()
        self.is_ddp = is_ddp
        if is_ddp:
            if self.pretrained_weights is not None and not self.continue_training:
                self.pretrained_weights.copy_into(self.network)
            self._make_parallel()

    def _make_parallel(self) -> None:
        self._set_batch_size_and_oversample()
        self.network = self.ranks.wrap_in_ddp(self.network, self.device)
        self.loss = self._build_loss()  # its Dice is now computed over all ranks

    def _build_loss(self) -> Any:
        """Return nnU-Net's loss, with the weights of deep supervision that a single rank has.

        Under DDP nnU-Net gives the lowest resolution a small weight instead of none, so that each parameter has a
        gradient. Our DDP accepts parameters without a gradient (find_unused_parameters).
        """
        loss: Any = super()._build_loss()
        if self.is_ddp and self.enable_deep_supervision:
            weights = np.array([*loss.weight_factors[:-1], 0.0])
            loss.weight_factors = tuple(weights / weights.sum())
        return loss

    def _set_batch_size_and_oversample(self) -> None:
        ranks, batch = self.ranks.size, self.configuration_manager.batch_size
        # With batch_dice nnU-Net's loss gathers one tensor per rank, all of the same shape.
        is_uneven = batch % ranks > 0 and self.configuration_manager.batch_dice
        if self.is_ddp and (ranks > batch or is_uneven):
            legal = f"a number of ranks that divides {batch}" if is_uneven else f"at most {batch} ranks"
            raise UserError(f"{ranks} ranks cannot share the plans' batch of {batch}; legal: {legal}")
        super()._set_batch_size_and_oversample()

    def do_split(self) -> tuple[list[str], list[str]]:
        """Return the fold's training and validation cases; the first rank writes the split if there is none yet."""
        with self.ranks.rank_0_first():
            split: tuple[list[str], list[str]] = super().do_split()
        return split

    def require_agreement(self, name: str, value: Any) -> None:
        """Raise UserError if a value differs between ranks, for example because machines have other variables."""
        values = self.ranks.gather(value)
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            raise UserError(
                f"rank {different[0]} differs from rank 0 in {name}: {values[different[0]]} and {values[0]}; all ranks "
                "need the same nnUNet_vf_ variables, and nnUNet_results on a file system that they share"
            )

    def bare_network(self) -> nn.Module:
        """Return the network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.is_ddp:
            batch = " + ".join(map(str, self.ranks.gather(self.batch_size)))
            self.print_to_log_file(
                f"{self.ranks.size} ranks, {self.ranks.local_size} on this machine: a batch of {batch} samples; the "
                f"learning rate is not scaled: {self.initial_lr:g}\n",
                add_timestamp=False,
            )

    def on_train_end(self) -> None:
        if self.ranks.size > 1 and len(set(self.ranks.gather(weights_digest(self.network)))) > 1:
            self.print_to_log_file("WARNING: the weights differ between ranks; those of rank 0 are kept")
        super().on_train_end()

    def print_to_log_file(self, *args: object, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """Write to rank 0's log, as nnU-Net does; print warnings of the other ranks on the console."""
        if self.local_rank == 0:  # nnU-Net's name for the rank among all
            super().print_to_log_file(*args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)
        elif str(args[0]).startswith("WARNING"):
            print(f"rank {self.local_rank}:", *args)


def weights_digest(network: nn.Module) -> str:
    """Return a hash of all parameters, equal for bit-identical weights only."""
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
