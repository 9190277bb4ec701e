"""Small helpers for SimpleITK images and errors."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention

# Passing this reader's name saves ITK from probing all readers: a tenth of the time of a small volume.
NIFTI_IO = "NiftiImageIO"


def image_on_grid(array: np.ndarray, reference: sitk.Image) -> sitk.Image:
    """Return an array (slices, rows, columns) as an image with the spacing, origin and direction of another image."""
    image = sitk.GetImageFromArray(array, isVector=False)
    image.CopyInformation(reference)
    return image


def error_line(error: Exception) -> str:
    """Return the part of a library's error message that says what is wrong: its last line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = " ".join(str(error).strip().rpartition("\n")[2].split()).removeprefix("sitk::ERROR: ")
    # ITK's MetaImage reader gives the second message for a truncated file.
    return "too short or damaged" if line in ("", "Reason: No such file or directory") else line
