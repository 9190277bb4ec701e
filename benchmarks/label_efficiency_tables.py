"""Tables of a few-labels experiment: gain over scratch, curves, variants and pretrainings.

A table is a list of rows; a row holds text by column. The scores, curves and variants are the CSV files of
``label_efficiency.py``, read with :func:`read_table`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import pandas as pd
from cells import CELL, Cell
from pretrainings import pretraining_settings
from scipy import stats

from nnunetv2_vf.settings import VFSettings
from nnunetv2_vf.settings.legal_values import format_value

TABLE = "table.md"
PRETRAININGS = "pretrainings"
COLLAPSED_DICE = 0.1  # a training with a class of a lower mean Dice has collapsed
SMOOTHED_EPOCHS = 3
EARLY_ITERATIONS = (25, 50, 100, 200)
NEVER = float("inf")
GAIN_COLUMNS = ("gain", "gain of each seed", "95 % over cases", "95 % over cases and seeds", "95 % over seeds")
SHOWN_APART = {"pretext", "num_epochs", "iterations_per_epoch", "val_iterations_per_epoch"}

Row = dict[str, str]


def read_table(file: Path) -> pd.DataFrame:
    """Return the rows of a CSV file; no rows if it does not exist."""
    return pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=[*CELL, "variant", "dice"])


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
    for rows, scratch in _compared(scores, arms):
        first = rows.iloc[0]
        own_curves = select(curves, plans=first["plans"], labels=first["labels"])
        speed = _speed_columns(own_curves, first["arm"])
        table.append(_dice_columns(rows, scratch) | _detail_columns(rows) | speed)
    return table


def largest_component_table(scores: pd.DataFrame, arms: Sequence[str]) -> list[Row]:
    """Return one row for every network, number of labels and arm: the scores of papers on the left atrium."""
    return [
        _dice_columns(rows, scratch)
        | {
            "Jaccard": f"{rows['jaccard'].mean():.3f}",
            "sd95, mm": f"{rows['sd95'].mean():.2f}",
            "asd, mm": f"{rows['asd'].mean():.2f}",
            "not found": _not_found(rows),
        }
        for rows, scratch in _compared(scores, arms)
    ]


def _compared(scores: pd.DataFrame, arms: Sequence[str]) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Yield the rows of every network, number of labels and arm, with those from scratch that they are compared to."""
    for _, group in scores.groupby(["plans", "labels"]):
        for arm in arms:
            rows = select(group, arm=arm)
            if len(rows):
                yield rows, select(group, arm="scratch") if arm != "scratch" else group[:0]


def _dice_columns(rows: pd.DataFrame, scratch: pd.DataFrame) -> Row:
    """Return what was trained, its Dice, and its gain over scratch."""
    first, dice = rows.iloc[0], [*dice_by_seed(rows).values()]
    what = {"plans": first["plans"], "labels": str(first["labels"]), "pretraining": first["arm"]}
    return what | {"seeds": str(len(dice)), "Dice": mean_and_deviation(dice)} | _gain_columns(rows, scratch)


def _gain_columns(rows: pd.DataFrame, scratch: pd.DataFrame) -> Row:
    """Return points of Dice over scratch with the same seeds: mean, each seed, 95 % intervals."""
    by_seed = points_by_seed(rows, scratch)
    if not by_seed:
        return dict.fromkeys(GAIN_COLUMNS, "-")
    points = [*by_seed.values()]
    gains = 100 * gains_of_cases(rows, scratch, [*by_seed])
    intervals = (
        bootstrap_interval(gains, draw_seeds=False),
        bootstrap_interval(gains, draw_seeds=True),
        t_interval(points),
    )
    texts = ("-" if np.isnan(low) else f"{low:+.1f} to {high:+.1f}" for low, high in intervals)  # NaN: one seed
    return dict(zip(GAIN_COLUMNS, (f"{fmean(points):+.1f}", join(points, "+.1f"), *texts), strict=True))


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


def t_interval(points: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean by Student's t; NaN for a single value."""
    if len(points) < 2:
        return float("nan"), float("nan")
    half = stats.t.ppf(0.975, len(points) - 1) * stdev(points) / len(points) ** 0.5
    return fmean(points) - half, fmean(points) + half


def _detail_columns(rows: pd.DataFrame) -> Row:
    """Return the Dice of each class, the surface distance, and the numbers of failures."""
    distances = rows["sd95"].dropna()
    by_class = rows.groupby("class")["dice"].mean()
    worst_class = rows.groupby(["seed", "class"])["dice"].mean().groupby("seed").min()
    return {
        **{name.lower().replace("_", " "): f"{dice:.3f}" for name, dice in by_class.items()},
        "sd95, mm": f"{distances.mean():.2f}" if len(distances) else "-",
        "not found": _not_found(rows),
        "collapsed": str((worst_class < COLLAPSED_DICE).sum()),
    }


def _not_found(rows: pd.DataFrame) -> str:
    return f"{rows['sd95'].isna().sum()} of {len(rows)}"


# ---------------------------------------------------------------- length of the pretraining


def arms_by_length(scores: pd.DataFrame, config: Mapping[str, Any]) -> list[dict[int, str]]:
    """Return the groups of arms with scores that differ in the iterations of their pretraining alone.

    Args:
        scores: of one network and number of labels.
    """
    groups: dict[str, dict[int, str]] = {}
    for arm, changes in config["arms"].items():
        if arm != "scratch" and len(select(scores, arm=arm)):
            settings = pretraining_settings(config, Cell(scores["plans"].iloc[0], arm, labels=0, seed=0))
            iterations = settings.pop("num_epochs") * settings["iterations_per_epoch"]
            groups.setdefault(json.dumps([settings, changes.get("finetuning")], sort_keys=True), {})[iterations] = arm
    return [dict(sorted(group.items())) for group in groups.values() if len(group) > 1]


def lengths_table(scores: pd.DataFrame, config: Mapping[str, Any]) -> list[Row]:
    """Return one row for every length of a pretraining, network and number of labels: the gain over scratch."""
    return [
        {
            "plans": plans,
            "labels": str(labels),
            "pretraining": arm,
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
                start = {"plans": plans, "labels": str(labels), "pretraining": arm, "seeds": str(len(ends))}
                early = {f"after {iteration}": _mean_dice(rows, iteration) for iteration in EARLY_ITERATIONS}
                end = {"at the end": mean_and_deviation(ends), "of each seed": join(ends, ".3f")}
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
        "iterations to scratch's end": "-" if not reached else "not" if middle == NEVER else f"{middle:.0f}",
        "share of scratch's iterations": by_seed if arm != "scratch" and shares else "-",
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
        start = {"plans": plans, "labels": str(labels), "variant": variant, "pretraining": arm, "seeds": str(len(dice))}
        table.append(start | {"Dice": mean_and_deviation(dice), "of each seed": join(dice, ".3f")})
    return table


def early_table(curves: pd.DataFrame) -> list[Row]:
    """Return one row for every variant: pseudo Dice after the first iterations and at the end, mean and each seed."""
    table = []
    for (plans, labels, variant, arm), rows in curves.groupby(["plans", "labels", "variant", "arm"]):
        row = {"plans": plans, "labels": str(labels), "variant": variant, "pretraining": arm}
        for iteration in EARLY_ITERATIONS:
            row[f"after {iteration}"] = mean_and_each([*dice_by_seed(select(rows, iteration=iteration)).values()])
        row["at the end"] = mean_and_each([smooth(of_seed).iloc[-1] for _, of_seed in rows.groupby("seed")])
        table.append(row)
    return table


def mean_and_each(dice: Sequence[float]) -> str:
    return f"{fmean(dice):.3f} ({join(dice, '.3f')})" if dice else "-"


# ---------------------------------------------------------------- pretrainings


def pretrainings_table(folder: Path) -> list[Row]:
    """Return one row for every ``pretext_report.json`` in a folder: what a network had learnt of its pretext."""
    table = []
    for file in sorted(folder.glob("*.json")):
        report = json.loads(file.read_text(), object_hook=_with_nan)
        settings, dice, shares = report["settings"], report["dice_per_class"], report["restored_share"]
        table.append(
            {
                "pretext": settings["pretext"],
                "changed settings": _other_than_default(settings),
                "iterations": str(settings["num_epochs"] * settings["iterations_per_epoch"]),
                "samples of the report": str(report["samples"]),
                "mean Dice of the fusion classes": f"{fmean(dice.values()):.2f}" if dice else "-",
                "Dice of each": join([*dice.values()], ".2f") or "-",
                "restored share": join([*shares.values()], ".2f") or "-",
            }
        )
    return sorted(table, key=lambda row: (row["pretext"], row["changed settings"], int(row["iterations"])))


def _with_nan(entries: dict[str, Any]) -> dict[str, Any]:
    """Return an object of JSON with NaN for null, as the report has for a class that does not occur."""
    return {name: np.nan if value is None else value for name, value in entries.items()}


def _other_than_default(settings: Mapping[str, Any]) -> str:
    """Return the settings of a pretraining that do not have their default."""
    defaults = VFSettings.resolve({}, {"nnUNet_vf_pretext": settings["pretext"]}).as_dict()
    others = settings.keys() - SHOWN_APART
    changed = sorted(name for name in others if settings[name] != defaults.get(name))
    return ", ".join(f"{name}={format_value(settings[name])}" for name in changed) or "-"
