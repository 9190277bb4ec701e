"""What lies in a folder of unlabelled data: volume files, cases of several channels, folders of DICOM files.

Only names, sizes and times are looked at, and the first bytes of files whose name says nothing: 110,000 files take
seconds. What is in them is for :mod:`nnunetv2_vf.importing.volumes` to find out.
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
_NO_DICOM_ENDINGS = (".json", ".txt", ".csv", ".tsv", ".xml", ".pdf", ".png", ".jpg", ".bval", ".bvec", ".raw", ".zraw")
_CHANNEL = re.compile(r"(.+)_(\d{4})")
CASE_FILE = re.compile(r".+_[0-9a-f]{12}(_v\d{3,})?(_\d{4})?\.[a-z.]+")  # of a case that is named by case_name


@dataclass(frozen=True, slots=True)
class Source:
    """One unit of work: a file, the files of a case's channels in order, or a folder of DICOM files.

    Attributes:
        paths: absolute; links are not resolved, so that a link is a source of its own.
        stamp: of size, time and number of files; another stamp means that the source has changed.
        problem: what its name alone shows to be wrong; empty if nothing.
    """

    paths: tuple[str, ...]
    stamp: str
    problem: str = ""

    @property
    def key(self) -> str:
        return self.paths[0]

    @property
    def stem(self) -> str:
        """The file's name without its ending, and without the channel's number if it is a case of nnU-Net's."""
        name = os.path.basename(self.key)
        stem = name[: -len(ending(name)) or None]
        channel = _CHANNEL.fullmatch(stem)
        return channel[1] if channel and channel[2] == "0000" else stem


@dataclass(frozen=True)
class Found:
    """The sources below some paths, sorted by path, and how many other files there were, by their kind."""

    sources: list[Source]
    ignored: Counter[str]


def find_sources(paths: Sequence[Path], leave_out: Path) -> Found:
    """Look through folders, recursively and through links, and take single files as they are.

    Hidden files and folders are ignored, and so are ``labelsTr`` and ``labelsTs`` beside an ``imagesTr``.

    Args:
        leave_out: a folder that is not entered: the dataset that is being made.

    Raises:
        UserError: a path does not exist, or there is no volume below any of them.
    """
    found: dict[str, Source] = {}
    ignored: Counter[str] = Counter()
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give folders or files with volumes")
        if path.is_file():
            source = _source((os.path.abspath(path),))
            found[source.key] = source
            continue
        for source in _in_tree(os.path.abspath(path), leave_out, ignored):
            found[source.key] = source
    if not found:
        raise UserError(
            f"no volumes in {', '.join(map(str, paths))}; looked for {', '.join(VOLUME_ENDINGS)} and DICOM files; "
            f"found {sum(ignored.values())} other files"
        )
    return Found([found[key] for key in sorted(found)], ignored)


def ending(name: str) -> str:
    """The ending of a volume file, in lower case; empty for any other file."""
    lower = name.lower()
    return next((e for e in VOLUME_ENDINGS if lower.endswith(e)), "")


def is_dicom(path: str) -> bool:
    """Whether a file's first bytes are those of a DICOM file."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def may_be_dicom(folder: str, name: str) -> bool:
    """Whether a file that is no volume by its name is a DICOM file, by its name or else by its first bytes."""
    lower = name.lower()
    if lower.endswith(_DICOM_ENDINGS):
        return True
    return not _is_other(name) and is_dicom(os.path.join(folder, name))


def _is_other(name: str) -> bool:
    """Whether a file's name says that it is neither a volume nor a slice."""
    return name.lower() == "dicomdir" or name.lower().endswith(_NO_DICOM_ENDINGS)


def case_name(stem: str, *identity: str) -> str:
    """A name that is legal for nnU-Net, the same every time, and unlike that of any other source.

    Args:
        stem: for the reader; what is not a letter, a digit or a hyphen becomes an underscore.
        identity: what the source is known by; a hash of it makes the name unique.
    """
    readable = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_")[:40] or "volume"
    return f"{readable}_{_digest(*identity)[:12]}"


def in_part(source: Source, part_id: int, num_parts: int) -> bool:
    """Whether a source is that part's share. The share does not change when others are added, unlike every n-th."""
    return int(_digest(source.key), 16) % num_parts == part_id


def _digest(*identity: str) -> str:
    return hashlib.sha256("\0".join(identity).encode(errors="surrogateescape")).hexdigest()


def _in_tree(root: str, leave_out: Path, ignored: Counter[str]) -> Iterator[Source]:
    entered = {_identity(leave_out)} if leave_out.exists() else set()  # links can lead in circles
    stack = [root]
    while stack:
        folder = stack.pop()
        try:
            identity = _identity(folder)
            with os.scandir(folder) as entries:
                is_folder = {entry.name: entry.is_dir() for entry in entries}
        except OSError as error:
            yield Source((folder,), "", f"unreadable: {error.strerror}")
            continue
        if identity in entered:
            continue
        entered.add(identity)
        folders = sorted(name for name in is_folder if is_folder[name] and not name.startswith("."))
        files = sorted(name for name in is_folder if not is_folder[name])
        if "imagesTr" in folders:
            ignored["labelsTr/labelsTs"] += len({"labelsTr", "labelsTs"} & {*folders})
            folders = [name for name in folders if name not in ("labelsTr", "labelsTs")]
        stack += [os.path.join(folder, name) for name in reversed(folders)]
        yield from _in_folder(folder, files, ignored)


def _identity(path: str | Path) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_dev, state.st_ino


def _in_folder(folder: str, files: list[str], ignored: Counter[str]) -> Iterator[Source]:
    visible = [name for name in files if not name.startswith(".")]
    volumes = [name for name in visible if ending(name)]
    others = [name for name in visible if not ending(name)]
    ignored["hidden"] += len(files) - len(visible)
    for channels, problem in _cases(volumes):
        yield _source(tuple(os.path.join(folder, name) for name in channels), problem)
    if any(may_be_dicom(folder, name) for name in others):
        yield Source((folder,), f"{len(others)} files {os.stat(folder).st_mtime_ns}")
        others = [name for name in others if _is_other(name)]
    ignored.update(os.path.splitext(name)[1].lower() or "no ending" for name in others)


def _cases(names: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Group the volumes of a folder: by case if it follows nnU-Net's ``CASE_0000``, ``CASE_0001``, else one each.

    It does so if every name has a channel's number and some case has the first two.
    """
    cases: dict[str, dict[int, str]] = {}
    for name in names:
        channel = _CHANNEL.fullmatch(name[: -len(ending(name))])
        if channel is None:
            break
        cases.setdefault(channel[1] + ending(name), {})[int(channel[2])] = name
    else:
        if any({0, 1} <= {*numbers} for numbers in cases.values()):
            expected = {*range(max(len(numbers) for numbers in cases.values()))}
            for numbers in cases.values():
                missing = sorted(expected - {*numbers})
                problem = f"channels: no {', '.join(f'_{number:04d}' for number in missing)}" if missing else ""
                yield tuple(numbers[number] for number in sorted(numbers)), problem
            return
    yield from (((name,), "") for name in names)


def _source(paths: tuple[str, ...], problem: str = "") -> Source:
    data = [path[:-4] + ending for path in paths for ending in (".raw", ".zraw") if path.lower().endswith(".mhd")]
    try:
        states = [os.stat(path) for path in (*paths, *filter(os.path.isfile, data))]
    except OSError as error:  # a link to nowhere
        return Source(paths, "", f"unreadable: {error.strerror}")
    return Source(paths, " ".join(f"{state.st_size} {state.st_mtime_ns}" for state in states), problem)
