"""The cells of a few-labels experiment (each one fine-tuning), and the CSV files with their rows."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CELL = ["plans", "arm", "labels", "seed"]
DEFAULT_VARIANT = "default"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One fine-tuning."""

    plans: str
    arm: str
    labels: int
    seed: int
    variant: str = DEFAULT_VARIANT

    def __str__(self) -> str:
        return f"{self.plans}, {self.arm}, {self.labels} labels, seed {self.seed}, {self.variant}"


def changes_of(config: Mapping[str, Any], variant: str) -> Mapping[str, Any]:
    """Return what a variant of an experiment changes, by kind of training."""
    return {} if variant == DEFAULT_VARIANT else config["variants"][variant]


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text, so that they can be written back as they are."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def usual_seconds(rows: Sequence[Mapping[str, str]], cell: Cell) -> float:
    """Return the longest time of a finished cell with the same plans; 0 if none is known."""
    return max((float(row["seconds"]) for row in rows if row["plans"] == cell.plans and row.get("seconds")), default=0)


def belongs_to(row: Mapping[str, str], cell: Cell, key: Sequence[str]) -> bool:
    """True if a row of a table is of this cell."""
    return all(row[name] == str(getattr(cell, name)) for name in key)


def write_cell(file: Path, key: Sequence[str], cell: Cell, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of a cell in a CSV file. The file is written completely or not at all."""
    others = [row for row in read_rows(file) if not belongs_to(row, cell, key)]
    complete = [*others, *({name: getattr(cell, name) for name in key} | row for row in rows)]
    columns = [*dict.fromkeys(name for row in complete for name in row)]  # older rows have fewer
    part = file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with part.open("w", newline="") as output:
        writer = csv.DictWriter(output, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in complete)
    part.replace(file)
