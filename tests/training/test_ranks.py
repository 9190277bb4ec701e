"""How the ranks of one start of a training find one another."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from nnunetv2_vf.training.ranks import store_of_this_start

TIMEOUT = timedelta(seconds=20)


def start(store: dist.Store, size: int, slowest: int) -> list[str]:
    """Return the value that every rank reads from rank 0, if one of the ranks arrives last."""
    received = [""] * size

    def arrive(rank: int) -> None:
        time.sleep(0.2 * (rank == slowest))
        own_store = store_of_this_start(store, rank, size, TIMEOUT)
        if rank == 0:
            own_store.set("value", f"slowest: {slowest}")
        received[rank] = own_store.get("value").decode()

    ranks = [threading.Thread(target=arrive, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return received


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_rank_reads_a_value_of_an_earlier_start(size):
    """torchrun keeps its store when it restarts the ranks: values of dead ranks are still in it."""
    store = dist.HashStore()
    for slowest in [*range(size), *range(size)]:
        assert start(store, size, slowest) == [f"slowest: {slowest}"] * size


def test_the_remains_of_an_aborted_start_are_ignored():
    store = dist.HashStore()
    store.set("publication", json.dumps(["start_of_the_dead", "their name"]))
    store.set("name_of_1", "their name")
    assert start(store, 2, slowest=0) == ["slowest: 0"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_ranks_are_named(rank):
    with pytest.raises(TimeoutError, match=rf"waited .* for ranks \[{1 - rank}\]"):
        store_of_this_start(dist.HashStore(), rank, 2, timedelta(seconds=0.1))
