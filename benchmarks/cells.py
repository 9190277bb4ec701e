"""The cells of a few-labels experiment (each one fine-tuning), and the CSV files with their rows."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

CELL = ["plans", "arm", "labels", "seed"]
DEFAULT_VARIANT = "default"
SCORES, CURVES = "scores.csv", "curves.csv"
VARIANTS, VARIANT_CURVES = "variants.csv", "variant_curves.csv"
LARGEST_COMPONENT = "largest_component.csv"  # the columns of SCORES


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


class Tables:
    """The CSV files to which finished cells are added: those of the test cases, or those of the variants."""

    def __init__(self, folder: Path, of_test_cases: bool):
        self.folder, self.of_test_cases = folder, of_test_cases
        scores, curves = (SCORES, CURVES) if of_test_cases else (VARIANTS, VARIANT_CURVES)
        self.scores, self.curves = folder / scores, folder / curves
        self.key = CELL if of_test_cases else [*CELL, "variant"]

    def without_finished(self, cells: Sequence[Cell]) -> list[Cell]:
        rows = read_rows(self.scores)
        return [cell for cell in cells if not any(belongs_to(row, cell, self.key) for row in rows)]

    def usual_seconds(self, cell: Cell, machine: str) -> float:
        """Return the longest time of a finished cell with the same plans, variant and machine; 0 if none is known."""
        names = [name for name in ("plans", "variant") if name in self.key]
        alike = (
            row for row in read_rows(self.scores) if belongs_to(row, cell, names) and row.get("machine") == machine
        )
        return max((float(row["seconds"]) for row in alike if row.get("seconds")), default=0)

    def add(self, cell: Cell, scores: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> None:
        write_cell(self.curves, self.key, cell, curve)  # first: a cell with scores counts as finished
        write_cell(self.scores, self.key, cell, scores)


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text, so that they can be written back as they are."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def belongs_to(row: Mapping[str, str], cell: Cell, key: Sequence[str]) -> bool:
    """True if a row of a table is of this cell."""
    return all(row[name] == str(getattr(cell, name)) for name in key)


def write_cell(file: Path, key: Sequence[str], cell: Cell, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the rows of a cell in a CSV file; other threads and processes may do the same at this moment.

    The file is written completely or not at all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _locked(file.parent):
        others = [row for row in read_rows(file) if not belongs_to(row, cell, key)]
        complete = [*others, *({name: getattr(cell, name) for name in key} | row for row in rows)]
        columns = [*dict.fromkeys(name for row in complete for name in row)]  # older rows have fewer
        part = file.with_suffix(".part")
        with part.open("w", newline="") as output:
            writer = csv.DictWriter(output, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in complete)
        part.replace(file)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one thread or process at a time change the files of a folder."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
