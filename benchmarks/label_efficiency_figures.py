"""Figures of a few-labels experiment: Dice by number of labels, curves, and gain by length of the pretraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from label_efficiency_tables import arms_by_length, points_by_seed, select, smooth
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = {
    "scratch": "tab:gray",
    "encoder": "tab:orange",
    "full": "tab:blue",
    "fusion": "tab:blue",
    "fusion_1000": "lightsteelblue",
    "fusion_9000": "navy",
    "masked": "tab:green",
    "fusion_masked": "tab:purple",
    "fusion_masked_1000": "plum",
    "fusion_masked_16000": "indigo",
    "nnssl_masked": "yellowgreen",
    "nnssl_fusion": "skyblue",
}


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
    axis.set(xlabel="iteration", ylabel="pseudo Dice (validation)")
    axis.grid(alpha=0.3)


def draw_lengths(scores: pd.DataFrame, config: Mapping[str, Any], file: Path) -> None:
    """Draw for every network and number of labels the gain over scratch by iterations of the pretraining."""
    groups = [group for group in scores.groupby(["plans", "labels"]) if arms_by_length(group[1], config)]
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
