"""The random state of a process, so that a resumed training draws the numbers that it would have drawn anyway.

Dropout draws from torch's generator; nnU-Net's augmentation draws from NumPy's and Python's where it has no workers.
Volume Fusion's own samples need none of these: each is a function of the seed and its index.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def seeded_initialization(seed: int) -> Iterator[None]:
    """Draw initial weights from this seed; the random state of the process is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def seed_process(seed: int, rank: int) -> None:
    """Seed the generators of this process, differently on every rank."""
    number = int(np.random.SeedSequence((seed, rank)).generate_state(1)[0])
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002
    random.seed(number)


def get_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of all generators of this process, and of its GPU."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    # A list, not an array: torch.load(weights_only=True) refuses arrays.
    numpy_state = (legacy[0], legacy[1].tolist(), *legacy[2:])
    state = {"torch": torch.get_rng_state(), "numpy": numpy_state, "python": random.getstate()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set all generators of this process to a state that :func:`get_random_state` returned."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
