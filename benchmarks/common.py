"""Measuring contenders side by side: in turn, in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent / "docs"


def alternate(
    contenders: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every run of each contender, A B C A B C ..., after ``warm_up`` rounds that do not count.

    Args:
        clock: ``time.process_time`` counts the time of the processor alone, which neighbours on the machine do not
            lengthen; for work on one core.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + repeats):
        for name, run in contenders.items():
            start = clock()
            result = run()
            elapsed = clock() - start
            del result  # what it holds is given back outside the measured time
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def summary(seconds: Sequence[float], unit: float = 1e3, digits: int = 2) -> str:
    """``median (lowest to highest)``, in milliseconds unless ``unit`` is another number of parts of a second."""
    median, lowest, highest = (f"{unit * f(seconds):.{digits}f}" for f in (statistics.median, min, max))
    return f"{median} ({lowest} to {highest})"


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(seconds) / statistics.median(reference)


def machine(device: torch.device) -> str:
    """What the figures are of, in words that say enough to compare and no more."""
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    model = platform.processor() or platform.machine()
    return f"{threads} CPU core{'s' if threads > 1 else ''} ({model}), torch {torch.__version__}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with the same keys."""
    return "\n".join(map(_line, [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]))


def _line(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def report(name: str, about: str, rows: Sequence[Mapping[str, Any]], docs: Path = DOCS, **raw: Any) -> None:
    """Print the table; write rows and raw figures to ``NAME.json`` in ``docs``."""
    print(f"\n{about}\n\n{markdown(rows)}")
    content = {"about": about, "rows": rows, **raw}
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
