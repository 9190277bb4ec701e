"""Monitoring of a long training: non-finite steps, unusable cases, speed and time spent waiting for data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError

_STEPS_BETWEEN_CHECKS = 20  # a check waits for the device
_MAX_SKIPPED_IN_A_ROW = 20


class NotFiniteError(Exception):
    """Too many training steps in a row had a loss or gradient that is not finite.

    Attributes:
        steps: their numbers, counted from the start of the training.
    """

    def __init__(self, steps: list[int]):
        super().__init__(f"{len(steps)} steps in a row without a finite gradient")
        self.steps = steps


class StepMonitor:
    """Counts the training steps that were skipped because their gradient was not finite.

    It checks many steps at once, so that single steps need not wait for the device. A skipped step leaves the weights
    as they are but may put NaN into the running statistics of batch norms: those are set back to their last finite
    values.

    Attributes:
        skipped: how many steps of the whole training were skipped.
        in_a_row: the numbers of the last steps if all of them were skipped.
    """

    def __init__(self, network: nn.Module):
        self.skipped = 0
        self.in_a_row: list[int] = []
        self._unchecked: list[tuple[int, Tensor]] = []
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._finite_statistics = [buffer.clone() for buffer in self._statistics]

    def add(self, step: int, is_finite: Tensor) -> None:
        """Record a step. ``is_finite`` is a scalar on the device: True if the step was taken.

        Raises:
            NotFiniteError: 20 steps in a row were skipped.
        """
        self._unchecked.append((step, is_finite))
        if self.in_a_row or len(self._unchecked) >= _STEPS_BETWEEN_CHECKS:
            self.check()

    def check(self) -> None:
        """Count the skipped ones among the steps since the last check; raises as :meth:`add`."""
        if not self._unchecked:
            return
        steps, flags = zip(*self._unchecked, strict=True)
        self._unchecked.clear()
        for step, is_finite in zip(steps, torch.stack(flags).tolist(), strict=True):
            if is_finite:
                self.in_a_row.clear()
            else:
                self.skipped += 1
                self.in_a_row.append(step)
        self._repair_statistics()
        if len(self.in_a_row) >= _MAX_SKIPPED_IN_A_ROW:
            raise NotFiniteError(self.in_a_row)

    def restore(self, skipped: int, in_a_row: list[int]) -> None:
        """Take over the counts of a checkpoint. Its weights must already be loaded into the network."""
        self.skipped, self.in_a_row = skipped, list(in_a_row)
        self._finite_statistics = [buffer.clone() for buffer in self._statistics]

    def _repair_statistics(self) -> None:
        for current, finite in zip(self._statistics, self._finite_statistics, strict=True):
            current.copy_(torch.where(current.isfinite(), current, finite))
            finite.copy_(current)


class Quarantine:
    """Cases that cannot be used, each with the reason. Training draws other cases instead.

    Args:
        limit: the largest share of a dataset's cases that may be in quarantine.
        file: gets the list of cases if they exceed the limit.
    """

    def __init__(self, limit: float, file: Path):
        self.cases: dict[str, str] = {}
        self.limit = limit
        self.file = file

    def add(self, reasons: Mapping[str, str]) -> list[str]:
        """Add cases, given as case -> reason. Return a line for the log for each new case."""
        new = {case: reason for case, reason in reasons.items() if case not in self.cases}
        self.cases.update(new)
        return [f"WARNING: case {case} {reason}; quarantined, other cases are used" for case, reason in new.items()]

    def require_below_limit(self, num_cases: int) -> None:
        """Raise UserError, and write the list, if too many of a dataset's cases are in quarantine."""
        if len(self.cases) > self.limit * num_cases:
            reasons = "; ".join(f"{case} {reason}" for case, reason in sorted(self.cases.items()))
            self.file.write_text(json.dumps(self.cases, indent=1, sort_keys=True))
            raise UserError(
                f"{len(self.cases)} of {num_cases} cases cannot be used, more than {self.limit:.0%}; repair the cases "
                f"listed in {self.file} and preprocess again, or raise the limit "
                f"(nnUNet_vf_quarantine_limit=0.5): {reasons}"
            )


class DataWaitTimer(Iterator[Any]):
    """An iterator over batches that measures how long the device waits for them.

    Args:
        is_device_idle: time counts only if this returns True after a batch has come: a busy device lost no time.

    Attributes:
        seconds: an upper bound, since the device may have become idle only during the wait.
    """

    def __init__(self, batches: Iterable[Any], is_device_idle: Callable[[], bool] = lambda: True):
        self._batches = iter(batches)
        self._is_device_idle = is_device_idle
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
        """Return the values that ``progress.png`` shows; NaN if unknown.

        Args:
            samples: the number of training samples in this time.
            seconds_waited: how long the device waited for data.
        """
        seconds = time.monotonic() - self._start
        memory = torch.cuda.max_memory_allocated(self._device) / 2**30 if self._device.type == "cuda" else float("nan")
        return {
            "samples_per_second": samples / seconds if samples else float("nan"),
            "data_wait_share": seconds_waited / seconds if samples else float("nan"),
            "gpu_memory_gb": memory,
        }
