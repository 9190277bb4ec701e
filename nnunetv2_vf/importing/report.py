"""The report of an import: a CSV file with a row for every volume, and the summary that is printed."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

from nnunetv2_vf.errors import printable
from nnunetv2_vf.importing.channels import AUTO, count_hu_like
from nnunetv2_vf.importing.journal import ReportRow
from nnunetv2_vf.importing.search import FoundSources

REPORT, REFUSED_REPORT = "import_report.csv", "import_report_refused.csv"


def write_report(rows: Sequence[ReportRow], path: Path) -> None:
    """Write a CSV file with a row for every volume."""
    columns = [column.name for column in fields(ReportRow)]
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["status", *columns])
        for row in rows:
            writer.writerow(["accepted" if row.case else "rejected", *(getattr(row, name) for name in columns)])


def count_rejections(rows: Sequence[ReportRow]) -> str:
    """Return the number of rejected volumes for each kind of reason: ``3 size, 1 duplicate``."""
    counts = Counter(row.kind for row in rows if not row.case)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())


def describe_left_out(found: FoundSources) -> list[str]:
    """Return a phrase for each group of files that is not in the report: labels, not selected, no volumes."""
    phrases = []
    if found.num_labels:
        phrases.append(
            f"left out {found.num_labels} volumes with names of labels or derivatives, such as "
            f"{printable(found.label_example)} (to import them: --keep labels)"
        )
    if found.num_not_selected:
        phrases.append(f"left out {found.num_not_selected} volumes that --select does not name")
    if found.unused_patterns:
        phrases.append(f"no volume matches --select {printable(','.join(found.unused_patterns))}")
    if found.ignored:
        kinds = ", ".join(f"{printable(kind, limit=20)} {count}" for kind, count in found.ignored.most_common(5))
        phrases.append(f"ignored {sum(found.ignored.values())} other files ({kinds})")
    return phrases


def summarize(
    dataset_name: str, rows: Sequence[ReportRow], channel_names: Sequence[str], channel: str, found: FoundSources
) -> list[str]:
    """Return the lines that summarise a dataset: its cases, rejected volumes, notes, files left out, and channels.

    Args:
        channel: the value of ``--channel``.
    """
    accepted = [row for row in rows if row.case]
    linked = sum(row.linked for row in accepted)
    lines = [f"{dataset_name}: {len(accepted)} cases" + (f", {linked} of them links" if linked else "")]
    if len(accepted) < len(rows):
        lines.append(f"  {len(rows) - len(accepted)} volumes rejected: {count_rejections(rows)}")
    notes = Counter(note.partition(":")[0] for row in accepted for note in row.note.split("; ") if note)
    if notes:
        lines.append(f"  notes: {', '.join(f'{count} {kind}' for kind, count in notes.most_common())}")
    lines += [f"  {phrase}" for phrase in describe_left_out(found)]
    hu_like_counts = count_hu_like(accepted, len(channel_names))
    for number, (name, counts) in enumerate(zip(channel_names, hu_like_counts, strict=True)):
        normalization = get_normalization_scheme(name).__name__
        origin = "" if channel == AUTO else "; named by --channel"
        lines.append(
            f"  channel {number} is {name} ({counts['yes']} of {len(accepted)} volumes look like HU{origin}): "
            f"nnU-Net applies {normalization}"
        )
    return lines
