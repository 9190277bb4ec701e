"""The processes that share a training: which one this is, its device, and what they tell one another.

What is told goes over gloo, from CPU to CPU, whatever the gradients go over: no GPU is waited for.
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

_LOOK_AGAIN = 0.05  # seconds


def join(backend: str, **kwargs: Any) -> None:
    """Make the default process group of the ranks that torchrun started, all together, this time.

    Where one of them dies torchrun starts all again, but keeps the store in which they find one another (torch 2.14),
    with the addresses of the dead; who is faster than the one who overwrites them takes those, and fails or hangs.

    Args:
        kwargs: of torch's init_process_group.
    """
    store, rank, size = next(dist.rendezvous("env://", timeout=default_pg_timeout))
    dist.init_process_group(backend, store=this_start(store, rank, size), rank=rank, world_size=size, **kwargs)


def this_start(store: dist.Store, rank: int, size: int, timeout: timedelta = default_pg_timeout) -> dist.Store:
    """A part of the store that no former start of these ranks has written to; all of them have to call this.

    Every rank draws a name, and rank 0 answers with the names of the others: who finds a name in the answer that it has
    just drawn knows that the answer is of this start.

    Raises:
        TimeoutError: some of the ranks have not come.
    """
    name = uuid.uuid4().hex
    if rank == 0:
        part = f"start_{name}"
        _answer(store, part, size, timeout)
    else:
        part = _ask(store, rank, name, timeout)
    return dist.PrefixStore(part, store)


def _answer(store: dist.Store, part: str, size: int, timeout: timedelta) -> None:
    missing = list(range(1, size))
    for _ in _until(timeout, missing):
        names = [store.get(f"name_of_{rank}").decode() for rank in missing if store.check([f"name_of_{rank}"])]
        store.set("answer", json.dumps([part, *names]))
        missing[:] = [rank for rank in missing if not store.check([f"{part}/heard_by_{rank}"])]


def _ask(store: dist.Store, rank: int, name: str, timeout: timedelta) -> str:
    store.set(f"name_of_{rank}", name)
    missing = [0]
    for _ in _until(timeout, missing):
        part, *names = json.loads(store.get("answer")) if store.check(["answer"]) else [""]
        if name in names:
            missing.clear()
    store.set(f"{part}/heard_by_{rank}", "")
    return str(part)


def _until(timeout: timedelta, missing: list[int]) -> Iterator[None]:
    """Yield now and then, until none are missing."""
    end = time.monotonic() + timeout.total_seconds()
    while missing:
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout} for ranks {missing}")
        yield
        time.sleep(_LOOK_AGAIN)


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
