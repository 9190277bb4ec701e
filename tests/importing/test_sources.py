from __future__ import annotations

import re

import pytest

from nnunetv2_vf.importing.sources import Source, case_name, is_in_part


def test_the_stem_excludes_the_number_of_the_first_channel():
    assert Source(("/x/liver_0000.nii.gz",), "").stem == "liver"
    assert Source(("/x/scan_2019.nii.gz",), "").stem == "scan_2019"


@pytest.mark.parametrize("stem", ["a", "Ünï çode", "a b/../c", "x" * 300, "", "a_0000", "腹部"])
def test_case_names_are_legal_and_stable_and_unique(stem):
    name = case_name(stem, "/data/1")
    assert re.fullmatch(r"[A-Za-z0-9-][A-Za-z0-9_-]{0,79}", name)
    assert not re.search(r"_\d{4}$", name)
    assert name == case_name(stem, "/data/1") != case_name(stem, "/data/2")


def test_every_source_is_in_exactly_one_part_and_parts_have_similar_sizes():
    sources = [Source((f"/data/{i}.nii.gz",), "") for i in range(1000)]
    parts = [[source for source in sources if is_in_part(source, part, 4)] for part in range(4)]
    assert sorted(source.key for part in parts for source in part) == sorted(source.key for source in sources)
    assert all(200 < len(part) < 300 for part in parts)


def test_a_long_bids_name_keeps_subject_session_and_suffix():
    stem = "sub-NDARINV0123456789_ses-baselineYear1Arm1_acq-highresolution_rec-norm_run-01_T1w"
    name = case_name(stem, "/data/1")
    assert name.startswith("sub-NDARINV0123456789_ses-baselineYear1Arm1_T1w_")
    assert case_name("sub-01_ses-02_run-1_T1w", "/data/1").startswith("sub-01_ses-02_run-1_T1w_")
