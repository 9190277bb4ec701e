"""Small helpers for SimpleITK images and errors."""

from __future__ import annotations

import re

import numpy as np
import SimpleITK as sitk  # noqa: N813  the package's own convention

# Passing this reader's name saves ITK from probing all readers: a tenth of the time of a small volume.
NIFTI_IO = "NiftiImageIO"


def image_on_grid(array: np.ndarray, reference: sitk.Image) -> sitk.Image:
    """Return an array (slices, rows, columns) as an image with the spacing, origin and direction of another image."""
    image = sitk.GetImageFromArray(array, isVector=False)
    image.CopyInformation(reference)
    return image


def describe_error(error: Exception) -> str:
    """Return the reason for the report if a library raises an error that we do not know."""
    return f"error: {type(error).__name__}: {error_line(error)}"


def error_line(error: Exception) -> str:
    """Return the part of a library's error message that says what is wrong: its last line that is no matrix row."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line for line in str(error).splitlines() if re.search("[A-Za-z]{3}", line)]
    line = " ".join(lines[-1].split()) if lines else ""
    line = re.sub(r"^(sitk::ERROR|ITK ERROR: \w+\(\w+\)): ", "", line).partition(" Refusing to change direction")[0]
    # ITK's MetaImage reader gives the second message for a truncated file.
    return "too short or damaged" if line in ("", "Reason: No such file or directory") else line
