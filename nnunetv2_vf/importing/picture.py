"""A picture of imported cases with the body outlined, to check label 1 at a glance."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention
from matplotlib.figure import Figure


def draw_bodies(cases: Sequence[tuple[str, Path, Path]], path: Path) -> None:
    """Draw the middle slice of each case along its three axes, to scale, with the edge of label 1 in red.

    Args:
        cases: name, image file and label file of each case.
        path: PNG file to write.

    Raises:
        RuntimeError: SimpleITK cannot read an image.
    """
    figure = Figure(figsize=(8, 2.6 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 3, squeeze=False)
    for row, (name, image_file, label_file) in zip(grid, cases, strict=True):
        image, label = (sitk.ReadImage(str(file)) for file in (image_file, label_file))
        volume, body = sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(label)
        low, high = np.percentile(volume[volume.shape[0] // 2], (1, 99))
        spacing = image.GetSpacing()[::-1]
        for axis, axes in enumerate(row):
            middle = volume.shape[axis] // 2
            height_mm, width_mm = (mm for other, mm in enumerate(spacing) if other != axis)
            axes.imshow(volume.take(middle, axis), cmap="gray", vmin=low, vmax=high, aspect=height_mm / width_mm)
            outline = body.take(middle, axis)
            if outline.min() < outline.max() and min(outline.shape) > 1:  # contour() needs an edge and two rows
                axes.contour(outline, [0.5], colors="red", linewidths=0.8)
            axes.set_xticks([])
            axes.set_yticks([])
        row[0].set_title(f"{name}: body {body.mean():.0%}", fontsize=8, loc="left")
    figure.savefig(path, dpi=80, format="png")
