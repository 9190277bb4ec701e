"""A picture of imported cases with the body outlined: whether label 1 is the body is seen at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813  its own convention
from matplotlib.figure import Figure


def draw_bodies(cases: Sequence[tuple[str, Path, Path]], path: Path) -> None:
    """Draw the middle slices of each case across its three axes, in millimetres, with the edge of label 1 in red.

    Args:
        cases: name, image and label.
        path: of the PNG file.
    """
    figure = Figure(figsize=(8, 2.6 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 3, squeeze=False)
    for row, (name, image_file, label_file) in zip(grid, cases, strict=True):
        image = sitk.ReadImage(str(image_file))
        volume, body = (sitk.GetArrayFromImage(each) for each in (image, sitk.ReadImage(str(label_file))))
        low, high = np.percentile(volume[volume.shape[0] // 2], (1, 99))
        spacing = image.GetSpacing()[::-1]
        for axis, axes in enumerate(row):
            middle = volume.shape[axis] // 2
            tall, wide = (mm for number, mm in enumerate(spacing) if number != axis)
            axes.imshow(volume.take(middle, axis), cmap="gray", vmin=low, vmax=high, aspect=tall / wide)
            outline = body.take(middle, axis)
            if outline.min() < outline.max() and min(outline.shape) > 1:
                axes.contour(outline, [0.5], colors="red", linewidths=0.8)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_title(f"{name}: body {body.mean():.0%}", fontsize=8, loc="left")
    figure.savefig(path, dpi=80, format="png")
