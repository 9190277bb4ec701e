"""Pictures of pretext samples, of the network's predictions and of the confusion matrix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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

from nnunetv2_vf.durable_files import replacing
from nnunetv2_vf.pretext.fusion import fit_intensity_transforms
from nnunetv2_vf.pretext.task import make_batch, split_output
from nnunetv2_vf.settings import VFSettings

_RESTORED = "hidden blocks restored"
_VIEWS = ("along z", "along y", "along x")  # axes of the original image; nnU-Net keeps its orientation


class Example(NamedTuple):
    """One pretext sample with its prediction; arrays (D, H, W), images of the first channel only.

    Attributes:
        volumes: intensities by the title of their column.
        maps: fusion classes by the title of their column.
    """

    title: str
    volumes: dict[str, np.ndarray]
    maps: dict[str, np.ndarray]


def make_examples(
    batch: dict[str, Any],
    settings: VFSettings,
    device: torch.device,
    predict: Callable[[Tensor], Tensor] | None = None,
) -> list[Example]:
    """Make a batch of samples for :func:`draw_examples`.

    Args:
        batch: as :func:`nnunetv2_vf.pretext.loader.collate` returns it.
        predict: the network: input (B, C, D, H, W) to output (B, channels, D, H, W).
    """
    tensors = batch["tensors"]
    pretext = make_batch(tensors, settings, device)
    logits, restored = (None, None) if predict is None else split_output(predict(pretext.data), settings)
    volumes: dict[str, Tensor | None] = {}
    maps: dict[str, Tensor | None] = {}
    if settings.has_fusion:
        transform_foreground, transform_background = fit_intensity_transforms(tensors)
        volumes["foreground sub-volume"] = transform_foreground(tensors["foreground"])
        volumes["background sub-volume"] = transform_background(tensors["background"])
        maps["fusion map (target)"] = pretext.fusion_map
        maps["prediction"] = None if logits is None else logits.argmax(1)
    if pretext.restoration is not None:
        volumes["fused volume" if settings.has_fusion else "volume"] = pretext.restoration.volume
        volumes["hidden blocks (network input)"] = pretext.data
        hidden = pretext.restoration.mask[:, None]
        volumes[_RESTORED] = None if restored is None else pretext.data.where(~hidden, restored.to(pretext.data))
    else:
        volumes["fused volume (network input)"] = pretext.data
    columns = {title: volume[:, 0].cpu().numpy() for title, volume in volumes.items() if volume is not None}
    class_columns = {title: classes.cpu().numpy() for title, classes in maps.items() if classes is not None}
    return [
        Example(
            " + ".join(cases),
            {title: column[i] for title, column in columns.items()},
            {title: column[i] for title, column in class_columns.items()},
        )
        for i, cases in enumerate(batch["cases"])
    ]


def draw_examples(examples: Sequence[Example], views: Sequence[str], settings: VFSettings, path: Path) -> None:
    """Draw the middle slices of each example along all three axes, with a legend of the fusion classes, to a PNG file.

    Args:
        views: names of the views along the axes (D, H, W), see :func:`view_names`.
    """
    titles = [*examples[0].volumes, *examples[0].maps]
    num_rows = len(views) * len(examples)
    figure = Figure(figsize=(2.6 * len(titles), 2.4 * num_rows + 0.8), layout="constrained")
    grid = figure.subplots(num_rows, len(titles), squeeze=False)
    for example, rows in zip(examples, np.split(grid, len(examples)), strict=True):
        grey = _grey_scale(example)
        for axis, row in enumerate(rows):
            _draw_row(row, example, axis, grey, _class_colormap(settings.coefficient_steps))
            row[0].set_ylabel(f"{example.title}\n{views[axis]}" if axis == 0 else views[axis])
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9)
    for axes in grid.flat:
        axes.set_xticks([])
        axes.set_yticks([])
    if settings.has_fusion:
        patches = [
            Patch(facecolor=colour, edgecolor="black", label=name)
            for name, colour in class_colours(settings.coefficient_steps).items()
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 6))
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=80, format="png")


def _grey_scale(example: Example) -> dict[str, Any]:
    """Return one grey scale for all volumes of an example. A prediction may have any values, so it does not count."""
    low, high = np.percentile(np.stack([v for k, v in example.volumes.items() if k != _RESTORED]), (0.5, 99.5))
    return {"cmap": "gray", "vmin": low, "vmax": high}


def _draw_row(
    row: Sequence[Axes], example: Example, axis: int, grey: Mapping[str, Any], colormap: ListedColormap
) -> None:
    """Draw the middle slices of an example along one axis, one slice in each of the axes."""
    volumes, maps = [*example.volumes.values()], [*example.maps.values()]
    class_borders = BoundaryNorm(np.arange(colormap.N + 1) - 0.5, colormap.N)
    for axes, volume in zip(row[: len(volumes)], volumes, strict=True):
        axes.imshow(_middle_slice(volume, axis), **grey)
    for axes, classes in zip(row[len(volumes) :], maps, strict=True):
        axes.imshow(_middle_slice(classes, axis), cmap=colormap, norm=class_borders, interpolation="nearest")


def _middle_slice(volume: np.ndarray, axis: int) -> np.ndarray:
    return volume.take(volume.shape[axis] // 2, axis)


def draw_report(confusion: np.ndarray, dice: Sequence[float], share: Sequence[float], path: Path) -> None:
    """Draw the confusion matrix, the Dice of every fusion class and the restored share of every channel to a PNG file.

    Args:
        confusion: (K + 1, K + 1), number of voxels by (true class, predicted class); without rows: not drawn.
        dice: of the K + 1 classes; NaN for a class that does not occur.
        share: of the channels; NaN for one without variance.
    """
    has_fusion = len(confusion) > 0
    figure = Figure(figsize=(12 if has_fusion else 6, 5), layout="constrained")
    *matrix_axes, score_axes = figure.subplots(1, 1 + has_fusion, squeeze=False)[0]
    for axes in matrix_axes:
        _draw_matrix(axes, confusion)
    _draw_bars(score_axes, dice, share)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, dpi=100, format="png")


def _draw_matrix(axes: Axes, confusion: np.ndarray) -> None:
    names = class_names(len(confusion) - 1)
    shares = confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.2f}", ha="center", va="center", color="w" if share < 0.6 else "k")
    axes.set_xticks(range(len(names)), names, rotation=45)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.figure.colorbar(image, ax=axes, label="share of the voxels of the true class")


def _draw_bars(axes: Axes, dice: Sequence[float], share: Sequence[float]) -> None:
    colours, scores = _score_colours(len(dice), len(share)), [*dice, *share]
    heights = np.nan_to_num(scores).clip(0)  # a share has no lower bound
    bars = axes.bar(list(colours), heights, color=list(colours.values()), edgecolor="black")
    axes.bar_label(bars, [f"{value:.3f}" for value in scores])
    axes.set_ylim(0, 1)
    axes.set_xlim(-1, len(scores))
    names = {"Dice of a fusion class": dice, "restored share": share}
    axes.set_ylabel(" or ".join(name for name, values in names.items() if len(values)))
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")


def class_names(coefficient_steps: int) -> list[str]:
    """Return the names of the fusion classes 0..K, which are their coefficients."""
    return [f"a = {label}/{coefficient_steps}" for label in range(coefficient_steps + 1)]


def share_names(channels: int) -> list[str]:
    """Return the names of the restored shares of the image channels."""
    return [f"restored share, channel {channel}" for channel in range(channels)]


def class_colours(coefficient_steps: int) -> dict[str, Any]:
    """Return the colour (RGBA) of every fusion class by its name; all pictures use the same colours."""
    colormap = _class_colormap(coefficient_steps)
    return {name: colormap(label) for label, name in enumerate(class_names(coefficient_steps))}


def score_colours(settings: VFSettings, channels: int) -> dict[str, Any]:
    """Return the colour of the curve of each output of the network, by its name.

    Args:
        channels: number of image channels.
    """
    return _score_colours(settings.num_fusion_classes, channels if settings.has_mask else 0)


def _score_colours(classes: int, shares: int) -> dict[str, Any]:
    colours = class_colours(classes - 1) if classes else {}
    return colours | {name: colormaps["autumn"](i / shares) for i, name in enumerate(share_names(shares))}


def _class_colormap(coefficient_steps: int) -> ListedColormap:
    return ListedColormap(colormaps["viridis"](np.linspace(0, 1, coefficient_steps + 1)))


def view_names(transpose_forward: Sequence[int]) -> list[str]:
    """Return the names of the views along the axes (D, H, W) of preprocessed volumes.

    Args:
        transpose_forward: from the plans; nnU-Net may have transposed the axes of the original image.
    """
    return [_VIEWS[axis] for axis in transpose_forward]
