"""Everything that one run of the import command works on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.case_files import CaseFiles
from nnunetv2_vf.importing.channels import (
    AUTO,
    check_bids_suffixes,
    check_channel_option,
    most_common_channel_count,
)
from nnunetv2_vf.importing.description import read_description
from nnunetv2_vf.importing.journal import JOURNAL_FOLDER, Journal
from nnunetv2_vf.importing.search import FoundSources
from nnunetv2_vf.importing.settings import ImportSettings
from nnunetv2_vf.importing.sources import Source
from nnunetv2_vf.importing.state import ImportState
from nnunetv2_vf.parts import scratch_folder


@dataclass(frozen=True)
class ImportJob:
    """One run of the import command on one dataset.

    Attributes:
        folder: folder of the dataset.
        found: what the command was given: the sources of this part and of all others, and what was left out.
        settings: settings of the import.
        channel: the value of ``--channel``. An existing dataset replaces ``auto`` by the value of its last import.
        journal: journal of this part.
        case_files: files of the cases.
    """

    folder: Path
    found: FoundSources
    settings: ImportSettings
    channel: str
    journal: Journal
    case_files: CaseFiles

    @property
    def sources(self) -> Sequence[Source]:
        return self.found.sources

    def read_state(self) -> ImportState:
        """Read the current state of the import.

        Only the sources of this command and those that the dataset was merged from count. Other records in the journals
        belong to commands that were refused or have not finished; their sources count once they are given again.
        """
        description = read_description(self.folder)
        complete_cases = self.case_files.complete_cases()
        dataset_cases = description.cases if description else frozenset()
        merged = self.journal.read_merged(dataset_cases if description else complete_cases)
        counted = merged.union(source.key for source in self.sources)
        records = {source: record for source, record in self.journal.read().items() if source in counted}
        return ImportState(records, complete_cases, dataset_cases)

    def find_unfinished(self, sources: Sequence[Source], retried_kinds: Collection[str] = ()) -> list[Source]:
        """Return the sources that must be imported; see :meth:`.ImportState.unfinished`."""
        return self.read_state().unfinished(sources, self.settings.digest, retried_kinds)


def prepare_job(folder: Path, found: FoundSources, settings: ImportSettings, channel: str, part: str) -> ImportJob:
    """Check the settings against the sources and the existing dataset, and create the dataset's folders.

    Args:
        part: name of this part.

    Raises:
        UserError: the settings do not fit the sources or the existing dataset.
    """
    existing = read_description(folder)
    if existing and existing.file_ending != settings.file_ending:
        raise UserError(
            f"--file-ending is {settings.file_ending}, but {folder.name} has {existing.file_ending} files; "
            f"use --file-ending {existing.file_ending}"
        )
    if existing and channel == AUTO:
        channel = existing.channel
    num_channels = existing.num_channels if existing else most_common_channel_count(found.sources)
    check_channel_option(channel, num_channels)
    if channel == AUTO:
        merged = Journal(folder / JOURNAL_FOLDER, part).read_merged(existing.cases) if existing else set()
        check_bids_suffixes([source for source in found.sources if not source.rejection], merged)
    journal = Journal(folder / JOURNAL_FOLDER, part)
    case_files = CaseFiles(folder, scratch_folder(journal.folder, part), settings.file_ending, num_channels)
    case_files.images_folder.mkdir(exist_ok=True)
    case_files.labels_folder.mkdir(exist_ok=True)
    return ImportJob(folder, found, settings, channel, journal, case_files)
