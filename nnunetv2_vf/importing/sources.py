"""Find the sources in folders of unlabelled data: volume files, cases of several channels, and DICOM folders.

The search looks at names, sizes and times only, and at the first bytes of files whose name does not tell their format.
Listing 110,000 files takes seconds. :mod:`.readers` reads the content later.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_vf.errors import UserError

VOLUME_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")
_DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
_OTHER_ENDINGS = (".json", ".txt", ".csv", ".tsv", ".xml", ".pdf", ".png", ".jpg", ".bval", ".bvec", ".raw", ".zraw")
_CASE_AND_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True, slots=True)
class Source:
    """One unit of work: a file, the files of a case's channels in order, or a folder of DICOM files.

    Attributes:
        paths: absolute paths. Links are not resolved, so a link is a source of its own.
        stamp: sizes and times of the files; for a DICOM folder the number of files and the time of the folder. A
            different stamp means that the source has changed.
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
        name = os.path.basename(self.key)
        stem = name[: -len(volume_ending(name)) or None]
        match = _CASE_AND_CHANNEL.fullmatch(stem)
        return match[1] if match and match[2] == "0000" else stem


@dataclass(frozen=True)
class FoundSources:
    """The sources below the given paths, sorted by path, and the number of ignored files of each kind."""

    sources: list[Source]
    ignored: Counter[str]


def find_sources(paths: Sequence[Path], excluded: Path) -> FoundSources:
    """Find all sources in folders, recursively and through links. A path may also be a file: files of one folder that
    are named like channels of a case become one source, as in a folder.

    Hidden files and folders are ignored, and so are ``labelsTr`` and ``labelsTs`` beside an ``imagesTr``.

    Args:
        excluded: a folder that is not searched: the dataset that the import writes.

    Raises:
        UserError: a path does not exist, or no path contains a volume.
    """
    found: list[Source] = []
    ignored: Counter[str] = Counter()
    files: dict[str, list[str]] = {}  # folder -> names of the given files in it
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give folders or files with volumes")
        absolute = os.path.abspath(path)
        if path.is_file():
            files.setdefault(os.path.dirname(absolute), []).append(os.path.basename(absolute))
        else:
            found += _search_tree(absolute, excluded, ignored)
    for folder, names in files.items():
        found += _group_files(folder, names)
    if not found:
        raise UserError(
            f"no volumes in {', '.join(map(str, paths))}; searched for {', '.join(VOLUME_ENDINGS)} and DICOM files; "
            f"found {sum(ignored.values())} other files"
        )
    by_key = {source.key: source for source in found}
    return FoundSources([by_key[key] for key in sorted(by_key)], +ignored)  # + drops the kinds without files


def volume_ending(name: str) -> str:
    """Return the ending of a volume file's name in lower case, or an empty string for any other file."""
    lower = name.lower()
    return next((ending for ending in VOLUME_ENDINGS if lower.endswith(ending)), "")


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
    return not _is_other_file(name) and has_dicom_prefix(os.path.join(folder, name))


def case_name(stem: str, *identity: str) -> str:
    """Return a case name that nnU-Net accepts, stable between runs and unique to the source.

    Args:
        stem: the readable part. Characters other than letters, digits and hyphens become underscores.
        identity: strings that identify the source. Their hash makes the name unique.
    """
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_")[:40] or "volume"
    return f"{readable}_{_hash(*identity)[:12]}"


def is_in_part(source: Source, part_id: int, num_parts: int) -> bool:
    """True if the source belongs to that part of the import.

    The part depends on the path alone, so it stays the same when other sources are added.
    """
    return int(_hash(source.key), 16) % num_parts == part_id


def _hash(*identity: str) -> str:
    return hashlib.sha256("\0".join(identity).encode(errors="surrogateescape")).hexdigest()


def _is_other_file(name: str) -> bool:
    """True if the name says that the file is neither a volume nor a DICOM slice."""
    return name.lower() == "dicomdir" or name.lower().endswith(_OTHER_ENDINGS)


def _search_tree(root: str, excluded: Path, ignored: Counter[str]) -> Iterator[Source]:
    visited = {_inode(excluded)} if excluded.exists() else set()  # links can form circles
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            inode = _inode(folder)
            with os.scandir(folder) as entries:
                is_folder = {entry.name: _is_folder(entry) for entry in entries}
        except OSError as error:
            yield Source((folder,), "", f"unreadable: {error.strerror}")
            continue
        if inode in visited:
            continue
        visited.add(inode)
        subfolders = sorted(name for name in is_folder if is_folder[name] and not name.startswith("."))
        files = sorted(name for name in is_folder if not is_folder[name])
        if "imagesTr" in subfolders:
            ignored["labelsTr/labelsTs"] += len({"labelsTr", "labelsTs"} & {*subfolders})
            subfolders = [name for name in subfolders if name not in ("labelsTr", "labelsTs")]
        pending += [os.path.join(folder, name) for name in reversed(subfolders)]
        yield from _search_files(folder, files, ignored)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _inode(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _search_files(folder: str, names: list[str], ignored: Counter[str]) -> Iterator[Source]:
    visible = [name for name in names if not name.startswith(".")]
    ignored["hidden"] += len(names) - len(visible)
    volumes = [name for name in visible if volume_ending(name)]
    others = [name for name in visible if not volume_ending(name)]
    yield from _group_files(folder, volumes)
    if any(may_be_dicom(folder, name) for name in others):
        yield Source((folder,), f"{len(others)} files {os.stat(folder).st_mtime_ns}")
        others = [name for name in others if _is_other_file(name)]
    ignored.update(os.path.splitext(name)[1].lower() or "no ending" for name in others)


def _group_files(folder: str, names: list[str]) -> Iterator[Source]:
    """Yield the files of a folder as sources: one for each case, with all its channels."""
    for channels, rejection in _group_channels(names):
        yield _file_source(tuple(os.path.join(folder, name) for name in channels), rejection)


def _group_channels(names: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Group the volume files of a folder into cases. Yield the files of each case and the reason to reject it, if any.

    A folder follows nnU-Net's names ``CASE_0000``, ``CASE_0001`` if every name ends in a channel number and at least
    one case has channels 0 and 1. In any other folder every file is a case.
    """
    cases = _files_by_channel(names)
    if not any({0, 1} <= {*channels} for channels in cases.values()):
        yield from (((name,), "") for name in names)
        return
    num_channels = Counter(map(len, cases.values())).most_common(1)[0][0]
    expected = {*range(num_channels)}
    for channels in cases.values():
        missing = sorted(expected - {*channels})
        rejection = f"channels: no {', '.join(f'_{number:04d}' for number in missing)}" if missing else ""
        yield tuple(channels[number] for number in sorted(channels)), rejection


def _files_by_channel(names: list[str]) -> dict[str, dict[int, str]]:
    """Return the file name of each channel of each case; nothing if a name does not end in a channel number."""
    cases: dict[str, dict[int, str]] = {}
    for name in names:
        ending = volume_ending(name)
        match = _CASE_AND_CHANNEL.fullmatch(name[: -len(ending)])
        if match is None:
            return {}
        cases.setdefault(match[1] + ending, {})[int(match[2])] = name
    return cases


def _file_source(paths: tuple[str, ...], rejection: str = "") -> Source:
    data_files = [
        path[:-4] + ending  # a .mhd file is only the header of one of these
        for path in paths
        if path.lower().endswith(".mhd")
        for ending in (".raw", ".zraw")
    ]
    try:
        stats = [os.stat(path) for path in (*paths, *filter(os.path.isfile, data_files))]
    except OSError as error:  # a broken link
        return Source(paths, "", f"unreadable: {error.strerror}")
    return Source(paths, " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in stats), rejection)
