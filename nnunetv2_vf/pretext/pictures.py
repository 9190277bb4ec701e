"""Pictures: what the network sees, what it answers, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from nnunetv2_vf.pretext.fusion import fuse_batch, intensity_maps
from nnunetv2_vf.settings import VFSettings

_PLANES = ("axial", "coronal", "sagittal")  # across the axes (z, y, x) of an image as it was acquired


class Example(NamedTuple):
    """One pretext sample; arrays (D, H, W), of the first channel."""

    title: str
    foreground: np.ndarray
    background: np.ndarray
    fused: np.ndarray
    fusion_map: np.ndarray
    answer: np.ndarray | None = None


def class_names(coefficient_steps: int) -> list[str]:
    """The names of the fusion classes 0..K: their coefficients."""
    return [f"a = {label}/{coefficient_steps}" for label in range(coefficient_steps + 1)]


def plane_names(transpose_forward: Sequence[int]) -> list[str]:
    """The planes across the axes (D, H, W) of preprocessed volumes, which nnU-Net may have transposed.

    Args:
        transpose_forward: of the plans.
    """
    return [_PLANES[axis] for axis in transpose_forward]


def draw_examples(examples: Sequence[Example], planes: Sequence[str], coefficient_steps: int, path: Path) -> None:
    """Draw three orthogonal middle slices of each example, with a legend of the fusion classes.

    Args:
        planes: of :func:`plane_names`.
    """
    columns = [
        "foreground sub-volume",
        "background sub-volume",
        "fused: what the network sees",
        "fusion map: what it is to answer",
    ]
    if examples[0].answer is not None:
        columns.append("the network's answer")
    colours = class_colours(coefficient_steps)

    rows = len(planes) * len(examples)
    figure = Figure(figsize=(2.6 * len(columns), 2.4 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for row, (example, axis) in enumerate((e, a) for e in examples for a in range(3)):
        images = (example.foreground, example.background, example.fused)
        low, high = np.percentile(np.stack(images), (0.5, 99.5))  # one grey scale for the three
        for axes, image in zip(grid[row], images, strict=False):
            axes.imshow(_middle_slice(image, axis), cmap="gray", vmin=low, vmax=high)
        maps = [image for image in (example.fusion_map, example.answer) if image is not None]
        for axes, labels in zip(grid[row, 3:], maps, strict=True):
            axes.imshow(
                _middle_slice(labels, axis),
                cmap=colours,
                norm=BoundaryNorm(np.arange(coefficient_steps + 2) - 0.5, colours.N),
                interpolation="nearest",
            )
        grid[row, 0].set_ylabel(f"{example.title}\n{planes[axis]}" if axis == 0 else planes[axis])
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    handles = [
        Patch(facecolor=colours(label), edgecolor="black", label=name)
        for label, name in enumerate(class_names(coefficient_steps))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6))
    figure.savefig(path, dpi=80, format="png")


def draw_confusion(confusion: np.ndarray, dice: Sequence[float], path: Path) -> None:
    """Draw the confusion matrix (K + 1, K + 1; rows are the truth) and the Dice of every fusion class."""
    names = class_names(len(confusion) - 1)
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    figure = Figure(figsize=(12, 5), layout="constrained")
    matrix, bars = figure.subplots(1, 2)
    image = matrix.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        matrix.text(column, row, f"{share:.2f}", ha="center", va="center", color="w" if share < 0.6 else "k")
    matrix.set_xticks(range(len(names)), names, rotation=45)
    matrix.set_yticks(range(len(names)), names)
    matrix.set_xlabel("answered")
    matrix.set_ylabel("true")
    figure.colorbar(image, ax=matrix, label="share of the true class")
    _draw_bars(bars, names, dice)
    figure.savefig(path, dpi=100, format="png")


def _draw_bars(axes: Axes, names: Sequence[str], dice: Sequence[float]) -> None:
    bars = axes.bar(names, np.nan_to_num(dice), color=class_colours(len(names) - 1).colors, edgecolor="black")
    axes.bar_label(bars, [f"{value:.3f}" for value in dice])
    axes.set_ylim(0, 1)
    axes.set_ylabel("Dice")
    axes.tick_params(axis="x", rotation=45)


def colour_of_class(coefficient_steps: int) -> dict[str, Any]:
    """The colour (RGBA) of every fusion class by its name, the same in every picture."""
    colours = class_colours(coefficient_steps)
    return {name: colours(label) for label, name in enumerate(class_names(coefficient_steps))}


def class_colours(coefficient_steps: int) -> ListedColormap:
    """One colour per fusion class, the same in every picture."""
    return ListedColormap(colormaps["viridis"](np.linspace(0, 1, coefficient_steps + 1)))


def _middle_slice(volume: np.ndarray, axis: int) -> np.ndarray:
    return volume.take(volume.shape[axis] // 2, axis)


def make_examples(
    batch: dict[str, Any],
    settings: VFSettings,
    device: torch.device,
    answer: Callable[[Tensor], Tensor] | None = None,
) -> list[Example]:
    """Fuse a batch of samples for :func:`draw_examples`.

    Args:
        batch: of :func:`nnunetv2_vf.pretext.sampling.collate`.
        answer: the network: (B, C, D, H, W) to classes (B, D, H, W).
    """
    tensors = batch["tensors"]
    fused_batch = fuse_batch(tensors, settings.coefficient_steps, device)
    answers: Sequence[np.ndarray | None] = [None] * len(batch["cases"])
    if answer is not None:
        answers = list(answer(fused_batch.fused).cpu().numpy())
    adjust_foreground, adjust_background = intensity_maps(tensors)
    subvolumes = adjust_foreground(tensors["foreground"]), adjust_background(tensors["background"])
    images = [t[:, 0].cpu().numpy() for t in (*subvolumes, fused_batch.fused)]
    maps = fused_batch.fusion_map.cpu().numpy()
    titles = [" + ".join(cases) for cases in batch["cases"]]
    return [Example(*fields) for fields in zip(titles, *images, maps, answers, strict=True)]
