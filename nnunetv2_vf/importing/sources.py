"""A source: a volume file, the files of a case with several channels, or a folder of DICOM files. And its names."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass

from nnunetv2_vf.importing.layouts import short_bids_name

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".hdr.gz", ".hdr")
# The endings that the voxels may have if a file is only a header.
_DATA_ENDINGS = {
    ".nhdr": (".raw", ".raw.gz", ".raw.bz2"),
    ".mhd": (".raw", ".zraw"),
    ".hdr.gz": (".img.gz",),
    ".hdr": (".img",),
}
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_OTHER_ENDINGS = (".json", ".txt", ".csv", ".tsv", ".xml", ".pdf", ".png", ".jpg", ".bval", ".bvec", ".raw", ".zraw")
_CASE_AND_CHANNEL = re.compile(r"(.+)_(\d{4})")
_MAX_READABLE_NAME = 64


@dataclass(frozen=True, slots=True)
class Source:
    """One unit of work: a file, the files of a case's channels in order, or a folder of DICOM files.

    Attributes:
        paths: absolute paths. Links are not resolved, so a link is a source of its own.
        stamp: sizes and times of the files; for a DICOM folder the number of files and the time of the folder. A
            different stamp means that the source has changed. Empty if the files cannot be listed.
        rejection: the reason why the source cannot be used, if the listing already shows one; else empty.
    """

    paths: tuple[str, ...]
    stamp: str
    rejection: str = ""

    @property
    def key(self) -> str:
        """The first path. It identifies the source in the journal and the report."""
        return self.paths[0]

    @property
    def stem(self) -> str:
        """The file name without its ending, and without nnU-Net's ``_0000`` for the first channel."""
        stem = file_stem(self.key)
        case, channel = split_channel(stem)
        return case if channel == 0 else stem


def volume_ending(name: str) -> str:
    """Return the ending of a volume file's name in lower case, or an empty string for any other file."""
    lower = name.lower()
    return next((ending for ending in VOLUME_ENDINGS if lower.endswith(ending)), "")


def file_stem(path: str) -> str:
    """Return the name of a file without the ending of a volume."""
    name = os.path.basename(path)
    return name[: -len(volume_ending(name)) or None]


def split_channel(stem: str) -> tuple[str, int | None]:
    """Return case and number of the channel of a name like ``CASE_0001``; the name and None if it has no number."""
    match = _CASE_AND_CHANNEL.fullmatch(stem)
    return (match[1], int(match[2])) if match else (stem, None)


def data_files(path: str) -> list[str]:
    """Return the paths at which the voxels may be if a file is only a header; else nothing."""
    ending = volume_ending(path)
    endings = _DATA_ENDINGS.get(ending, ())
    if ending and path[-len(ending) :].isupper():  # A.HDR has its voxels in A.IMG
        endings = tuple(data_ending.upper() for data_ending in endings)
    return [path[: -len(ending)] + data_ending for data_ending in endings]


def is_other_file(name: str) -> bool:
    """True if the name says that the file is neither a volume nor a DICOM slice."""
    return name.lower() == "dicomdir" or name.lower().endswith(_OTHER_ENDINGS)


def has_dicom_prefix(path: str) -> bool:
    """True if the file's first bytes are those of a DICOM file."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def may_be_dicom(folder: str, name: str) -> bool:
    """True if a file without a volume ending is a DICOM file, according to its name or else to its first bytes."""
    if name.lower().endswith(_DICOM_ENDINGS):
        return True
    return not is_other_file(name) and has_dicom_prefix(os.path.join(folder, name))


def case_name(stem: str, *identity: str) -> str:
    """Return a case name that nnU-Net accepts, stable between runs and unique to the source.

    Args:
        stem: the readable part. Characters other than letters, digits and hyphens become underscores. Of a long BIDS
            name only subject, session and suffix are kept, of any other name the first 64 characters.
        identity: strings that identify the source. Their hash makes the name unique.
    """
    if len(stem) > _MAX_READABLE_NAME:
        stem = short_bids_name(stem)
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_")[:_MAX_READABLE_NAME] or "volume"
    return f"{readable}_{_hash(*identity)[:12]}"


def is_in_part(source: Source, part_id: int, num_parts: int) -> bool:
    """True if the source belongs to that part of the import.

    The part depends on the path alone, so it stays the same when other sources are added.
    """
    return int(_hash(source.key), 16) % num_parts == part_id


def _hash(*identity: str) -> str:
    return hashlib.sha256("\0".join(identity).encode(errors="surrogateescape")).hexdigest()
