"""File and folder names of common datasets: which of them hold labels, and the parts of BIDS names."""

from __future__ import annotations

import re
from collections.abc import Collection

_LABEL_WORDS = {
    *("seg", "segs", "dseg", "aseg", "probseg", "segmentation", "segmentations", "label", "labels", "labelmap"),
    *("mask", "masks", "msk", "gt", "groundtruth", "annotation", "annotations"),
}
_LABEL_FOLDER = re.compile(
    r"(labels?|masks?|segs?|segmentations?)(tr|ts|va|val|train|test)?|gt|ground[ _-]?truths?|annotations?|labelmaps?",
    re.IGNORECASE,
)
_BIDS_NAME = re.compile(
    r"(?P<subject>sub-[A-Za-z0-9]+)(?P<session>_ses-[A-Za-z0-9]+)?(?:_[a-z]+-[A-Za-z0-9+]+)*_(?P<suffix>[A-Za-z0-9]+)"
)


def is_label_file(stem: str) -> bool:
    """True if the last word of a file's name says that it holds labels.

    Numbers are no words: ``patient001_frame01_gt``, ``BraTS2021_00000_seg``, ``segmentation-0``, ``label0001``.
    """
    words = [word.rstrip("0123456789").lower() for word in re.split(r"[^A-Za-z0-9]+", stem)]
    return next((word for word in reversed(words) if word), "") in _LABEL_WORDS


def is_label_folder(name: str, siblings: Collection[str]) -> bool:
    """True if the name of a folder says that it holds labels, or if it is the ``derivatives`` of a BIDS dataset.

    Args:
        siblings: names of the files and folders in the same folder.
    """
    if name == "derivatives":
        return any(sibling.startswith("sub-") for sibling in siblings) or not {
            "dataset_description.json",
            "rawdata",
        }.isdisjoint(siblings)
    return _LABEL_FOLDER.fullmatch(name) is not None


def bids_suffix(stem: str) -> str:
    """Return the suffix of a BIDS file name, such as ``T1w``; empty for any other name."""
    match = _BIDS_NAME.fullmatch(stem)
    return match["suffix"] if match else ""


def short_bids_name(stem: str) -> str:
    """Return subject, session and suffix of a BIDS file name; any other name as it is."""
    match = _BIDS_NAME.fullmatch(stem)
    return f"{match['subject']}{match['session'] or ''}_{match['suffix']}" if match else stem
