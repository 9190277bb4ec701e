"""Read the images of preprocessed cases; retry if the file system fails; say why a case is rejected."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from nnunetv2_vf.errors import printable

_RETRY_PAUSES = (1.0, 10.0)  # seconds before the second and the third attempt to read
_IMAGE_ENDINGS = (".b2nd", ".npy", ".npz")  # of nnU-Net's dataset classes
_Result = TypeVar("_Result")


class PreprocessedCases(Protocol):
    """The part of nnU-Net's ``nnUNetBaseDataset`` that pretraining uses."""

    identifiers: list[str]
    source_folder: str

    def load_case(self, identifier: str) -> Sequence[Any]:
        """Return the image (C, D, H, W), opened but not read, followed by items that pretraining ignores."""
        ...


class RejectedCase(NamedTuple):
    """A case from which no sub-volume could be drawn.

    Attributes:
        unusable: True if this process will not try the case again; False if another draw may succeed.
    """

    case: str
    reason: str
    unusable: bool


class RejectedCaseError(Exception):
    """No sub-volume could be drawn from a case; ``reason`` and ``unusable`` are as in :class:`RejectedCase`."""

    def __init__(self, reason: str, unusable: bool):
        super().__init__(reason)
        self.reason = reason
        self.unusable = unusable


def open_image(cases: PreprocessedCases, case: str, channels: int | None) -> np.ndarray:
    """Open the image (C, D, H, W) of a case without reading its voxels.

    Args:
        channels: required number of channels; None: any number.

    Raises:
        RejectedCaseError: the image cannot be opened, or has another shape.
    """
    image = read_with_retries(lambda: _open(cases, case), cases, case)
    shape = image.shape
    if len(shape) != 4 or min(shape) == 0 or channels not in (None, shape[0]):
        expected = f"({channels or 'channels'}, depth, height, width)"
        raise RejectedCaseError(f"has the shape {shape}; expected: {expected}", unusable=True)
    return image


def _open(cases: PreprocessedCases, case: str) -> np.ndarray:
    """Return the image of a case, opened.

    Raises:
        ValueError: its header is damaged: blosc2 opens an array whose shape needs more voxels than the file holds, and
            then never returns from reading it; or it opens something that is no array.
    """
    image: np.ndarray = cases.load_case(case)[0]
    if not hasattr(image, "shape"):
        raise ValueError("holds no array")
    chunks = getattr(image, "schunk", None)  # of blosc2; they are padded
    if chunks is not None and chunks.nbytes < math.prod(image.shape) * image.dtype.itemsize:
        raise ValueError(f"has {chunks.nbytes} bytes, too few for the shape {image.shape}")
    return image


def read_with_retries(read: Callable[[], _Result], cases: PreprocessedCases, case: str) -> _Result:
    """Return ``read()``, which reads a case; while the file system fails, try again after a pause.

    Raises:
        RejectedCaseError: the file is damaged or missing, or the last attempt failed.
    """
    pauses = list(_RETRY_PAUSES)
    while True:
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # blosc2 raises the same errors for a damaged file and for a failing file system
            if not pauses:
                reason = f"cannot be read ({type(error).__name__}: {printable(str(error), 200)})"
                raise RejectedCaseError(reason, unusable=True) from error
        if _file_system_works(cases.source_folder, case):
            pauses = []  # the next attempt decides
        else:
            time.sleep(pauses.pop(0))


def _file_system_works(folder: str, case: str) -> bool:
    """Return True if all bytes of a case's image can be read, or it has surely been deleted."""
    try:
        for ending in _IMAGE_ENDINGS:
            with contextlib.suppress(FileNotFoundError):
                Path(folder, case + ending).read_bytes()
        return Path(folder).is_dir()  # if not, the files may be on a disk that is not mounted
    except OSError:
        return False


def has_contrast(image: np.ndarray) -> bool:
    """Return True if a channel of an image (C, D, H, W) has two different finite values. Reads the whole image."""
    channels = (np.asarray(image[channel]) for channel in range(image.shape[0]))
    finite_values = (channel[np.isfinite(channel)] for channel in channels)
    return any(values.size > 0 and values.min() < values.max() for values in finite_values)
