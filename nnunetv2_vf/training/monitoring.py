"""Monitoring of speed: samples per second, GPU memory, time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


class DataWaitTimer(Iterator[Any]):
    """An iterator over batches that measures how long the device waits for them.

    Args:
        is_device_idle: the wait counts only if this returns True when the batch arrives; otherwise the device was still
            busy and lost no time.

    Attributes:
        seconds: an upper bound, since the device may have become idle only during the wait.
    """

    def __init__(self, batches: Iterable[Any], is_device_idle: Callable[[], bool] = lambda: True):
        self._batches = iter(batches)
        self._is_device_idle = is_device_idle
        self.seconds = 0.0

    def reset(self) -> None:
        """Start to count from 0."""
        self.seconds = 0.0

    def __next__(self) -> Any:
        start = time.monotonic()
        try:
            return next(self._batches)
        finally:
            if self._is_device_idle():
                self.seconds += time.monotonic() - start


class EpochMeter:
    """Measures the speed and the GPU memory of an epoch, which starts when the meter is made."""

    def __init__(self, device: torch.device):
        self._device = device
        self._start = time.monotonic()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def measure(self, samples: int, seconds_waited: float) -> dict[str, float]:
        """Return values by their names in :data:`.progress_plot.MONITORED`; NaN if unknown.

        Args:
            samples: training samples of the epoch, on all ranks together.
            seconds_waited: how long the device waited for data.
        """
        seconds = time.monotonic() - self._start
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else float("nan")
        return {
            "samples_per_second": samples / seconds if samples else float("nan"),
            "data_wait_share": seconds_waited / seconds if samples else float("nan"),
            "gpu_memory_gb": memory,
        }
