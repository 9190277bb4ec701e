"""How the channels of a dataset are counted and named."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import pytest
from unlabelled_data import (
    assert_consistent,
    ct,
    image_times,
    import_error,
    mr,
    read_description,
    read_outcomes,
    read_report,
    read_user_files,
    run_import,
    write_volume,
)


def channel_names(dataset: Path) -> dict[str, str]:
    return read_description(dataset)["channel_names"]


@pytest.mark.parametrize(("make", "channel"), [(ct, "CT"), (mr, "MR")])
def test_auto_names_the_channel_from_the_intensities(dataset, data, make, channel):
    write_volume(data / "a.nii.gz", make(0))
    run_import(data)
    assert channel_names(dataset) == {"0": channel}


def test_names_of_channels_may_follow_the_comma_with_a_space(dataset, data):
    for channel, make in enumerate((mr, ct)):
        write_volume(data / f"a_{channel:04d}.nii.gz", make(0))
    run_import(data, "--channel", "MR, CT")
    assert channel_names(dataset) == {"0": "MR", "1": "CT"}


def test_the_number_of_channels_is_that_of_most_usable_cases(dataset, data):
    for channel in range(2):
        write_volume(data / f"complete_{channel:04d}.nii.gz", mr(channel))
    for number in range(2):
        write_volume(data / f"incomplete{number}_0001.nii.gz", mr(10 + number))
    run_import(data, "--channel", "T1,T2")
    assert read_outcomes(dataset) == {
        "complete_0000.nii.gz": "accepted",
        "incomplete0_0001.nii.gz": "channels",
        "incomplete1_0001.nii.gz": "channels",
    }


def test_a_mixture_is_refused_with_its_counts_unless_the_channel_is_given(dataset, data):
    for number in range(3):
        write_volume(data / f"ct{number}.nii.gz", ct(number))
    write_volume(data / "mr.nii.gz", mr(0))
    message = import_error(data)
    assert "channel 0 looks like HU (CT) in 3 volumes, but not in 1" in message
    assert "mr.nii.gz is one of the minority" in message
    assert "a name for each channel, such as --channel CT" in message
    assert not (dataset / "dataset.json").exists()
    assert [row["hu_like"] for row in read_report(dataset)] == ["yes", "yes", "yes", "no"]
    times = image_times(dataset)
    run_import(data, "--channel", "PET")
    assert_consistent(dataset)
    assert channel_names(dataset) == {"0": "PET"}
    assert image_times(dataset) == times  # no volume is imported twice


def test_after_a_refused_mixture_a_part_of_it_can_be_imported(dataset, data):
    write_volume(data / "ct" / "a.nii.gz", ct(0))
    write_volume(data / "mr" / "b.nii.gz", mr(0))
    import_error(data)
    run_import(data / "ct")
    assert_consistent(dataset)
    assert channel_names(dataset) == {"0": "CT"}
    assert read_outcomes(dataset) == {"a.nii.gz": "accepted"}


def test_after_a_refused_mixture_the_cases_with_more_channels_can_be_imported(dataset, data):
    for number, make in enumerate((ct, mr, ct)):
        write_volume(data / "one" / f"{number}.nii.gz", make(number))
    for case, channel in itertools.product("ab", range(2)):
        write_volume(data / "two" / f"{case}_000{channel}.nii.gz", mr(ord(case) + channel))
    import_error(data)
    run_import(data / "two")
    assert_consistent(dataset)
    assert len(read_description(dataset)["dataset"]) == 2


def test_a_channel_that_is_given_beside_its_folder_does_not_replace_the_case(dataset, data):
    for channel in range(2):
        write_volume(data / f"a_000{channel}.nii.gz", mr(channel))
    run_import(data)
    run_import(data, data / "a_0000.nii.gz")
    assert_consistent(dataset)
    assert len(read_description(dataset)["dataset"]) == 1


def test_a_refused_addition_leaves_the_dataset_unchanged_until_it_is_given_again(dataset, data):
    for number in range(2):
        write_volume(data / "mr" / f"{number}.nii.gz", mr(number))
    run_import(data / "mr")
    before = read_user_files(dataset)
    write_volume(data / "mixed" / "ct.nii.gz", ct(0))
    for number in range(2, 5):
        write_volume(data / "mixed" / f"{number}.nii.gz", mr(number))
        write_volume(data / "mixed" / f"copy_of_{number}.mha", mr(number))
    assert "looks like HU (CT) in 1 volumes, but not in 5" in import_error(data / "mixed")
    assert before.items() <= read_user_files(dataset).items()
    with (dataset / "import_report_refused.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 9
    run_import(data / "mr")
    assert read_user_files(dataset) == before
    write_volume(data / "more" / "5.nii.gz", mr(5))
    run_import(data / "more")
    assert_consistent(dataset)
    assert sorted(read_outcomes(dataset).items()) == [(f"{number}.nii.gz", "accepted") for number in (0, 1, 5)]
    run_import(data / "mixed", "--channel", "CT")
    assert_consistent(dataset)
    assert len(read_description(dataset)["dataset"]) == 7


def test_a_given_channel_name_also_holds_for_additions(dataset, data):
    write_volume(data / "1" / "a.nii.gz", ct(0))
    run_import(data / "1", "--channel", "CBCT")
    write_volume(data / "2" / "b.nii.gz", mr(0))
    run_import(data / "2")
    assert channel_names(dataset) == {"0": "CBCT"}


def test_cases_with_several_channels_are_imported_and_incomplete_ones_rejected(dataset, data):
    for case in "ab":
        write_volume(data / f"{case}_0000.nii.gz", ct(ord(case)))
        write_volume(data / f"{case}_0001.nii.gz", mr(ord(case)))
    write_volume(data / "c_0000.nii.gz", ct(0))
    run_import(data)
    assert_consistent(dataset)
    assert channel_names(dataset) == {"0": "CT", "1": "MR"}
    outcomes = {"a_0000.nii.gz": "accepted", "b_0000.nii.gz": "accepted", "c_0000.nii.gz": "channels"}
    assert read_outcomes(dataset) == outcomes
    assert "names 1 channels, the cases have 2" in import_error(data, "--channel", "CT")
    run_import(data, "--channel", "CT,FDG")
    assert channel_names(dataset) == {"0": "CT", "1": "FDG"}
