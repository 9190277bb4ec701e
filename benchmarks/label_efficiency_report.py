"""Tables and figures of a few-labels experiment, from its CSV files.

    python benchmarks/label_efficiency_report.py EXPERIMENT [--tables FOLDER]

EXPERIMENT is the name of a file in ``benchmarks/experiments``. Reads in FOLDER ``scores.csv`` and
``largest_component.csv`` (test cases), ``curves.csv``, ``variants.csv`` and ``variant_curves.csv`` (validation cases)
and ``pretrainings`` (reports of the pretexts).
Writes ``table.md`` beside them and draws ``few_labels_EXPERIMENT.png``, and ``few_labels_EXPERIMENT_lengths.png`` if
arms differ in the length of their pretraining. For the committed tables, the figures go to ``docs/images``, and each
table to the page that has a line ``<!-- EXPERIMENT: title of the table -->``. ``label_efficiency.py`` does the same
after its last training.

Duration: seconds. Needs: nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import CURVES, LARGEST_COMPONENT, SCORES, VARIANT_CURVES, VARIANTS
from common import IMAGES, RESULTS, make_parser, markdown_table
from label_efficiency_figures import draw, draw_lengths
from label_efficiency_tables import (
    PRETRAININGS,
    TABLE,
    Row,
    curves_table,
    early_table,
    largest_component_table,
    lengths_table,
    pretrainings_table,
    read_table,
    scores_table,
    variants_table,
)

from nnunetv2_vf.errors import UserError, one_line_errors

EXPERIMENTS = Path(__file__).with_name("experiments")
PAGES = IMAGES.parent / "explanation"
LENGTHS = "Length of the pretraining, test cases"


def read_experiment(name: str) -> dict[str, Any]:
    """Return the configuration of an experiment, on top of the experiment that it inherits from.

    Raises:
        UserError: there is none with this name.
    """
    file = EXPERIMENTS / f"{name}.json"
    if not file.is_file():
        legal = ", ".join(sorted(each.stem for each in EXPERIMENTS.glob("*.json")))
        raise UserError(f"there is no experiment {name!r}; legal: {legal}")
    configuration: dict[str, Any] = json.loads(file.read_text())
    parent = configuration.pop("inherits_from", None)
    return {**read_experiment(parent), **configuration} if parent else configuration


def write_report(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Write and print the tables of the CSV files in a folder, and draw the figures."""
    committed = folder.resolve() == RESULTS / name
    scores = read_table(folder / SCORES)
    images = IMAGES if committed else folder
    tables = make_tables(folder, config)
    if len(scores):
        draw(scores, read_table(folder / CURVES), [*config["arms"]], images / f"few_labels_{name}.png")
    if LENGTHS in tables:
        draw_lengths(scores, config, images / f"few_labels_{name}_lengths.png")
    text = "\n\n".join(f"{title}:\n\n{markdown_table(rows)}" for title, rows in tables.items()) + "\n"
    print(f"\n{text}")
    (folder / TABLE).write_text(text)
    for page in PAGES.glob("*.md") if committed else ():
        page.write_text(fill_page(page.read_text(), name, tables))


def make_tables(folder: Path, config: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the tables of the CSV files in a folder by title, without empty ones."""
    files = (SCORES, LARGEST_COMPONENT, CURVES, VARIANTS, VARIANT_CURVES)
    scores, largest_component, curves, variants, variant_curves = (read_table(folder / file) for file in files)
    arms = [*config["arms"]]
    tables = {
        "Test cases": scores_table(scores, curves, arms),
        "Test cases, largest component": largest_component_table(largest_component, arms),
        LENGTHS: lengths_table(scores, config),
        "Curves, validation cases": curves_table(curves, arms),
        "Variants, validation cases": variants_table(variants),
        "Start of the curves of the variants, pseudo Dice of validation cases": early_table(variant_curves),
        "Pretrainings": pretrainings_table(folder / PRETRAININGS),
    }
    return {title: rows for title, rows in tables.items() if rows}


def fill_page(text: str, name: str, tables: Mapping[str, Sequence[Row]]) -> str:
    """Return a page with the tables of an experiment after the comments that name them, in place of older ones."""
    for title, rows in tables.items():
        comment = f"<!-- {name}: {title} -->"
        filled = f"{comment}\n\n{markdown_table(rows)}\n\n"
        text = re.sub(rf"{re.escape(comment)}\n+(\|.*\n)*\n*", lambda _, filled=filled: filled, text)
    return text.rstrip() + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    add_experiment(parser)
    args = parser.parse_args()
    with one_line_errors():
        write_report(args.tables or RESULTS / args.experiment, args.experiment, read_experiment(args.experiment))


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name an experiment and the folder of its tables."""
    parser.add_argument("experiment", metavar="EXPERIMENT")
    what = "default: benchmarks/results/EXPERIMENT"
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help=what)


if __name__ == "__main__":
    main()
