"""Bad cases are reported once; too many of them are an error."""

from __future__ import annotations

import json

import pytest

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.training.quarantine import Quarantine


def test_a_quarantined_case_is_reported_once_and_too_many_are_an_error(tmp_path):
    quarantine = Quarantine(limit=0.05, file=tmp_path / "quarantine.json")
    line = "WARNING: case a cannot be read; quarantined, other cases are used"
    assert quarantine.add("a", "cannot be read", unusable=True) == line
    assert quarantine.add("a", "cannot be read", unusable=True) is None
    quarantine.require_within_limit(20)
    quarantine.add("b", "is empty", unusable=True)
    quarantine.require_within_limit(40)
    with pytest.raises(UserError, match=r"2 of 39 cases cannot be used, more than 5%.*: a cannot be read; b is empty"):
        quarantine.require_within_limit(39)
    assert json.loads((tmp_path / "quarantine.json").read_text()) == {"a": "cannot be read", "b": "is empty"}


def test_a_case_that_may_be_usable_later_is_reported_once_and_not_quarantined(tmp_path):
    quarantine = Quarantine(limit=0, file=tmp_path / "quarantine.json")
    line = "WARNING: case a is air here; such sub-volumes are skipped"
    assert quarantine.add("a", "is air here", unusable=False) == line
    assert quarantine.add("a", "is air here", unusable=False) is None
    quarantine.require_within_limit(1)
