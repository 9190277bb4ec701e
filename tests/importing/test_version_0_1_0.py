"""A dataset that version 0.1.0 imported, and its journal, keep working."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from unlabelled_data import (
    DATASET,
    assert_consistent,
    ct,
    image_times,
    read_description,
    read_user_files,
    run_import,
    write_volume,
)

FILES = Path(__file__).parents[1] / "data" / "version_0_1_0" / "import"
OLD_SOURCES = "/data/import_sources"  # the path at which version 0.1.0 found the sources


@pytest.fixture
def old_dataset(dataset: Path, data: Path) -> Path:
    """The dataset in ``nnUNet_raw`` and its sources in ``data``, with the paths and times that the journal states."""
    shutil.copytree(FILES / DATASET, dataset)
    shutil.copytree(FILES / "sources", data, dirs_exist_ok=True)
    for path in (*(dataset / "import_journals").iterdir(), dataset / "import_report.csv"):
        path.write_bytes(path.read_bytes().replace(OLD_SOURCES.encode(), str(data).encode()))
    for line in (dataset / "import_journals" / "part_0_of_1.jsonl").read_text().splitlines():
        record = json.loads(line)
        size, time_ns = map(int, record["stamp"].split())
        assert Path(record["source"]).stat().st_size == size
        os.utime(record["source"], ns=(time_ns, time_ns))
    return dataset


def journal_lines(dataset: Path) -> int:
    return len((dataset / "import_journals" / "part_0_of_1.jsonl").read_text().splitlines())


def test_importing_the_same_sources_converts_nothing_and_changes_no_file(old_dataset, data):
    files, times, description = read_user_files(old_dataset), image_times(old_dataset), read_description(old_dataset)
    journal = (old_dataset / "import_journals" / "part_0_of_1.jsonl").read_text()
    run_import(data)
    assert_consistent(old_dataset)
    assert image_times(old_dataset) == times
    new_description = read_description(old_dataset)
    may_change = {"last_import": None, "description": None}  # the version, and a sentence
    assert new_description | may_change == description | may_change
    new_files = read_user_files(old_dataset)
    del files["dataset.json"], new_files["dataset.json"]
    assert new_files == files
    new_lines = (old_dataset / "import_journals" / "part_0_of_1.jsonl").read_text().removeprefix(journal).splitlines()
    assert [json.loads(line)["source"] for line in new_lines] == [str(data / "text.nii.gz")]  # unreadable: tried again


def test_one_more_source_adds_exactly_one_case(old_dataset, data):
    files, times, description = read_user_files(old_dataset), image_times(old_dataset), read_description(old_dataset)
    write_volume(data / "more.nii.gz", ct(5))
    run_import(data)
    assert_consistent(old_dataset)
    (added,) = {*read_description(old_dataset)["dataset"]} - {*description["dataset"]}
    assert added.startswith("more_")
    assert len(image_times(old_dataset)) == len(times) + 1
    assert times.items() <= image_times(old_dataset).items()
    images_and_labels = {name: content for name, content in files.items() if name.startswith(("images", "labels"))}
    assert images_and_labels.items() <= read_user_files(old_dataset).items()
