"""What ``nnUNetv2_vf import`` has done so far: a line of JSON per source, appended when its files are in place.

Every part of an import (one, or several on several machines) appends to a journal of its own; all are read together,
the newest line about a source counts. A line that was cut off by a kill is as if it had not been written.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from filelock import FileLock, Timeout

from nnunetv2_vf.errors import UserError

DUPLICATE = "duplicate: of "


@dataclass(slots=True)
class Row:
    """A row of the report: one volume, accepted as ``case`` or rejected for a ``reason``.

    Attributes:
        source: the path of the file (of the first channel), or of the folder of DICOM files.
        item: which of the source's volumes; empty if it has but one.
        reason: ``KIND: what is wrong``; empty if accepted.
        note: what was mended.
        shape, spacing_mm: (slices, rows, columns), with ``x`` between.
        hu_like: ``yes`` or ``no``, for each channel.
        hash: of the content.
        linked: whether the images are links.
    """

    source: str
    item: str = ""
    case: str = ""
    reason: str = ""
    note: str = ""
    shape: str = ""
    spacing_mm: str = ""
    minimum: float | None = None
    maximum: float | None = None
    hu_like: str = ""
    hash: str = ""
    linked: bool = False

    @property
    def kind(self) -> str:
        """Of the reason: its first word."""
        return self.reason.partition(":")[0]


@dataclass(slots=True)
class Record:
    """What became of a source.

    Attributes:
        stamp: the source's, when it was imported.
        settings: a digest of the settings it was imported with.
        keep_duplicates: whether those settings keep volumes that are there already.
        time: in seconds since the epoch.
    """

    source: str
    stamp: str
    settings: str
    rows: list[Row]
    keep_duplicates: bool = False
    time: float = field(default_factory=time.time)


class Journal:
    """The journals of a dataset, and the one that this part appends to.

    Args:
        folder: of the journals; made if it does not exist.
        part: this part's name.
    """

    def __init__(self, folder: Path, part: str):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part = part
        self._path = folder / f"{part}.jsonl"
        self._merged = folder / "merged.json"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this part; the lock ends with the process, however it ends.

        Raises:
            UserError: another process is at it.
        """
        try:
            with _lock(self.folder / f"{self.part}.lock", timeout=0):
                yield
        except Timeout:
            raise UserError(f"{self.part} of this import is already running in {self.folder}") from None

    def merging(self) -> AbstractContextManager[None]:
        """Hold the dataset while it is written; others wait."""
        return _lock(self.folder / "merge.lock", timeout=-1)

    def read(self) -> dict[str, Record]:
        """The newest record of every source, from all journals."""
        records: dict[str, Record] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", errors="surrogateescape") as lines:
                for record in filter(None, map(_parse, lines)):
                    if record.source not in records or records[record.source].time <= record.time:
                        records[record.source] = record
        return records

    def merged(self) -> set[str]:
        """The sources that the dataset was last made of."""
        return set(json.loads(self._merged.read_text())) if self._merged.is_file() else set()

    def set_merged(self, sources: Collection[str]) -> None:
        temporary = self._merged.with_suffix(f".{self.part}")
        temporary.write_text(json.dumps(sorted(sources), indent=0))
        temporary.replace(self._merged)

    def append(self, record: Record) -> None:
        content = {column.name: getattr(record, column.name) for column in fields(record)}
        content["rows"] = [_compact(row) for row in record.rows]
        line = json.dumps(content).encode()
        with self._path.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line  # the line before was cut off
            file.write(line + b"\n")


@contextmanager
def _lock(path: Path, timeout: float) -> Iterator[None]:
    lock = FileLock(path)
    with suppress(NotImplementedError):  # a file system without locks: whoever starts a part twice does its work twice
        lock.acquire(timeout)
    try:
        yield
    finally:
        lock.release()


def final_rows(
    records: Mapping[str, Record], present: Collection[str], settled: Collection[str]
) -> dict[str, list[Row]]:
    """The rows of every source once duplicates are rejected.

    Of several volumes with the same content one stays: one whose files are there, of these a case that the dataset has
    already, of these the first in the order of sources. So the result does not depend on who was faster.

    Args:
        present: the cases whose files are there.
        settled: the cases of the dataset as it was last written.
    """
    stays: dict[str, str] = {}
    ordered = [(source, records[source]) for source in sorted(records)]
    accepted = [(row, record) for _, record in ordered for row in record.rows if row.case]
    accepted.sort(key=lambda pair: (pair[0].case not in present, pair[0].case not in settled))  # stable
    for row, _ in accepted:
        stays.setdefault(row.hash, row.case)

    def final(row: Row, record: Record) -> Row:
        if not row.case or record.keep_duplicates or stays[row.hash] == row.case:
            return row
        return replace(row, case="", reason=f"{DUPLICATE}{stays[row.hash]}", linked=False)

    return {source: [final(row, record) for row in record.rows] for source, record in ordered}


_EMPTY = Row("")


def _compact(row: Row) -> dict[str, object]:
    """Without the source, which its record names, and what is not known."""
    names = (column.name for column in fields(row) if column.name != "source")
    return {name: getattr(row, name) for name in names if getattr(row, name) != getattr(_EMPTY, name)}


def _parse(line: str) -> Record | None:
    try:
        content = json.loads(line)
        rows = [Row(content["source"], **row) for row in content.pop("rows")]
        if any(row.case != os.path.basename(row.case) for row in rows):  # noqa: PTH119  a case becomes a file's name
            return None
        return Record(**content, rows=rows)
    except (ValueError, TypeError, KeyError):  # cut off, of another version, or not written by an import
        return None


def _ends_with_newline(file) -> bool:  # type: ignore[no-untyped-def]
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
