"""File and folder names of common datasets: which of them hold labels, and the parts of BIDS names."""

from __future__ import annotations

import re
from collections.abc import Collection

_LABEL_WORDS = {
    *("seg", "segs", "dseg", "aseg", "probseg", "segmentation", "segmentations", "label", "labels", "labelmap"),
    *("labelmaps", "mask", "masks", "msk", "gt", "groundtruth", "truth", "annotation", "annotations"),
}
# Words after the word for labels in names of folders: labelsTr, MASKS_DICOM.
_PART_OR_FORMAT = {"tr", "ts", "va", "val", "train", "training", "test", "dicom", "nifti"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # labelsTr -> labels, Tr
# Suffixes of images in the BIDS specification 1.10.
_BIDS_SUFFIXES = {
    *("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "UNIT1", "angio", "T2star", "FLASH"),
    *("T1map", "T2map", "T2starmap", "R1map", "R2map", "R2starmap", "PDmap", "MTRmap", "MTsat", "MWFmap", "Chimap"),
    *("MEGRE", "MESE", "MP2RAGE", "MPM", "MTR", "MTS", "VFA", "IRT1", "TB1map", "RB1map", "S0map", "M0map", "PD"),
    *("bold", "cbv", "sbref", "phase", "dwi", "asl", "m0scan", "epi", "fieldmap", "phasediff", "phase1", "phase2"),
    *("magnitude", "magnitude1", "magnitude2", "pet", "ct"),
}
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
    words = [word.lower() for word in _WORD.findall(name)]
    return next((word for word in reversed(words) if word not in _PART_OR_FORMAT), "") in _LABEL_WORDS


def bids_suffix(stem: str) -> str:
    """Return the suffix of a BIDS file name, such as ``T1w``; empty for other names and for unknown suffixes."""
    match = _BIDS_NAME.fullmatch(stem)
    return match["suffix"] if match and match["suffix"] in _BIDS_SUFFIXES else ""


def short_bids_name(stem: str) -> str:
    """Return subject, session and suffix of a BIDS file name; any other name as it is."""
    match = _BIDS_NAME.fullmatch(stem)
    return f"{match['subject']}{match['session'] or ''}_{match['suffix']}" if match else stem
