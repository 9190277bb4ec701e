"""Count training steps with a non-finite gradient, repair what they damage, and stop after too many in a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        in_a_row: the numbers of the skipped steps since the last step that was taken.
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
        """Count the skipped steps since the last check.

        Raises:
            NotFiniteError: only where :meth:`add` calls it; other calls find fewer than 20 skipped steps in a row.
        """
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
