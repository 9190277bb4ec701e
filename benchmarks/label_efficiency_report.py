"""Table and figure of ``docs/label_efficiency*.csv``: what pretraining gained, class by class, and how fast.

python benchmarks/label_efficiency_report.py [--docs FOLDER]

Writes ``label_efficiency_table.md``, the same tables in ``label_efficiency.md``, and ``label_efficiency.png``;
``label_efficiency.py`` does so after its last cell.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from side_by_side import DOCS, markdown

SCORES, CURVES, VARIANTS = (f"label_efficiency{end}.csv" for end in ("", "_curves", "_variants"))
CELL = ["plans", "arm", "labels", "seed"]
PAGE = "label_efficiency.md"
COLLAPSED = 0.1  # mean Dice of a class over the cases, in one training
WINDOW = 3  # epochs over which a curve is averaged
COLORS = {"scratch": "tab:gray", "encoder": "tab:orange", "full": "tab:blue"}

Rows = list[dict[str, str]]


def read_rows(file: Path) -> Rows:
    """Of a CSV file; none if it is not there yet."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def is_done(rows: Rows, cell: Mapping[str, Any]) -> bool:
    """Whether there are scores of a cell."""
    return bool(select(rows, **{name: value for name, value in cell.items() if not rows or name in rows[0]}))


def select(rows: Rows, **values: Any) -> Rows:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in values.items())]


def distinct(rows: Rows, column: str) -> list[str]:
    """The values of a column, numbers in their order."""
    return sorted({row[column] for row in rows}, key=lambda v: (int(v), v) if v.isdigit() else (0, v))


def mean_dice(rows: Rows) -> float:
    return fmean(float(row["dice"]) for row in rows)


def by_seed(rows: Rows) -> dict[str, float]:
    """Mean Dice over cases and classes of every seed."""
    return {seed: mean_dice(select(rows, seed=seed)) for seed in distinct(rows, "seed")}


def with_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{fmean(values):.3f}"


# ---------------------------------------------------------------- table


def table(scores: Rows, curves: Rows, arms: Sequence[str]) -> list[dict[str, str]]:
    """A row for every network, number of labels and arm."""
    found = []
    for plans in distinct(scores, "plans"):
        for labels in distinct(select(scores, plans=plans), "labels"):
            setting = {"plans": plans, "labels": labels}
            scratch = select(scores, **setting, arm="scratch")
            for arm in arms:
                rows = select(scores, **setting, arm=arm)
                if rows:
                    dice = list(by_seed(rows).values())
                    figures = {"seeds": str(len(dice)), "Dice": with_spread(dice)}
                    gain = _gain(rows, scratch if arm != "scratch" else [])
                    speed = _speed(curves, setting, arm)
                    found.append({**setting, "arm": arm, **figures, **gain, **_details(rows), **speed})
    return found


def _gain(rows: Rows, scratch: Rows) -> dict[str, str]:
    """Points of Dice against scratch with the same seeds: mean, each seed's, and how sure the test cases make it."""
    dice, baseline = by_seed(rows), by_seed(scratch)
    seeds = [seed for seed in dice if seed in baseline]
    if not seeds:
        return {"points against scratch": "-", "of each seed": "-", "95 % over cases": "-"}
    points = [100 * (dice[seed] - baseline[seed]) for seed in seeds]
    low, high = _interval([100 * gain for gain in _gain_of_cases(rows, scratch, seeds)])
    return {
        "points against scratch": f"{fmean(points):+.1f}",
        "of each seed": ", ".join(f"{value:+.1f}" for value in points),
        "95 % over cases": f"{low:+.1f} to {high:+.1f}",
    }


def _gain_of_cases(rows: Rows, scratch: Rows, seeds: Sequence[str]) -> list[float]:
    """Of every test case, mean over classes and seeds."""
    own, baseline = ([row for row in each if row["seed"] in seeds] for each in (rows, scratch))
    return [
        mean_dice(select(own, case=case)) - mean_dice(select(baseline, case=case)) for case in distinct(own, "case")
    ]


def _interval(gains: Sequence[float]) -> tuple[float, float]:
    """The middle 95 % of the means of 2000 draws of as many cases (bootstrap)."""
    draws = np.random.default_rng(0).choice(gains, (2000, len(gains)))
    low, high = np.percentile(draws.mean(1), [2.5, 97.5])
    return float(low), float(high)


def _details(rows: Rows) -> dict[str, str]:
    """Every class, the surfaces, and what went wrong."""
    missing = sum(row["sd95"] == "nan" for row in rows)
    classes = {name: select(rows, **{"class": name}) for name in distinct(rows, "class")}
    collapses = sum(dice < COLLAPSED for own in classes.values() for dice in by_seed(own).values())
    distances = [float(row["sd95"]) for row in rows if row["sd95"] != "nan"]
    return {
        **{name: f"{mean_dice(own):.3f}" for name, own in classes.items()},
        "sd95 (mm)": f"{fmean(distances):.2f}" if distances else "-",
        "not found": f"{missing} of {len(rows)}",
        "collapsed": str(collapses),
    }


def _speed(curves: Rows, setting: Mapping[str, str], arm: str) -> dict[str, str]:
    """After how many iterations the result was reached that scratch ends with, and what part of scratch's that is."""
    reached, shares = [], []
    for seed in distinct(select(curves, **setting, arm=arm), "seed"):
        own, scratch = (smooth(select(curves, **setting, arm=a, seed=seed)) for a in (arm, "scratch"))
        if scratch:
            goal = list(scratch.values())[-1]
            reached.append(_first(own, goal))
            shares.append(reached[-1] / _first(scratch, goal))
    middle = median(reached) if reached else float("nan")
    of_each = ", ".join("not" if share == float("inf") else f"{share:.2f}" for share in shares)
    return {
        "reaches scratch's": {float("inf"): "not"}.get(middle, f"{middle:.0f}") if reached else "-",
        "part of scratch's iterations": of_each if arm != "scratch" and shares else "-",
    }


def _first(curve: Mapping[int, float], goal: float) -> float:
    return next((iteration for iteration, dice in curve.items() if dice >= goal), float("inf"))


def curves_table(curves: Rows, arms: Sequence[str]) -> list[dict[str, str]]:
    """A row for every network, number of labels and arm, also of trainings whose test cases were not predicted."""
    found = []
    for plans in distinct(curves, "plans"):
        for labels in distinct(select(curves, plans=plans), "labels"):
            setting = {"plans": plans, "labels": labels}
            for arm in arms:
                rows = select(curves, **setting, arm=arm)
                ends = [list(smooth(select(rows, seed=seed)).values())[-1] for seed in distinct(rows, "seed")]
                if ends:
                    of_each = ", ".join(f"{end:.3f}" for end in ends)
                    figures = {"seeds": str(len(ends)), "pseudo Dice": with_spread(ends), "of each seed": of_each}
                    found.append({**setting, "arm": arm, **figures, **_speed(curves, setting, arm)})
    return found


def smooth(rows: Rows) -> dict[int, float]:
    """Iteration -> mean Dice of the classes, averaged over the last epochs."""
    iterations = [int(i) for i in distinct(rows, "iteration")]
    values = [mean_dice(select(rows, iteration=i)) for i in iterations]
    return {it: fmean(values[max(0, i + 1 - WINDOW) : i + 1]) for i, it in enumerate(iterations)}


# ---------------------------------------------------------------- figure


def draw(scores: Rows, curves: Rows, arms: Sequence[str], file: Path) -> None:
    """A line of pictures for every network: Dice by number of labels, and the curves of each number."""
    networks = distinct(scores, "plans")
    numbers = distinct(scores, "labels")
    figure = Figure(figsize=(3.6 * (1 + len(numbers)), 3.2 * len(networks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(networks), 1 + len(numbers), squeeze=False)
    for plans, (left, *others) in zip(networks, axes, strict=True):
        _draw_scores(left, select(scores, plans=plans), arms)
        left.set_title(plans)
        for labels, axis in zip(numbers, others, strict=True):
            _draw_curves(axis, select(curves, plans=plans, labels=labels), arms)
            axis.set_title(f"{labels} labels")
    axes[0, 0].legend()
    figure.savefig(file, dpi=100)


def _draw_scores(axis: Axes, scores: Rows, arms: Sequence[str]) -> None:
    for arm in arms:
        rows = select(scores, arm=arm)
        dice = {labels: list(by_seed(select(rows, labels=labels)).values()) for labels in distinct(rows, "labels")}
        axis.plot(
            [int(labels) for labels in dice],
            [fmean(values) for values in dice.values()],
            color=COLORS.get(arm),
            label=arm,
        )
        for labels, values in dice.items():
            axis.plot([int(labels)] * len(values), values, "o", color=COLORS.get(arm), alpha=0.5)
    axis.set(xlabel="labelled cases", ylabel="Dice, test cases", xticks=[int(n) for n in distinct(scores, "labels")])
    axis.grid(alpha=0.3)


def _draw_curves(axis: Axes, curves: Rows, arms: Sequence[str]) -> None:
    if not curves:
        axis.set_axis_off()
        return
    for arm in arms:
        of_arm = select(curves, arm=arm)
        for seed in distinct(of_arm, "seed"):
            values = smooth(select(of_arm, seed=seed))
            axis.plot([*values], [*values.values()], color=COLORS.get(arm), alpha=0.3, linewidth=0.8)
        mean = smooth(of_arm)
        axis.plot([*mean], [*mean.values()], color=COLORS.get(arm), linewidth=2)
    axis.set(xlabel="iteration", ylabel="pseudo Dice, validation cases")
    axis.grid(alpha=0.3)


# ---------------------------------------------------------------- variants


def variants_table(rows: Rows) -> list[dict[str, str]]:
    """A row for every variant: Dice of the validation cases."""
    found = []
    for plans in distinct(rows, "plans"):
        for labels in distinct(select(rows, plans=plans), "labels"):
            for variant in distinct(select(rows, plans=plans, labels=labels), "variant"):
                of_variant = select(rows, plans=plans, labels=labels, variant=variant)
                for arm in distinct(of_variant, "arm"):
                    own = select(of_variant, arm=arm)
                    dice = by_seed(own)
                    found.append(
                        {
                            "plans": plans, "labels": labels, "variant": variant, "arm": arm, "seeds": str(len(dice)),
                            "Dice": with_spread([*dice.values()]),
                            "of each seed": ", ".join(f"{value:.3f}" for value in dice.values()),
                        }
                    )  # fmt: skip
    return found


def write_report(docs: Path, config: Mapping[str, Any]) -> None:
    """Tables and figure of what the CSV files hold; prints the tables."""
    scores, curves, variants = (read_rows(docs / name) for name in (SCORES, CURVES, VARIANTS))
    arms = [*config["arms"]]
    tables = {}
    if scores:
        tables["Test cases"] = markdown(table(scores, curves, arms))
        draw(scores, curves, arms, docs / "label_efficiency.png")
    if curves:
        tables["Ends of the curves, validation cases"] = markdown(curves_table(curves, arms))
    if variants:
        tables["Variants, validation cases"] = markdown(variants_table(variants))
    text = "\n\n".join(f"{title}:\n\n{rows}" for title, rows in tables.items()) + "\n"
    print(f"\n{text}")
    (docs / "label_efficiency_table.md").write_text(text)
    if (docs / PAGE).is_file():
        (docs / PAGE).write_text(with_tables((docs / PAGE).read_text(), tables))


def with_tables(page: str, tables: Mapping[str, str]) -> str:
    """A page in which the table behind every mark ``<!-- TITLE -->`` is the one of that title."""
    for title, rows in tables.items():
        behind = re.compile(rf"(?<=<!-- {re.escape(title)} -->\n\n)(\|.*\n)+")
        page = behind.sub(lambda _, rows=rows: f"{rows}\n", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    config = json.loads(Path(__file__).with_name("label_efficiency.json").read_text())
    write_report(parser.parse_args().docs, config)


if __name__ == "__main__":
    main()
