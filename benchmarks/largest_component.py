"""Scores of the test cases of a few-labels experiment if each class keeps only its largest connected component.

    python benchmarks/largest_component.py EXPERIMENT --work FOLDER [--tables FOLDER]

Papers on few labels of the left atrium score like this. EXPERIMENT and the folders are those of
``label_efficiency.py``. Reads its predictions below ``--work``; writes ``largest_component.csv`` with a row for each
row of ``scores.csv``. Trainings whose predictions are missing are left out, and named. At the end
``label_efficiency_report.py`` draws and tabulates.

Duration: 10 seconds for a training, with 20 test cases of the left atrium. Needs: the folder of
``label_efficiency.py``.
"""

from __future__ import annotations

from pathlib import Path

from cells import CELL, LARGEST_COMPONENT, SCORES, Cell, belongs_to, read_rows, write_cell
from common import RESULTS, make_parser
from label_efficiency import RECORD, Experiment, require_same_configuration
from label_efficiency_report import add_experiment, read_experiment, write_report

from nnunetv2_vf.errors import UserError, one_line_errors
from nnunetv2_vf.nnunet_commands import Workspace


def main() -> None:
    parser = make_parser(__doc__, work=True)
    add_experiment(parser)
    args = parser.parse_args()
    with one_line_errors():
        config = read_experiment(args.experiment)
        tables = args.tables or RESULTS / args.experiment
        if not (args.work / RECORD).is_file():
            raise UserError(f"{args.work} is no folder of label_efficiency.py: it has no {RECORD}")
        require_same_configuration((tables, args.work), config)
        score_largest_components(Experiment(config, Workspace(args.work, processes=1), "cpu", jobs=1), tables)
        write_report(tables, args.experiment, config)


def score_largest_components(experiment: Experiment, tables: Path) -> None:
    """Add the cells of ``scores.csv`` to ``largest_component.csv``, except those that are there already."""
    file = tables / LARGEST_COMPONENT
    finished = read_rows(file)
    rows = read_rows(tables / SCORES)
    for cell in dict.fromkeys(Cell(row["plans"], row["arm"], int(row["labels"]), int(row["seed"])) for row in rows):
        if any(belongs_to(row, cell, CELL) for row in finished):
            continue
        predictions = experiment.predictions(cell)
        if predictions.is_dir():
            write_cell(file, CELL, cell, experiment.score_test_cases(cell, largest_component=True))
        print(f"{cell}: {'scored' if predictions.is_dir() else f'left out, there is no {predictions}'}", flush=True)


if __name__ == "__main__":
    main()
