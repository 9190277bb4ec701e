"""How the ranks of a training find one another."""

from __future__ import annotations

import json
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from nnunetv2_vf.training.ranks import store_of_this_start

A_WHILE = timedelta(seconds=20)


def start(store: dist.Store, size: int, slowest: int) -> list[str]:
    """The word that every rank hears from rank 0, where one of them comes last."""
    heard = [""] * size

    def come(rank: int) -> None:
        time.sleep(0.2 * (rank == slowest))
        own = store_of_this_start(store, rank, size, A_WHILE)
        if rank == 0:
            own.set("word", f"of the start in which {slowest} was the slowest")
        heard[rank] = own.get("word").decode()

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return heard


@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_rank_takes_the_word_of_a_former_start(size):
    """torchrun keeps its store when it restarts: what dead ranks wrote is still there."""
    store = dist.HashStore()
    for slowest in [*range(size), *range(size)]:
        assert start(store, size, slowest) == [f"of the start in which {slowest} was the slowest"] * size


def test_what_is_left_of_a_start_that_was_broken_off_is_no_answer():
    store = dist.HashStore()
    store.set("answer", json.dumps(["start_of_the_dead", "their name"]))
    store.set("name_of_1", "their name")
    assert start(store, 2, slowest=0) == ["of the start in which 0 was the slowest"] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named(rank):
    with pytest.raises(TimeoutError, match=rf"waited .* for ranks \[{1 - rank}\]"):
        store_of_this_start(dist.HashStore(), rank, 2, timedelta(seconds=0.1))
