"""Read the images of preprocessed cases; retry if the file system fails; say why a case is rejected."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from nnunetv2_vf.errors import printable

_RETRY_PAUSES = (1.0, 10.0)  # seconds before the second and the third attempt to read
_Result = TypeVar("_Result")


class PreprocessedCases(Protocol):
    """The part of nnU-Net's ``nnUNetBaseDataset`` that pretraining uses."""

    identifiers: list[str]

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
    image: np.ndarray = read_with_retries(lambda: cases.load_case(case)[0])
    shape = image.shape
    if len(shape) != 4 or min(shape) == 0 or channels not in (None, shape[0]):
        expected = f"({channels or 'channels'}, depth, height, width)"
        raise RejectedCaseError(f"has the shape {shape}; expected: {expected}", unusable=True)
    return image


def read_with_retries(read: Callable[[], _Result]) -> _Result:
    """Return ``read()``; if the file system fails, try again after a pause.

    Raises:
        RejectedCaseError: the file is damaged or missing, or the last attempt failed.
    """
    pauses = list(_RETRY_PAUSES)
    while True:
        try:
            return read()
        except MemoryError:
            raise
        except Exception as error:  # the reader may raise any exception for a damaged file
            is_temporary = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            if not pauses or not is_temporary:
                reason = f"cannot be read ({type(error).__name__}: {printable(str(error), 200)})"
                raise RejectedCaseError(reason, unusable=True) from error
        time.sleep(pauses.pop(0))


def has_contrast(image: np.ndarray) -> bool:
    """Return True if a channel of an image (C, D, H, W) has two different finite values. Reads the whole image.

    Raises:
        RejectedCaseError: the image cannot be read.
    """
    channels = read_with_retries(lambda: [np.asarray(image[channel]) for channel in range(image.shape[0])])
    finite_values = (channel[np.isfinite(channel)] for channel in channels)
    return any(values.size > 0 and values.min() < values.max() for values in finite_values)
