"""The journal of an import: one line of JSON per finished source, appended once its files are in place.

Each part of an import appends to its own journal. All journals are read together, and the newest line about a source
counts. A line that a kill has cut off is ignored.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

from nnunetv2_vf.errors import UserError

JOURNAL_FOLDER = "import_journals"


@dataclass(slots=True)
class ReportRow:
    """A row of the report: one volume, accepted as ``case`` or rejected for a ``reason``.

    Attributes:
        source: path of the file (of the first channel), or of the folder of DICOM files.
        item: which volume of the source this is; empty if the source has only one.
        case: name of the case; empty if rejected.
        reason: ``KIND: what is wrong``; empty if accepted.
        note: what was repaired.
        shape: slices, rows and columns, joined by ``x``.
        spacing_mm: spacing in mm in the same order, joined by ``x``.
        minimum, maximum: smallest and largest intensity.
        hu_like: for each channel ``yes`` if its intensities look like Hounsfield units, else ``no``.
        hash: hash of voxels and spacing.
        linked: True if the images are links.
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
        """The kind of the reason: its part before the colon."""
        return self.reason.partition(":")[0]


@dataclass(slots=True)
class SourceRecord:
    """A line of the journal: the result of importing one source.

    Attributes:
        source: the source's key.
        stamp: the source's stamp when it was imported.
        settings: digest of the import's settings.
        rows: a row of the report for each volume of the source.
        keep_duplicates: True if the import ran with ``--keep duplicates``.
        time: seconds since the epoch.
    """

    source: str
    stamp: str
    settings: str
    rows: list[ReportRow]
    keep_duplicates: bool = False
    time: float = field(default_factory=time.time)


class Journal:
    """All journals of a dataset, and the one to which this part appends.

    Args:
        folder: folder of the journals; created if it does not exist.
        part: name of this part.
    """

    def __init__(self, folder: Path, part: str):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part = part
        self._path = folder / f"{part}.jsonl"
        self._merged_path = folder / "merged.json"

    @contextmanager
    def lock_part(self) -> Iterator[None]:
        """Lock this part. The system releases the lock when the process ends, even if it is killed.

        Raises:
            UserError: another process imports this part.
        """
        try:
            with _locked(self.folder / f"{self.part}.lock", timeout=0):
                yield
        except Timeout:
            raise UserError(f"{self.part} of this import is already running in {self.folder}") from None

    def lock_dataset(self) -> AbstractContextManager[None]:
        """Lock the dataset while it is merged. Wait if another part merges it."""
        return _locked(self.folder / "merge.lock", timeout=-1)

    def read(self) -> dict[str, SourceRecord]:
        """Return the newest record of every source, by the source's key, from all journals."""
        records: dict[str, SourceRecord] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open(encoding="utf-8", errors="surrogateescape") as lines:
                for record in filter(None, map(_parse_line, lines)):
                    if record.source not in records or records[record.source].time <= record.time:
                        records[record.source] = record
        return records

    def append(self, record: SourceRecord) -> None:
        """Append a record to the journal of this part."""
        content = asdict(record) | {"rows": [_without_defaults(row) for row in record.rows]}
        line = json.dumps(content).encode()
        with self._path.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line  # a kill has cut off the previous line
            file.write(line + b"\n")

    def read_merged(self) -> set[str]:
        """Return the keys of the sources that the dataset was last merged from."""
        return set(json.loads(self._merged_path.read_text())) if self._merged_path.is_file() else set()

    def write_merged(self, sources: Collection[str]) -> None:
        """Store the keys of the sources that the dataset is merged from."""
        with self.replacing(self._merged_path) as temporary:
            temporary.write_text(json.dumps(sorted(sources), indent=0))

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary path; rename it to ``path`` if the block ends without an error."""
        temporary = self.folder / f"{path.name}.{self.part}"
        yield temporary
        temporary.replace(path)


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[None]:
    lock = FileLock(path)
    with suppress(NotImplementedError):  # the file system has no locks; starting a part twice only repeats its work
        lock.acquire(timeout)
    try:
        yield
    finally:
        lock.release()


_DEFAULTS = ReportRow("")


def _without_defaults(row: ReportRow) -> dict[str, object]:
    """Return the fields that differ from their defaults, without the source, which the record already has."""
    names = (column.name for column in fields(row) if column.name != "source")
    return {name: getattr(row, name) for name in names if getattr(row, name) != getattr(_DEFAULTS, name)}


def _parse_line(line: str) -> SourceRecord | None:
    """Return the record in a line; None if the line is cut off, of another version, or not written by an import."""
    try:
        content = json.loads(line)
        rows = [ReportRow(content["source"], **row) for row in content.pop("rows")]
        if any(row.case != os.path.basename(row.case) for row in rows):  # noqa: PTH119
            return None  # a case becomes a file name; it must not lead out of the dataset
        return SourceRecord(**content, rows=rows)
    except (ValueError, TypeError, KeyError):
        return None


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
