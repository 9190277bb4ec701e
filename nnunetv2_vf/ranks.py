"""The processes that share a training: which one this is, its device, and what they tell one another.

What is told goes over gloo, from CPU to CPU, whatever the gradients go over: no GPU is waited for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among those of its training.

    Attributes:
        rank, size: among all.
        local_rank, local_size: among those of its machine.
        group: over which they talk; None where there is but one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None

    @classmethod
    def current(cls) -> Ranks:
        """Of the default process group; every one of its processes has to call this. Alone where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        # torchrun sets these; without them it is nnU-Net's -num_gpus, whose ranks are all on one machine
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return cls(rank, size, local_rank, local_size, dist.new_group(backend="gloo"))

    def device(self, device: torch.device) -> torch.device:
        """This rank's own, where each has one."""
        return torch.device(device.type, self.local_rank) if device.type == "cuda" else device

    def parallel(self, network: nn.Module, device: torch.device) -> nn.Module:
        """The network with gradients averaged over the ranks and, on GPUs, batch norms over all of the batch."""
        devices = None
        if device.type == "cuda":  # torch has no such batch norm for CPUs
            network, devices = nn.SyncBatchNorm.convert_sync_batchnorm(network), [device.index]
        # some parameters get no gradient: those of an output that has no weight in the loss
        return DistributedDataParallel(network, device_ids=devices, find_unused_parameters=True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def from_first(self, value: Any) -> Any:
        """The first rank's value."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def agree(self, wish: int) -> int:
        """The largest of all ranks' wishes; every rank has to ask as often as the others."""
        if self.group is None:
            return wish
        wishes = torch.tensor(wish)
        dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self.group)
        return int(wishes)

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The first rank does what is within before the others do: it writes the files that they read."""
        if self.group is not None and self.rank > 0:
            dist.barrier(self.group)
        yield
        if self.group is not None and self.rank == 0:
            dist.barrier(self.group)
