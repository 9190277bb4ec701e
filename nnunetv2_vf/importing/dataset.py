"""``nnUNetv2_vf import``: unlabelled volumes in, an nnU-Net raw dataset out.

The data's path: :mod:`sources` finds what there is; in each process an :mod:`import_worker` reads a source with
:mod:`readers`, judges it with :mod:`volumes` and puts its cases in place; a line in the :mod:`import_journal` records
each source that is done; the merge of all journals decides about duplicates and the channel, and writes the report and
``dataset.json``. Every file is written elsewhere and renamed, so that none is ever half-written.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from tqdm import tqdm

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.journal import DUPLICATE, Journal, Record, Row, final_rows
from nnunetv2_vf.importing.process_pool import run_in_processes
from nnunetv2_vf.importing.sources import CASE_FILE, Source, find_sources, in_part
from nnunetv2_vf.importing.volumes import one_line
from nnunetv2_vf.importing.worker import CannotWriteError, ImportSettings, import_source, start_worker
from nnunetv2_vf.nnunet_folders import require_variables

REPORT, REFUSED, PICTURE = "import_report.csv", "import_report_refused.csv", "import_preview.png"
_DRAWN = 6  # cases in the picture
_JOURNALS = "import_journals"
_TRY_AGAIN = ("unreadable", "memory", "error")  # reasons that may be gone next time, though the file is the same


def import_volumes(
    dataset_id: int,
    name: str,
    paths: Sequence[Path],
    settings: ImportSettings,
    channel: str = "auto",
    processes: int = 8,
    num_parts: int = 1,
    part_id: int = 0,
) -> None:
    """Make ``nnUNet_raw/DatasetXXX_NAME`` of unlabelled volumes, add to it, or go on where it was interrupted.

    Args:
        paths: folders, searched recursively, and files.
        channel: the channel's name, or several with commas between; ``auto``: CT if the volumes look like HU, else MR.
        processes: workers, each of which holds one source in memory.
        num_parts, part_id: import only that share of the sources, for several machines on one file system. The part
            that ends last merges.

    Raises:
        UserError: for a value that is not legal; no usable volume; HU-like and other volumes under ``auto``.
    """
    if not 0 <= part_id < num_parts:
        raise UserError(f"--part_id is {part_id} and --num_parts {num_parts}; parts are 0 to num_parts - 1")
    if processes < 1:
        raise UserError(f"-np is {processes}; it must be at least 1")
    folder = _dataset_folder(dataset_id, name)
    try:
        found = find_sources(paths, leave_out=folder)
        dataset = _Dataset(folder, settings, channel, found.sources, f"part_{part_id}_of_{num_parts}")
        _announce(dataset, +found.ignored)
        with dataset.journal.locked():
            dataset.run([source for source in found.sources if in_part(source, part_id, num_parts)], processes)
            with dataset.journal.merging():
                left = dataset.merge_if_done()
    except (OSError, CannotWriteError) as error:
        what = "write to" if isinstance(error, CannotWriteError) else "read or write"
        raise UserError(f"cannot {what} {folder}: {error}; mend that, and the same command goes on") from error
    except KeyboardInterrupt:
        raise UserError("interrupted; the same command goes on from here") from None
    if left:
        print(
            f"part {part_id} of {num_parts} is done; {left} sources of other parts are not. The part that ends last "
            "writes dataset.json; the same command without --num_parts does so too, and first does what is left"
        )


def _dataset_folder(dataset_id: int, name: str) -> Path:
    require_variables(nnUNet_raw)
    if not 1 <= dataset_id <= 999:
        raise UserError(f"-d is {dataset_id}; dataset ids are 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UserError(f"-n is {name!r}; use letters, digits, _ and - only")
    folder = Path(nnUNet_raw).absolute() / f"Dataset{dataset_id:03d}_{name}"
    for place in map(Path, filter(None, (nnUNet_raw, nnUNet_preprocessed, nnUNet_results))):
        for other in place.glob(f"Dataset{dataset_id:03d}*"):
            if other.name != folder.name:
                unfinished = (other / _JOURNALS).exists() and not (other / "dataset.json").exists()
                what = " (an import that did not end; delete it if you do not want it)" if unfinished else ""
                raise UserError(f"{other} has the id {dataset_id}{what}; give another -d, or its name as -n")
    if folder.exists() and any(folder.iterdir()) and not (folder / _JOURNALS).is_dir():
        raise UserError(f"{folder} was not made by import, or has lost its {_JOURNALS}; give another -d and -n")
    return folder


def _announce(dataset: _Dataset, ignored: Counter[str]) -> None:
    kinds = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common(5))
    others = f"; ignored: {sum(ignored.values())} others ({kinds})" if ignored else ""
    print(f"{dataset.folder.name}: {len(dataset.sources)} sources{others}")
    settings = asdict(dataset.settings)
    stated = {"channel": dataset.channel, **settings.pop("selection"), **settings}
    print("settings: " + ", ".join(f"{key} {value}" for key, value in stated.items()), flush=True)


class _Dataset:
    """The dataset that is being made, and how far it is.

    Args:
        sources: all that this command was given, in whatever part.
        part: this part's name.

    Raises:
        UserError: the settings do not fit the dataset as it is.
    """

    def __init__(self, folder: Path, settings: ImportSettings, channel: str, sources: list[Source], part: str):
        self.folder, self.settings, self.sources = folder, settings, sources
        self._digest = settings.digest
        self._description = folder / "dataset.json"
        before = self._read_description()
        self._settled = {*before.get("dataset", ())}
        self.channel = before["last_import"]["channel"] if before and channel == "auto" else channel
        self._channels = self._number_of_channels(before)
        if before and before["file_ending"] != settings.file_ending:
            raise UserError(
                f"--file-ending is {settings.file_ending}, but {folder.name} has {before['file_ending']} files; "
                f"use --file-ending {before['file_ending']}"
            )
        self._images, self._labels = folder / "imagesTr", folder / "labelsTr"
        self.journal = Journal(folder / _JOURNALS, part)
        self._scratch = folder / _JOURNALS / f"{part}.scratch"
        for each in (self._images, self._labels):
            each.mkdir(exist_ok=True)

    def _read_description(self) -> dict:
        if not self._description.is_file():
            return {}
        try:
            description = json.loads(self._description.read_text())
            return {key: description[key] for key in ("channel_names", "file_ending", "dataset", "last_import")}
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{self._description} is damaged, or not made by import ({type(error).__name__}: {error}); remove it, "
                "and the same command makes it again"
            ) from error

    def _number_of_channels(self, before: Mapping) -> int:
        """Of the dataset as it is, else of most sources."""
        counted = Counter(len(source.paths) for source in self.sources).most_common(1)[0][0]
        channels = len(before["channel_names"]) if before else counted
        if not all(name.strip() for name in self.channel.split(",")):
            raise UserError(f"--channel is {self.channel!r}; give names such as CT or MR, with commas between channels")
        if self.channel != "auto" and len(self.channel.split(",")) != channels:
            raise UserError(
                f"--channel {self.channel} names {len(self.channel.split(','))} channels, the cases have {channels}; "
                "name each, with commas between (a case of several is CASE_0000, CASE_0001, ... in one folder)"
            )
        return channels

    def to_do(
        self, sources: Iterable[Source], records: Mapping[str, Record], again: tuple[str, ...] = ()
    ) -> list[Source]:
        """The sources that are new, changed, imported with other settings, or whose files are gone.

        Args:
            again: kinds of reasons for which a rejected source is to be tried again.
        """
        present = self._present()
        rows = final_rows(records, present, self._settled)

        def is_settled(row: Row) -> bool:
            case = row.case or (row.reason.removeprefix(DUPLICATE) if row.reason.startswith(DUPLICATE) else "")
            return case in present if case else row.kind not in again

        def is_done(source: Source) -> bool:
            record = records.get(source.key)
            if record is None or (record.stamp, record.settings) != (source.stamp, self._digest):
                return False
            return all(map(is_settled, rows[source.key]))

        return [source for source in sources if not is_done(source)]

    def done(self) -> dict[str, Record]:
        """What is done of this command's sources and of those that the dataset is made of; of no others.

        Others are of commands that were refused or have not ended: they must be given again to count.
        """
        own = self.journal.merged().union(source.key for source in self.sources)
        return {source: record for source, record in self.journal.read().items() if source in own}

    def run(self, share: Sequence[Source], processes: int) -> None:
        """Import what is not done of a share of the sources.

        Raises:
            CannotWriteError, OSError: the files cannot be written.
        """
        todo = self.to_do(share, self.done(), _TRY_AGAIN)
        progress = tqdm(total=len(share), initial=len(share) - len(todo), unit="vol", smoothing=0.05)
        try:
            self._import(todo, processes, progress)
            # a source that has changed may have had duplicates, which are none any more
            self._import(self.to_do(share, self.done()), processes, progress)
        finally:
            progress.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _import(self, todo: Sequence[Source], processes: int, progress: tqdm) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)  # of a run that was killed
        self._scratch.mkdir()
        job = partial(import_source, self.folder, self._scratch, self.settings, self._channels)
        keep = "duplicates" in self.settings.selection.keep
        counts: Counter[str] = Counter()
        for source, result in run_in_processes(job, todo, processes, start_worker):
            killed = Row(source.key, reason="memory: reading it killed its process; too large, or damaged")
            rows = [killed] if result is None else result
            self.journal.append(Record(source.key, source.stamp, self._digest, rows, keep))
            counts.update(row.kind or "accepted" for row in rows)
            progress.total += len(rows) - 1
            progress.set_postfix(counts, refresh=False)
            progress.update(len(rows))

    def merge_if_done(self) -> int:
        """Merge if all sources are done, in whatever part; returns how many are not."""
        self._settled = {*self._read_description().get("dataset", ())}
        done = self.done()
        left = len(self.to_do(self.sources, done))
        if not left:
            self.merge(done)
        return left

    def merge(self, done: Mapping[str, Record]) -> None:
        """Write the report and ``dataset.json``, and remove the files of all other cases. Harmless to repeat.

        Raises:
            UserError: no volume was accepted, or the channel cannot be decided; a dataset that is there stays as it is.
        """
        present = self._present()
        missing = "missing: its files are not in the dataset any more; give its path again"
        rows = [
            replace(row, case="", reason=missing) if row.case and row.case not in present else row
            for rows in final_rows(done, present, self._settled).values()
            for row in rows
        ]
        accepted = [row for row in rows if row.case]
        refused = self._mixed(accepted) if accepted else f"none of {len(rows)} volumes can be used: {_rejections(rows)}"
        if refused:
            report = REFUSED if self._settled else REPORT
            self._write_report(rows, report)
            raise UserError(f"{refused}; what became of each: {self.folder / report}")
        names = self._channel_names(accepted)
        self._write_report(rows, REPORT)
        (self.folder / REFUSED).unlink(missing_ok=True)
        self.journal.set_merged(done)
        self._write_description(accepted, names)
        self._remove_others({row.case for row in accepted})
        self._draw([row.case for row in accepted])
        self._print_summary(rows, names)

    # -------------------------------------------------------------- files

    def _present(self) -> set[str]:
        """The cases of which all files are there, and no link leads nowhere."""
        images, labels = (
            {entry.name for entry in os.scandir(folder) if entry.is_file()} for folder in (self._images, self._labels)
        )
        cases = (label[: -len(self.settings.file_ending)] for label in labels)
        return {case for case in cases if images.issuperset(self._image_names(case))}

    def _image_names(self, case: str) -> list[str]:
        return [f"{case}_{channel:04d}{self.settings.file_ending}" for channel in range(self._channels)]

    def _remove_others(self, cases: set[str]) -> None:
        """Remove all that import ever put in place but the files of these cases."""
        images = {name for case in cases for name in self._image_names(case)}
        labels = {f"{case}{self.settings.file_ending}" for case in cases}
        for folder, names in ((self._images, images), (self._labels, labels)):
            for path in folder.iterdir():
                if path.name not in names and CASE_FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _write_report(self, rows: Sequence[Row], name: str) -> None:
        columns = [column.name for column in fields(Row)]
        temporary = self.folder / _JOURNALS / f"{name}.{self.journal.part}"
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["status", *columns])
            for row in rows:
                writer.writerow(["accepted" if row.case else "rejected", *(getattr(row, name) for name in columns)])
        temporary.replace(self.folder / name)

    def _write_description(self, accepted: Sequence[Row], channel_names: Sequence[str]) -> None:
        description = {
            "channel_names": {str(number): name for number, name in enumerate(channel_names)},
            "labels": {"background": 0, "body": 1},
            "numTraining": len(accepted),
            "file_ending": self.settings.file_ending,
            "description": "Unlabelled volumes; label 1 is no annotation, but the body as a threshold finds it.",
            "last_import": {"nnunetv2_vf": __version__, "channel": self.channel, **asdict(self.settings)},
            # without a list of its cases nnU-Net matches every name with every file: for 110,000 a quarter of an hour
            "dataset": {
                row.case: {
                    "images": [f"imagesTr/{name}" for name in self._image_names(row.case)],
                    "label": f"labelsTr/{row.case}{self.settings.file_ending}",
                }
                for row in accepted
            },
        }
        text = json.dumps(description, indent=1)
        if self._description.is_file() and self._description.read_text() == text:
            return  # its time tells whether the fingerprint is of this dataset
        temporary = self.folder / _JOURNALS / f"dataset.json.{self.journal.part}"
        temporary.write_text(text)
        temporary.replace(self._description)

    def _draw(self, cases: Sequence[str]) -> None:
        from nnunetv2_vf.importing.picture import draw_bodies

        some = [cases[i] for i in sorted({*np.linspace(0, len(cases) - 1, _DRAWN).round().astype(int)})]
        files = [
            (case, self._images / self._image_names(case)[0], self._labels / f"{case}{self.settings.file_ending}")
            for case in some
        ]
        temporary = self.folder / _JOURNALS / f"{PICTURE}.{self.journal.part}"
        try:
            draw_bodies(files, temporary)
        except RuntimeError as error:
            print(f"no picture: {one_line(error)}")
            return
        temporary.replace(self.folder / PICTURE)

    # -------------------------------------------------------------- the channel

    def _hu_like(self, accepted: Sequence[Row]) -> list[Counter[str]]:
        """How many volumes look like HU ('yes') and how many do not ('no'), for each channel."""
        return [Counter(row.hu_like.split()[channel] for row in accepted) for channel in range(self._channels)]

    def _mixed(self, accepted: Sequence[Row]) -> str:
        """What is wrong if ``auto`` cannot tell; else empty."""
        if self.channel != "auto":
            return ""
        for channel, answers in enumerate(self._hu_like(accepted)):
            if len(answers) > 1:
                fewer = min(answers, key=lambda answer: answers[answer])
                example = next(row.source for row in accepted if row.hu_like.split()[channel] == fewer)
                return (
                    f"channel {channel} looks like HU (CT) in {answers['yes']} volumes, but not in {answers['no']} "
                    f"({example} is of the fewer): import them into two "
                    "datasets, or if they are of one kind, say so: the same command with --channel CT, or MR"
                )
        return ""

    def _channel_names(self, accepted: Sequence[Row]) -> list[str]:
        if self.channel != "auto":
            return self.channel.split(",")
        return ["CT" if answers["yes"] else "MR" for answers in self._hu_like(accepted)]

    # -------------------------------------------------------------- what it says

    def _print_summary(self, rows: Sequence[Row], channel_names: Sequence[str]) -> None:
        accepted = [row for row in rows if row.case]
        linked = sum(row.linked for row in accepted)
        print(f"{self.folder.name}: {len(accepted)} cases" + (f", {linked} of them links" if linked else ""))
        if len(accepted) < len(rows):
            print(f"  {len(rows) - len(accepted)} volumes rejected: {_rejections(rows)}")
        notes = Counter(note.partition(":")[0] for row in accepted for note in row.note.split("; ") if note)
        if notes:
            print(f"  notes: {', '.join(f'{count} {kind}' for kind, count in notes.most_common())}")
        for number, (name, answers) in enumerate(zip(channel_names, self._hu_like(accepted), strict=True)):
            normalised = "clips and scales it as CT" if name.casefold() == "ct" else "normalises each volume by itself"
            print(
                f"  channel {number} is {name} ({answers['yes']} of {len(accepted)} volumes look like HU"
                f"{'' if self.channel == 'auto' else '; as --channel says'}): nnU-Net {normalised}"
            )
        print(f"  every source and what became of it: {self.folder / REPORT}")
        print(f"  some of the volumes, with the body outlined: {self.folder / PICTURE}")
        fingerprint = Path(nnUNet_preprocessed or "") / self.folder.name / "dataset_fingerprint.json"
        stale = fingerprint.is_file() and fingerprint.stat().st_mtime < self._description.stat().st_mtime
        clean = " --clean" if stale else ""
        if stale:
            print("  what nnUNet_preprocessed has of this dataset is of before: do it again, with --clean")
        number = int(self.folder.name[7:10])
        print(f"next: nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres{clean}")
        print(f"  or, for PCT-Net: nnUNetv2_extract_fingerprint -d {number}{clean}; nnUNetv2_vf plan -d {number}")


def _rejections(rows: Sequence[Row]) -> str:
    counts = Counter(row.kind for row in rows if not row.case)
    return ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
