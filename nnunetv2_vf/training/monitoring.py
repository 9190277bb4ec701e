"""What a training of weeks is watched for: steps without a finite gradient, unusable cases, waiting for data."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_vf.errors import UserError

_STEPS_BETWEEN_LOOKS = 20  # a look waits for the device
_STEPS_IN_A_ROW = 20


class NotFiniteError(Exception):
    """So many steps in a row had a loss or a gradient that is not finite.

    Attributes:
        steps: their numbers, counted from the start of the training.
    """

    def __init__(self, steps: list[int]):
        super().__init__(f"{len(steps)} steps in a row without a finite gradient")
        self.steps = steps


class StepWatch:
    """Counts the steps that were left out since their loss or gradient was not finite.

    It looks at the device once in a while, so that single steps need not wait for it. The network's running
    statistics, which a step changes even where its gradient is left out, are put back if they are no longer finite.

    Attributes:
        skipped: in the whole training.
        in_a_row: the numbers of the last steps, if none of them was taken.
    """

    def __init__(self, network: nn.Module):
        self.skipped = 0
        self.in_a_row: list[int] = []
        self._unseen: list[tuple[int, Tensor]] = []
        self._statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        self._finite = [buffer.clone() for buffer in self._statistics]

    def add(self, step: int, taken: Tensor) -> None:
        """Note a step; ``taken`` is a scalar on the device.

        Raises:
            NotFiniteError: 20 steps in a row were left out.
        """
        self._unseen.append((step, taken))
        if self.in_a_row or len(self._unseen) >= _STEPS_BETWEEN_LOOKS:
            self.look()

    def look(self) -> None:
        """Ask the device about the steps since the last look; raises as :meth:`add`."""
        if not self._unseen:
            return
        steps, flags = zip(*self._unseen, strict=True)
        self._unseen.clear()
        for step, taken in zip(steps, torch.stack(flags).tolist(), strict=True):
            if taken:
                self.in_a_row.clear()
            else:
                self.skipped += 1
                self.in_a_row.append(step)
        self._mend_statistics()
        if len(self.in_a_row) >= _STEPS_IN_A_ROW:
            raise NotFiniteError(self.in_a_row)

    def restore(self, skipped: int, in_a_row: list[int]) -> None:
        """Take over the counts of a checkpoint, whose weights the network has by now."""
        self.skipped, self.in_a_row = skipped, list(in_a_row)
        self._finite = [buffer.clone() for buffer in self._statistics]

    def _mend_statistics(self) -> None:
        for now, finite in zip(self._statistics, self._finite, strict=True):
            now.copy_(torch.where(now.isfinite(), now, finite))
            finite.copy_(now)


class Quarantine:
    """Cases that cannot be used, each with its reason. Other cases are drawn in their place.

    Args:
        limit: the largest part of a dataset's cases that may be here.
        file: where the list is written if there are more, which no line of text can hold.
    """

    def __init__(self, limit: float, file: Path):
        self.cases: dict[str, str] = {}
        self.limit = limit
        self.file = file

    def add(self, cases: Mapping[str, str]) -> list[str]:
        """Note cases with their reasons; returns a line for the log for each that is new."""
        new = {case: reason for case, reason in cases.items() if case not in self.cases}
        self.cases.update(new)
        return [f"WARNING: case {case} {reason}; quarantined, others are drawn instead" for case, reason in new.items()]

    def require_few(self, num_cases: int) -> None:
        """Raise UserError, with the list, if more of that many cases are here than may be."""
        if len(self.cases) > self.limit * num_cases:
            found = "; ".join(f"{case} {reason}" for case, reason in sorted(self.cases.items()))
            self.file.write_text(json.dumps(self.cases, indent=1, sort_keys=True))
            raise UserError(
                f"{len(self.cases)} of {num_cases} cases cannot be used, more than {self.limit:.0%}; mend those in "
                f"{self.file} and preprocess again, or allow for more (nnUNet_vf_quarantine_limit=0.5): {found}"
            )


class DataWaitTimer(Iterator[Any]):
    """An iterator that measures how long a device waits for it.

    Args:
        idle: whether the device has nothing to do; where it is still at work, no time is lost.

    Attributes:
        seconds: in all; at most, where the device became idle only while the iterator was waited for.
    """

    def __init__(self, batches: Iterable[Any], idle: Callable[[], bool] = lambda: True):
        self._batches = iter(batches)
        self._idle = idle
        self.seconds = 0.0

    def __next__(self) -> Any:
        start = time.monotonic()
        try:
            return next(self._batches)
        finally:
            if self._idle():
                self.seconds += time.monotonic() - start
