"""Find the sources in folders of unlabelled data: volume files, cases of several channels, and DICOM folders.

The search looks at names, sizes and times only, and at the first bytes of files whose name does not tell their format.
Listing 110,000 files takes seconds. :mod:`.readers` reads the content later.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.layouts import is_label_file, is_label_folder
from nnunetv2_vf.importing.sources import (
    VOLUME_ENDINGS,
    Source,
    data_files,
    file_stem,
    is_other_file,
    may_be_dicom,
    split_channel,
    volume_ending,
)

# Volumes in formats that are not read. Each gets a line in the report.
_UNREAD_ENDINGS = (
    *(".mgz", ".mgh", ".mnc", ".par", ".head", ".gipl", ".gipl.gz", ".vtk", ".vti", ".npy", ".npz"),
    *(".nii.bz2", ".nii.xz", ".nii.zst", ".nii.zip", ".nrrd.gz", ".mha.gz", ".mgh.gz", ".mnc.gz", ".dcm.gz"),
    *(".img", ".img.gz", ".tif", ".tiff", ".h5", ".hdf5"),
)
_MAX_CHANNELS_OF_ONE_CASE = 8
_UNREADABLE_NAME = "name: not UTF-8; rename the file or folder"


@dataclass(frozen=True)
class FoundSources:
    """What a search has found.

    Attributes:
        sources: sorted by path.
        ignored: number of files that are no volumes, by kind.
        num_labels: number of volumes that were left out because their name or folder says that they are labels.
        label_example: path of one of them.
        num_not_selected: number of volumes that were left out because ``--select`` does not name them.
        unused_patterns: patterns of ``--select`` that name no volume.
    """

    sources: list[Source]
    ignored: Counter[str]
    num_labels: int = 0
    label_example: str = ""
    num_not_selected: int = 0
    unused_patterns: tuple[str, ...] = ()


def find_sources(
    paths: Sequence[Path], excluded: Path, select: Sequence[str] = (), keep_labels: bool = False
) -> FoundSources:
    """Find all sources in folders, recursively and through links. A path may also be a file: files of one folder that
    are named like channels of a case become one source, as in a folder.

    Hidden files and folders are ignored. Files and folders whose names say that they hold labels are left out; a given
    folder is searched whatever its name is.

    Args:
        excluded: a folder that is not searched: the dataset that the import writes.
        select: patterns with ``*`` and ``?``; if there are any, only volumes are found that have one of them in their
            path below the given folder.
        keep_labels: True finds labels too.

    Raises:
        UserError: a path does not exist, or no path contains a volume.
    """
    search = _Search(select, keep_labels)
    found: list[Source] = []
    files: dict[str, list[str]] = {}  # folder -> names of the given files in it
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give folders or files with volumes")
        absolute = os.path.abspath(path)
        if path.is_file():
            header = _header_of(absolute)
            files.setdefault(os.path.dirname(header), []).append(os.path.basename(header))
        else:
            found += search.find_in_tree(absolute, excluded)
    for folder, names in files.items():
        found += search.find_among_files(folder, names, below="")
    if not found:
        raise UserError(search.describe_failure(paths))
    # A file that is given beside its folder may be one channel of a case of the folder.
    by_key = {source.key: source for source in sorted(found, key=lambda source: len(source.paths))}
    ignored = +search.ignored  # + drops the kinds without files
    return FoundSources(
        [by_key[key] for key in sorted(by_key)],
        ignored,
        search.num_labels,
        search.label_example,
        search.num_not_selected,
        tuple(pattern for pattern in select if pattern not in search.used_patterns),
    )


class _Search:
    """A search in progress: its options, and the numbers of files that it has left out."""

    def __init__(self, select: Sequence[str], keep_labels: bool):
        self.patterns = {pattern: f"*{pattern.replace('[', '[[]')}*" for pattern in select}  # only * and ? are special
        self.used_patterns: set[str] = set()
        self.keep_labels = keep_labels
        self.label_example = ""
        self.ignored: Counter[str] = Counter()
        self.num_labels = self.num_not_selected = 0

    def find_in_tree(self, root: str, excluded: Path) -> Iterator[Source]:
        """Yield the sources below a folder."""
        visited = {_inode(excluded)} if excluded.exists() else set()  # links can form circles
        pending = [(root, False)]
        while pending:
            folder, holds_labels = pending.pop()
            try:
                inode = _inode(folder)
                with os.scandir(folder) as entries:
                    listed = list(entries)
            except OSError as error:
                yield Source((folder,), "", f"unreadable: {error.strerror}")
                continue
            if inode in visited:
                continue
            visited.add(inode)
            names = [entry.name for entry in listed]
            subfolders = {entry.name for entry in listed if _is_folder(entry)}
            specials = {entry.name for entry in listed if _is_special(entry)}
            self.ignored["special"] += len(specials)
            pending += [
                (os.path.join(folder, name), holds_labels or self._is_label_folder(name, names))
                for name in sorted(subfolders, reverse=True)
                if not name.startswith(".")
            ]
            files = sorted({*names} - subfolders - specials)
            if holds_labels:
                self._count_labels(folder, files)
            else:
                yield from self.find_among_files(folder, files, below=root)

    def _is_label_folder(self, name: str, siblings: Collection[str]) -> bool:
        return not self.keep_labels and is_label_folder(name, siblings)

    def _count_labels(self, folder: str, names: Sequence[str]) -> None:
        volumes = [name for name in names if volume_ending(name)]
        if volumes or any(may_be_dicom(folder, name) for name in names):
            self.num_labels += len(volumes) or 1
            self.label_example = self.label_example or os.path.join(folder, *volumes[:1])

    def find_among_files(self, folder: str, names: Sequence[str], below: str) -> Iterator[Source]:
        """Yield the sources among some files of a folder.

        Args:
            below: the patterns of the selection apply to the part of a path below this folder. Empty for given files:
                then they apply to the name, and each DICOM file is a source, not its folder.
        """
        visible = [name for name in names if not name.startswith(".")]
        self.ignored["hidden"] += len(names) - len(visible)
        volumes = [name for name in visible if volume_ending(name)]
        data = {os.path.basename(file).lower() for name in volumes for file in data_files(name)}
        others = [name for name in visible if not volume_ending(name) and name.lower() not in data]
        above = f"{folder[len(below) :].lstrip(os.sep)}{os.sep}" if below and folder != below else ""
        yield from _group_files(folder, [name for name in volumes if self._is_wanted(folder, name, above)])
        if not below:  # given files: not the whole folder
            slices = {name for name in others if may_be_dicom(folder, name)}
            for name in others:
                if name in slices and self._is_selected(name):
                    yield _file_source((os.path.join(folder, name),))
        else:
            slices = _slices_of_folder(folder, others)
            if slices and self._is_selected(above or os.path.basename(folder)):
                yield _folder_source(folder, others)
        for name in others:
            if name in slices:
                continue
            if not name.lower().endswith(_UNREAD_ENDINGS):
                self.ignored[os.path.splitext(name)[1].lower() or "no ending"] += 1
            elif self._is_wanted(folder, name, above):
                yield _file_source((os.path.join(folder, name),), _describe_unread_format(name))

    def _is_wanted(self, folder: str, name: str, above: str) -> bool:
        """True unless a volume file is left out; counts it if it is."""
        if not self.keep_labels and is_label_file(file_stem(name)):
            self.num_labels += 1
            self.label_example = self.label_example or os.path.join(folder, name)
            return False
        return self._is_selected(above + name)

    def _is_selected(self, path: str) -> bool:
        if not self.patterns:
            return True
        matching = [select for select, pattern in self.patterns.items() if fnmatchcase(path, pattern)]
        self.used_patterns.update(matching)
        self.num_not_selected += not matching
        return bool(matching)

    def describe_failure(self, paths: Sequence[Path]) -> str:
        """Return the message for a search that has found nothing."""
        searched = ", ".join(map(str, paths))
        if self.num_not_selected:
            return (
                f"--select {','.join(self.patterns)} matches none of {self.num_not_selected} volumes in {searched}; "
                "legal: parts of their paths, such as T1w"
            )
        if self.num_labels:
            return (
                f"no images in {searched}, but {self.num_labels} with names of labels or derivatives; import them: "
                "--keep labels"
            )
        return (
            f"no volumes in {searched}; searched for {', '.join(VOLUME_ENDINGS)} and DICOM files; found "
            f"{sum(self.ignored.values())} other files"
        )


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """True for pipes, sockets and devices: reading one could wait for ever."""
    try:
        return not entry.is_file() and not entry.is_dir() and os.path.exists(entry.path)
    except OSError:  # a link to itself
        return False


def _inode(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _header_of(path: str) -> str:
    """Return the path of the header if a file holds the voxels of a pair; else the path itself."""
    stem, ending = os.path.splitext(path.removesuffix(".gz"))
    header = f"{stem}{ending.replace('img', 'hdr').replace('IMG', 'HDR')}{path[len(stem) + len(ending) :]}"
    return header if ending.lower() == ".img" and os.path.isfile(header) else path


def _is_readable_name(path: str) -> bool:
    """True if a path is UTF-8: others, from old systems, make SimpleITK abort the process."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _describe_unread_format(name: str) -> str:
    ending = next(ending for ending in sorted(_UNREAD_ENDINGS, key=len, reverse=True) if name.lower().endswith(ending))
    if ending.startswith(".img"):
        return f"format: {ending} without its header {ending.replace('img', 'hdr')}"
    return f"format: {ending} is not read; convert it to .nii.gz"


def _group_files(folder: str, names: list[str]) -> Iterator[Source]:
    """Yield the files of a folder as sources: one for each case, with all its channels."""
    for channels, rejection in _group_channels(names):
        yield _file_source(tuple(os.path.join(folder, name) for name in channels), rejection)


def _group_channels(names: list[str]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Group the volume files of a folder into cases. Yield the files of each case and the reason to reject it, if any.

    A folder follows nnU-Net's names ``CASE_0000``, ``CASE_0001`` if every name ends in a channel number and at least
    one case has channels 0 and 1. In any other folder every file is a case. So it is if there would be one case with
    many channels: ``scan_0000`` to ``scan_0099`` are numbered scans.
    """
    cases = _files_by_channel(names)
    has_numbered_scans = len(cases) == 1 and len(names) > _MAX_CHANNELS_OF_ONE_CASE
    if has_numbered_scans or not any({0, 1} <= {*channels} for channels in cases.values()):
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
        stem = file_stem(name)
        case, channel = split_channel(stem)
        if channel is None:
            return {}
        cases.setdefault(case + name.removeprefix(stem), {})[channel] = name
    return cases


def _slices_of_folder(folder: str, names: Sequence[str]) -> set[str]:
    """Return the names that may be DICOM slices; none if no file of the folder is one. A slice may have any name."""
    if not any(may_be_dicom(folder, name) for name in names):  # opens few files
        return set()
    candidates = [name for name in names if not is_other_file(name)]
    return {name for name in candidates if not name.lower().endswith(_UNREAD_ENDINGS) or may_be_dicom(folder, name)}


def _folder_source(folder: str, names: Sequence[str]) -> Source:
    """Return a folder of DICOM files as a source.

    Args:
        names: of its files, without volumes.
    """
    is_readable = all(_is_readable_name(os.path.join(folder, name)) for name in names)
    stamp = f"{len(names)} files {os.stat(folder).st_mtime_ns}"
    return Source((folder,), stamp, "" if is_readable else _UNREADABLE_NAME)


def _file_source(paths: tuple[str, ...], rejection: str = "") -> Source:
    if not all(map(_is_readable_name, paths)):
        return Source(paths, "", _UNREADABLE_NAME)
    data = [file for path in paths for file in data_files(path) if os.path.isfile(file)]
    try:
        stats = [os.stat(path) for path in (*paths, *data)]
    except OSError as error:  # a broken link
        return Source(paths, "", f"unreadable: {error.strerror}")
    return Source(paths, " ".join(f"{status.st_size} {status.st_mtime_ns}" for status in stats), rejection)
