"""The journal of an import: one line of JSON per finished source, appended once its files are in place.

Each part of an import appends to its own journal. All journals are read together, and the newest line about a source
counts. A line that a kill has cut off is ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nnunetv2_vf.parts import PartJournals

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
        time: seconds since the epoch; set when the record is appended.
    """

    source: str
    stamp: str
    settings: str
    rows: list[ReportRow]
    keep_duplicates: bool = False
    time: float = 0


class Journal(PartJournals):
    """All journals of a dataset, and the one to which this part of the import appends."""

    def read(self) -> dict[str, SourceRecord]:
        """Return the newest record of every source, by the source's key, from all journals."""
        records = map(_parse_record, self.read_newest("source").values())
        return {record.source: record for record in records if record is not None}

    def append(self, record: SourceRecord) -> None:
        """Append a record to the journal of this part."""
        self.append_line(asdict(record) | {"rows": [_without_defaults(row) for row in record.rows]})

    def read_merged(self, cases: Collection[str]) -> set[str]:
        """Return the keys of the sources that the dataset was last merged from.

        Args:
            cases: of the dataset. If the list of sources is damaged, for example by a power failure, the sources of
                these cases are returned.
        """
        if not self._merged_path.is_file():
            return set()
        try:
            return set(json.loads(self._merged_path.read_text()))
        except ValueError:
            records = self.read().values()
            return {record.source for record in records if any(row.case in cases for row in record.rows)}

    def write_merged(self, sources: Collection[str]) -> None:
        """Store the keys of the sources that the dataset is merged from."""
        with self.replacing(self._merged_path) as temporary:
            temporary.write_text(json.dumps(sorted(sources), indent=0))

    @property
    def _merged_path(self) -> Path:
        return self.folder / "merged.json"


_DEFAULTS = ReportRow("")


def _without_defaults(row: ReportRow) -> dict[str, object]:
    """Return the fields that differ from their defaults, without the source, which the record already has."""
    names = (column.name for column in fields(row) if column.name != "source")
    return {name: getattr(row, name) for name in names if getattr(row, name) != getattr(_DEFAULTS, name)}


def _parse_record(content: dict[str, Any]) -> SourceRecord | None:
    """Return the record in a line; None if the line is of another version or not written by an import."""
    try:
        rows = [ReportRow(content["source"], **row) for row in content.pop("rows")]
        if any(row.case != os.path.basename(row.case) for row in rows):  # noqa: PTH119
            return None  # a case becomes a file name; it must not lead out of the dataset
        return SourceRecord(**content, rows=rows)
    except (ValueError, TypeError, KeyError):
        return None
