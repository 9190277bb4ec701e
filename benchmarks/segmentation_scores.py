"""Scores of one class of a segmentation against the true labels: overlap and distances between the surfaces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK


def score(truth_file: Path, prediction_file: Path, label: int, largest_component: bool = False) -> dict[str, float]:
    """Return Dice, Jaccard, and mean and 95th percentile of the distances between both surfaces in mm.

    The distances are NaN if one of the surfaces is empty.

    Args:
        largest_component: score only the largest connected component of the prediction.
    """
    truth, prediction = (SimpleITK.ReadImage(str(file)) == label for file in (truth_file, prediction_file))
    if largest_component:
        prediction = keep_largest_component(prediction)
    true, predicted = (SimpleITK.GetArrayFromImage(image) > 0 for image in (truth, prediction))
    voxels = int(true.sum() + predicted.sum())
    dice = 2 * int((true & predicted).sum()) / voxels if voxels else float("nan")
    overlap = {"dice": dice, "jaccard": dice / (2 - dice)}
    if not (true.any() and predicted.any()):
        return {**overlap, "sd95": float("nan"), "asd": float("nan")}
    distances = np.concatenate([_surface_distances(truth, prediction), _surface_distances(prediction, truth)])
    return {**overlap, "sd95": float(np.percentile(distances, 95)), "asd": float(distances.mean())}


def keep_largest_component(mask: SimpleITK.Image) -> SimpleITK.Image:
    """Return the largest component of a mask; voxels that share a corner are connected."""
    components = SimpleITK.ConnectedComponent(mask, True)
    return SimpleITK.RelabelComponent(components, sortByObjectSize=True) == 1


def _surface_distances(image: SimpleITK.Image, other: SimpleITK.Image) -> np.ndarray:
    """Return the distances in mm from the surface voxels of an image to the surface of another."""
    surface, target = (SimpleITK.LabelContour(each) for each in (image, other))
    distance = SimpleITK.SignedMaurerDistanceMap(target, squaredDistance=False, useImageSpacing=True)
    return np.abs(SimpleITK.GetArrayFromImage(distance)[SimpleITK.GetArrayFromImage(surface) > 0])
