"""Tables and figure of a few-labels experiment, from its CSV files.

    python benchmarks/label_efficiency_report.py EXPERIMENT [--tables FOLDER]

EXPERIMENT is the name of a file in ``benchmarks/experiments``. Reads ``scores.csv`` (test cases), ``curves.csv``,
``variants.csv`` and ``variant_curves.csv`` (validation cases) and ``pretrainings`` (reports of the pretexts) in FOLDER.
Writes ``table.md`` beside them and draws ``few_labels_EXPERIMENT.png``, and ``few_labels_EXPERIMENT_lengths.png`` if
arms differ in the length of their pretraining: to ``docs/images`` for the committed tables, else to FOLDER.
``label_efficiency.py`` does the same after its last training.

Duration: seconds. Needs: nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import pandas as pd
from common import IMAGES, RESULTS, make_parser, markdown_table
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nnunetv2_vf.errors import UserError, one_line_errors

SCORES, CURVES, TABLE = "scores.csv", "curves.csv", "table.md"
VARIANTS, VARIANT_CURVES = "variants.csv", "variant_curves.csv"
PRETRAININGS = "pretrainings"
EXPERIMENTS = Path(__file__).with_name("experiments")
COLLAPSED_DICE = 0.1  # a training with a class of a lower mean Dice has collapsed
SMOOTHED_EPOCHS = 3
EARLY_ITERATIONS = (25, 50, 100, 200)
NEVER = float("inf")
COLORS = {
    "scratch": "tab:gray",
    "encoder": "tab:orange",
    "full": "tab:blue",
    "fusion": "tab:blue",
    "masked": "tab:green",
    "fusion_masked": "tab:purple",
    "fusion_masked_1000": "plum",
    "fusion_masked_16000": "indigo",
    "nnssl_masked": "yellowgreen",
    "nnssl_fusion": "skyblue",
}

Row = dict[str, str]


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


def read_table(file: Path) -> pd.DataFrame:
    """Return the rows of a CSV file; no rows if it does not exist."""
    return pd.read_csv(file) if file.is_file() else pd.DataFrame()


def select(rows: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Return the rows that have these values."""
    for column, value in values.items():
        rows = rows[rows[column] == value] if len(rows) else rows
    return rows


def dice_by_seed(rows: pd.DataFrame) -> dict[int, float]:
    """Return the mean Dice over cases and classes for every seed."""
    return dict(rows.groupby("seed")["dice"].mean()) if len(rows) else {}


def mean_and_deviation(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{fmean(values):.3f}"


def join(values: Sequence[float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


# ---------------------------------------------------------------- test cases


def scores_table(scores: pd.DataFrame, curves: pd.DataFrame, arms: Sequence[str]) -> list[Row]:
    """Return one row for every network, number of labels and arm: Dice, gain over scratch, classes, speed."""
    table = []
    for (plans, labels), group in scores.groupby(["plans", "labels"]):
        scratch = select(group, arm="scratch")
        own_curves = select(curves, plans=plans, labels=labels)
        for arm in arms:
            rows = select(group, arm=arm)
            if len(rows):
                dice = [*dice_by_seed(rows).values()]
                start = {"plans": plans, "labels": str(labels), "arm": arm, "seeds": str(len(dice))}
                gain = _gain_columns(rows, scratch if arm != "scratch" else scratch[:0])
                speed = _speed_columns(own_curves, arm)
                table.append(start | {"Dice": mean_and_deviation(dice)} | gain | _detail_columns(rows) | speed)
    return table


def _gain_columns(rows: pd.DataFrame, scratch: pd.DataFrame) -> Row:
    """Return points of Dice over scratch with the same seeds: mean, each seed, 95 % intervals."""
    by_seed = points_by_seed(rows, scratch)
    if not by_seed:
        names = ("points against scratch", "of each seed", "95 % over cases", "95 % over cases and seeds")
        return dict.fromkeys(names, "-")
    points = [*by_seed.values()]
    gains = 100 * gains_of_cases(rows, scratch, [*by_seed])
    return {
        "points against scratch": f"{fmean(points):+.1f}",
        "of each seed": join(points, "+.1f"),
        "95 % over cases": "{:+.1f} to {:+.1f}".format(*bootstrap_interval(gains, draw_seeds=False)),
        "95 % over cases and seeds": "{:+.1f} to {:+.1f}".format(*bootstrap_interval(gains, draw_seeds=True)),
    }


def points_by_seed(rows: pd.DataFrame, scratch: pd.DataFrame) -> dict[int, float]:
    """Return the points of Dice over scratch for every seed that both have."""
    own, baseline = dice_by_seed(rows), dice_by_seed(scratch)
    return {seed: 100 * (own[seed] - baseline[seed]) for seed in own if seed in baseline}


def gains_of_cases(rows: pd.DataFrame, scratch: pd.DataFrame, seeds: Sequence[int]) -> np.ndarray:
    """Return the gain of every case, mean over classes: one row for each seed, one column for each case."""
    own, baseline = (each.pivot_table("dice", "seed", "case") for each in (rows, scratch))
    gains: np.ndarray = (own - baseline).loc[[*seeds]].to_numpy()
    return gains


def bootstrap_interval(gains: np.ndarray, draw_seeds: bool) -> tuple[float, float]:
    """Return the 95 % interval of the mean gain: 2000 draws, with replacement, of as many cases (columns).

    Args:
        draw_seeds: draw the seeds (rows) too, independently of the cases; else the interval is for these seeds.
    """
    rng = np.random.default_rng(0)
    seeds, cases = gains.shape
    columns = rng.choice(cases, (2000, 1, cases))
    rows = rng.choice(seeds, (2000, seeds, 1)) if draw_seeds else np.arange(seeds)[:, None]
    low, high = np.percentile(gains[rows, columns].mean((1, 2)), [2.5, 97.5])
    return float(low), float(high)


def _detail_columns(rows: pd.DataFrame) -> Row:
    """Return the Dice of each class, the surface distance, and the numbers of failures."""
    distances = rows["sd95"].dropna()
    by_class = rows.groupby("class")["dice"].mean()
    collapsed = (rows.groupby(["class", "seed"])["dice"].mean() < COLLAPSED_DICE).sum()
    return {
        **{name: f"{dice:.3f}" for name, dice in by_class.items()},
        "sd95 (mm)": f"{distances.mean():.2f}" if len(distances) else "-",
        "not found": f"{rows['sd95'].isna().sum()} of {len(rows)}",
        "collapsed": str(collapsed),
    }


# ---------------------------------------------------------------- length of the pretraining


def arms_by_length(scores: pd.DataFrame, config: Mapping[str, Any]) -> list[dict[int, str]]:
    """Return the groups of arms with scores that differ in the iterations of their pretraining alone."""
    groups: dict[str, dict[int, str]] = {}
    for arm, changes in config["arms"].items():
        settings = {**config["pretraining"], **changes.get("pretraining", {})}
        iterations = settings.pop("num_epochs") * settings["iterations_per_epoch"]
        if arm != "scratch" and len(select(scores, arm=arm)):
            groups.setdefault(json.dumps([settings, changes.get("finetuning")], sort_keys=True), {})[iterations] = arm
    return [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]


def lengths_table(scores: pd.DataFrame, config: Mapping[str, Any]) -> list[Row]:
    """Return one row for every length of a pretraining, network and number of labels: the gain over scratch."""
    return [
        {
            "plans": plans,
            "labels": str(labels),
            "arm": arm,
            "iterations of the pretraining": str(iterations),
            **_gain_columns(select(of_labels, arm=arm), select(of_labels, arm="scratch")),
        }
        for (plans, labels), of_labels in scores.groupby(["plans", "labels"])
        for group in arms_by_length(of_labels, config)
        for iterations, arm in group.items()
    ]


# ---------------------------------------------------------------- curves of the validation cases


def curves_table(curves: pd.DataFrame, arms: Sequence[str]) -> list[Row]:
    """Return one row for every network, number of labels and arm, also where no test cases were predicted."""
    table = []
    for (plans, labels), group in curves.groupby(["plans", "labels"]):
        for arm in arms:
            rows = select(group, arm=arm)
            if len(rows):
                ends = [smooth(of_seed).iloc[-1] for _, of_seed in rows.groupby("seed")]
                start = {"plans": plans, "labels": str(labels), "arm": arm, "seeds": str(len(ends))}
                early = {f"after {iteration}": _mean_dice(rows, iteration) for iteration in EARLY_ITERATIONS}
                end = {"pseudo Dice": mean_and_deviation(ends), "of each seed": join(ends, ".3f")}
                table.append(start | early | end | _speed_columns(group, arm))
    return table


def _mean_dice(curves: pd.DataFrame, iteration: int) -> str:
    rows = select(curves, iteration=iteration)
    return f"{rows['dice'].mean():.2f}" if len(rows) else "-"


def _speed_columns(curves: pd.DataFrame, arm: str) -> Row:
    """Return the iteration at which scratch's final Dice is reached (median over seeds), and its share of scratch's."""
    reached, shares = [], []
    own = select(curves, arm=arm)
    for seed in sorted(own["seed"].unique()) if len(own) else []:
        scratch = smooth(select(curves, arm="scratch", seed=seed))
        if len(scratch):
            goal = scratch.iloc[-1]
            reached.append(_first_iteration(smooth(select(own, seed=seed)), goal))
            shares.append(reached[-1] / _first_iteration(scratch, goal))
    middle = median(reached) if reached else NEVER
    by_seed = ", ".join("not" if share == NEVER else f"{share:.2f}" for share in shares)
    return {
        "reaches scratch's": "-" if not reached else "not" if middle == NEVER else f"{middle:.0f}",
        "part of scratch's iterations": by_seed if arm != "scratch" and shares else "-",
    }


def _first_iteration(curve: pd.Series, goal: float) -> float:
    return next((iteration for iteration, dice in curve.items() if dice >= goal), NEVER)


def smooth(rows: pd.DataFrame) -> pd.Series:
    """Return the mean Dice of classes and seeds by iteration, averaged over the last epochs."""
    if not len(rows):
        return pd.Series(dtype=float)
    dice = rows.groupby("iteration")["dice"].mean()
    # A window of its own for each mean: pandas' running sum would round equal values differently.
    means = [dice.iloc[max(0, i + 1 - SMOOTHED_EPOCHS) : i + 1].mean() for i in range(len(dice))]
    return pd.Series(means, dice.index)


def variants_table(variants: pd.DataFrame) -> list[Row]:
    """Return one row for every variant: Dice of the validation cases."""
    table = []
    for (plans, labels, variant, arm), rows in variants.groupby(["plans", "labels", "variant", "arm"]):
        dice = [*dice_by_seed(rows).values()]
        start = {"plans": plans, "labels": str(labels), "variant": variant, "arm": arm, "seeds": str(len(dice))}
        table.append(start | {"Dice": mean_and_deviation(dice), "of each seed": join(dice, ".3f")})
    return table


def early_table(curves: pd.DataFrame) -> list[Row]:
    """Return one row for every variant: pseudo Dice after the first iterations, mean and each seed."""
    table = []
    for (plans, labels, variant, arm), rows in curves.groupby(["plans", "labels", "variant", "arm"]):
        row = {"plans": plans, "labels": str(labels), "variant": variant, "arm": arm}
        for iteration in EARLY_ITERATIONS:
            dice = [*dice_by_seed(select(rows, iteration=iteration)).values()]
            row[f"after {iteration}"] = f"{fmean(dice):.3f} ({join(dice, '.3f')})" if dice else "-"
        table.append(row)
    return table


# ---------------------------------------------------------------- pretrainings


def pretrainings_table(folder: Path) -> list[Row]:
    """Return one row for every ``pretext_report.json`` in a folder: what a network had learnt of its pretext."""
    table = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text())
        settings, dice, shares = report["settings"], report["dice_per_class"], report["restored_share"]
        table.append(
            {
                "pretext": settings["pretext"],
                "iterations": str(settings["num_epochs"] * settings["iterations_per_epoch"]),
                "samples of the report": str(report["samples"]),
                "mean Dice of the fusion classes": f"{fmean(dice.values()):.2f}" if dice else "-",
                "Dice of each": join([*dice.values()], ".2f") or "-",
                "restored share": join([*shares.values()], ".2f") or "-",
            }
        )
    return table


# ---------------------------------------------------------------- figure


def draw(scores: pd.DataFrame, curves: pd.DataFrame, arms: Sequence[str], file: Path) -> None:
    """Draw for every network the Dice by number of labels, and the curves of each number."""
    networks, numbers = (sorted(scores[column].unique()) for column in ("plans", "labels"))
    arms = [arm for arm in arms if arm in scores["arm"].unique()]
    figure = Figure(figsize=(3.6 * (1 + len(numbers)), 3.2 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 1 + len(numbers), squeeze=False)
    for plans, (left, *others) in zip(networks, grid, strict=True):
        _draw_scores(left, select(scores, plans=plans), arms)
        left.set_title(plans)
        for labels, axis in zip(numbers, others, strict=True):
            _draw_curves(axis, select(curves, plans=plans, labels=labels), arms)
            axis.set_title(f"{labels} labels")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(arms), 4))
    figure.savefig(file, dpi=100)


def _draw_scores(axis: Axes, scores: pd.DataFrame, arms: Sequence[str]) -> None:
    for i, arm in enumerate(arms):
        dice = select(scores, arm=arm).groupby(["labels", "seed"])["dice"].mean()
        means = dice.groupby("labels").mean()
        offset = 0.15 * (i - (len(arms) - 1) / 2)  # points of different arms do not hide each other
        axis.plot(means.index + offset, means, "_-", color=COLORS.get(arm), markersize=12, label=arm)
        axis.plot(dice.index.get_level_values("labels") + offset, dice, "o", color=COLORS.get(arm), alpha=0.5)
    axis.set(xlabel="labelled cases", ylabel="Dice, test cases", xticks=sorted(scores["labels"].unique()))
    axis.grid(alpha=0.3)


def _draw_curves(axis: Axes, curves: pd.DataFrame, arms: Sequence[str]) -> None:
    if not len(curves):
        axis.set_axis_off()
        return
    for arm in arms:
        rows = select(curves, arm=arm)
        for _, of_seed in rows.groupby("seed"):
            axis.plot(smooth(of_seed), color=COLORS.get(arm), alpha=0.3, linewidth=0.8)
        axis.plot(smooth(rows), color=COLORS.get(arm), linewidth=2)
    axis.set(xlabel="iteration", ylabel="pseudo Dice, validation cases")
    axis.grid(alpha=0.3)


def draw_lengths(scores: pd.DataFrame, config: Mapping[str, Any], file: Path) -> None:
    """Draw for every network and number of labels the gain over scratch by iterations of the pretraining."""
    groups = list(scores.groupby(["plans", "labels"]))
    figure = Figure(figsize=(4 * len(groups), 3.2), layout="constrained")
    for axis, ((plans, labels), rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        scratch = select(rows, arm="scratch")
        for group in arms_by_length(rows, config):
            gains = pd.DataFrame({n: points_by_seed(select(rows, arm=arm), scratch) for n, arm in group.items()})
            first_arm = config["arms"][next(iter(group.values()))]
            pretext = first_arm.get("pretraining", {}).get("pretext", "fusion")
            (line,) = axis.plot(gains.columns, gains.mean(), "o-", label=pretext)
            axis.plot(gains.columns, gains.T, "o", color=line.get_color(), alpha=0.3)
            axis.set_xscale("log")
            axis.set_xticks(gains.columns, map(str, gains.columns))
            axis.minorticks_off()
        axis.axhline(0, color=COLORS["scratch"], label="scratch")
        axis.set(xlabel="iterations of the pretraining", ylabel="points of Dice over scratch")
        axis.set_title(f"{plans}, {labels} labels")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=100)


# ---------------------------------------------------------------- report


def write_report(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Write and print the tables of the CSV files in a folder, and draw the figure."""
    files = (SCORES, CURVES, VARIANTS, VARIANT_CURVES)
    scores, curves, variants, variant_curves = (read_table(folder / file) for file in files)
    arms = [*config["arms"]]
    tables = {}
    if len(scores):
        tables["Test cases"] = scores_table(scores, curves, arms)
        images = IMAGES if folder.resolve() == RESULTS / name else folder
        draw(scores, curves, arms, images / f"few_labels_{name}.png")
        if lengths := lengths_table(scores, config):
            tables["Length of the pretraining, test cases"] = lengths
            draw_lengths(scores, config, images / f"few_labels_{name}_lengths.png")
    if len(curves):
        tables["Curves, validation cases"] = curves_table(curves, arms)
    if len(variants):
        tables["Variants, validation cases"] = variants_table(variants)
    if len(variant_curves):
        tables["Start of the curves of the variants, pseudo Dice of validation cases"] = early_table(variant_curves)
    if pretrainings := pretrainings_table(folder / PRETRAININGS):
        tables["Pretrainings"] = pretrainings
    text = "\n\n".join(f"{title}:\n\n{markdown_table(rows)}" for title, rows in tables.items()) + "\n"
    print(f"\n{text}")
    (folder / TABLE).write_text(text)


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
