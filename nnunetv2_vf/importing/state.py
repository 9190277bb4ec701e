"""Decide which sources are finished, from the journals, ``dataset.json`` and the files of the cases."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from nnunetv2_vf.importing.journal import ReportRow, SourceRecord
from nnunetv2_vf.importing.sources import Source

_DUPLICATE = "duplicate: of "


@dataclass(frozen=True)
class ImportState:
    """The state of an import at one moment.

    Attributes:
        records: the journal's record of each source that counts, by the source's key.
        complete_cases: cases whose files all exist.
        dataset_cases: cases in ``dataset.json``.
    """

    records: Mapping[str, SourceRecord]
    complete_cases: Collection[str]
    dataset_cases: Collection[str]

    @cached_property
    def rows(self) -> dict[str, list[ReportRow]]:
        """The rows of each source, with duplicates rejected."""
        return reject_duplicates(self.records, self.complete_cases, self.dataset_cases)

    def unfinished(
        self, sources: Iterable[Source], settings_digest: str, retried_kinds: Collection[str] = ()
    ) -> list[Source]:
        """Return the sources that are new or changed, were imported with other settings, or have lost files.

        A source that cannot be listed now, for example because its disk is away, keeps the cases that it has.

        Args:
            retried_kinds: kinds of reasons; a source that was rejected for one of them is unfinished.
        """
        return [source for source in sources if not self._is_finished(source, settings_digest, retried_kinds)]

    def _is_finished(self, source: Source, settings_digest: str, retried_kinds: Collection[str]) -> bool:
        record = self.records.get(source.key)
        if record is None:
            return False
        if not source.stamp and any(row.case in self.complete_cases for row in self.rows[source.key]):
            return True
        if (record.stamp, record.settings) != (source.stamp, settings_digest):
            return False
        return all(self._is_final(row, retried_kinds) for row in self.rows[source.key])

    def _is_final(self, row: ReportRow, retried_kinds: Collection[str]) -> bool:
        case = row.case or _kept_duplicate(row)
        return case in self.complete_cases if case else row.kind not in retried_kinds


def reject_duplicates(
    records: Mapping[str, SourceRecord], complete_cases: Collection[str], dataset_cases: Collection[str]
) -> dict[str, list[ReportRow]]:
    """Return the rows of every source, with all but one of the volumes with the same content rejected.

    One of them is kept: preferably one whose files exist, then one that the dataset already has, then the first in the
    order of the sources. So the result does not depend on the order in which the sources were imported.
    """
    in_order = [records[source] for source in sorted(records)]
    accepted = [row for record in in_order for row in record.rows if row.case]
    accepted.sort(key=lambda row: (row.case not in complete_cases, row.case not in dataset_cases))  # a stable sort
    kept_case: dict[str, str] = {}
    for row in accepted:
        kept_case.setdefault(row.hash, row.case)

    def reject_duplicate(row: ReportRow, record: SourceRecord) -> ReportRow:
        if not row.case or record.keep_duplicates or kept_case[row.hash] == row.case:
            return row
        return replace(row, case="", reason=f"{_DUPLICATE}{kept_case[row.hash]}", linked=False)

    return {record.source: [reject_duplicate(row, record) for row in record.rows] for record in in_order}


def _kept_duplicate(row: ReportRow) -> str:
    """Return the case of which a row is a duplicate, or an empty string."""
    return row.reason.removeprefix(_DUPLICATE) if row.reason.startswith(_DUPLICATE) else ""
