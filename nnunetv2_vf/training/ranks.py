"""The processes (ranks) of one distributed training: this one's number and device, and messages between them.

Messages use gloo, from CPU to CPU, whatever backend the gradients use: they wait for no GPU.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel

_POLL_SECONDS = 0.05


def join_process_group(backend: str, **kwargs: Any) -> None:
    """Create the default process group of the ranks that torchrun started.

    If a rank dies, torchrun restarts all of them, but keeps the store in which they find one another (torch 2.14). The
    store then still holds the addresses of the dead ranks, and a fast rank that reads those fails or hangs. So each
    start uses its own part of the store.

    Args:
        kwargs: further arguments of torch's init_process_group.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=default_pg_timeout))
    store = store_of_this_start(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, **kwargs)


def store_of_this_start(store: dist.Store, rank: int, size: int, timeout: timedelta = default_pg_timeout) -> dist.Store:
    """Return a part of the store that no earlier start of these ranks has written to. Every rank has to call this.

    Each rank writes a new random name, and rank 0 publishes the names that it read together with the part to use. A
    rank that finds its own new name in the publication knows that it belongs to this start.

    Raises:
        TimeoutError: some of the ranks did not come.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        part = f"start_{name}"
        _publish_part(store, part, size, timeout)
    else:
        part = _find_part(store, rank, name, timeout)
    return dist.PrefixStore(part, store)


def _publish_part(store: dist.Store, part: str, size: int, timeout: timedelta) -> None:
    missing = list(range(1, size))
    for _ in _poll(timeout, missing):
        names = [store.get(f"name_of_{rank}").decode() for rank in missing if store.check([f"name_of_{rank}"])]
        store.set("publication", json.dumps([part, *names]))
        missing[:] = [rank for rank in missing if not store.check([f"{part}/found_by_{rank}"])]


def _find_part(store: dist.Store, rank: int, name: str, timeout: timedelta) -> str:
    store.set(f"name_of_{rank}", name)
    missing = [0]
    for _ in _poll(timeout, missing):
        part, *names = json.loads(store.get("publication")) if store.check(["publication"]) else [""]
        if name in names:
            missing.clear()
    store.set(f"{part}/found_by_{rank}", "")
    return str(part)


def _poll(timeout: timedelta, missing: list[int]) -> Iterator[None]:
    """Yield repeatedly until the list of missing ranks is empty; the caller removes those that have come.

    Raises:
        TimeoutError: it is not empty in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} for ranks {missing}")
        yield
        time.sleep(_POLL_SECONDS)


@dataclass(frozen=True)
class Ranks:
    """This process among the processes of its training.

    Attributes:
        rank, size: this process's number, and how many there are, on all machines.
        local_rank, local_size: the same on this machine.
        group: the process group for messages; None if this process is the only one.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: Any = None

    @classmethod
    def current(cls) -> Ranks:
        """Return this process's place in torch's default process group.

        Every rank has to call this, once: it creates a process group.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        rank, size = dist.get_rank(), dist.get_world_size()
        # torchrun sets these variables. nnU-Net's -num_gpus does not: its ranks are all on one machine.
        local_rank = int(os.environ.get("LOCAL_RANK", rank))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        return cls(rank, size, local_rank, local_size, dist.new_group(backend="gloo"))

    def own_device(self, device: torch.device) -> torch.device:
        """Return this rank's own GPU for "cuda", else the device itself."""
        return torch.device(device.type, self.local_rank) if device.type == "cuda" else device

    def wrap_in_ddp(self, network: nn.Module, device: torch.device) -> nn.Module:
        """Wrap a network to average gradients over all ranks; on GPUs, batch norms then use the whole batch."""
        device_ids = None
        if device.type == "cuda":  # torch has no synchronised batch norm for CPUs
            network, device_ids = nn.SyncBatchNorm.convert_sync_batchnorm(network), [device.index]
        # An output without weight in the loss leaves its parameters without a gradient.
        return DistributedDataParallel(network, device_ids=device_ids, find_unused_parameters=True)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, ordered by rank. Every rank has to call this."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast_from_first(self, value: Any) -> Any:
        """Return the first rank's value. Every rank has to call this."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def largest(self, number: int) -> int:
        """Return the largest number of all ranks. Every rank has to call this equally often."""
        if self.group is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    @contextmanager
    def rank_0_first(self) -> Iterator[None]:
        """Let rank 0 finish the context before the others enter it: it writes files that they read."""
        if self.group is not None and self.rank > 0:
            dist.barrier(self.group)
        yield
        if self.group is not None and self.rank == 0:
            dist.barrier(self.group)
