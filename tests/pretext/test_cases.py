"""Reading preprocessed cases: damaged files, and file systems that fail for a while."""

from __future__ import annotations

import numpy as np
import pytest
from preprocessed_cases import noise, save_cases

from nnunetv2_vf.pretext import cases as cases_module
from nnunetv2_vf.pretext.cases import RejectedCaseError, has_contrast, open_image, read_with_retries


class FailingRead:
    """A read that raises the given errors, one in each call, before it succeeds."""

    def __init__(self, *errors: Exception):
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "data"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(cases_module, "_RETRY_PAUSES", (0.0, 0.0))


def test_a_read_that_fails_twice_because_of_the_file_system_is_tried_a_third_time():
    assert read_with_retries(FailingRead(OSError("stale"), TimeoutError())) == "data"


def test_a_case_is_rejected_after_three_failed_reads():
    read = FailingRead(*[OSError("stale file handle")] * 3)
    with pytest.raises(RejectedCaseError, match=r"^cannot be read \(OSError: stale file handle\)$") as error:
        read_with_retries(read)
    assert error.value.unusable
    assert not read.errors


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), RuntimeError("corrupt"), ValueError("corrupt")])
def test_missing_and_damaged_files_are_not_read_again(error):
    with pytest.raises(RejectedCaseError, match="cannot be read"):
        read_with_retries(FailingRead(error))


def test_lack_of_memory_does_not_reject_the_case():
    with pytest.raises(MemoryError):
        read_with_retries(FailingRead(MemoryError()))


def test_a_case_with_another_number_of_channels_is_rejected(tmp_path):
    cases = save_cases(tmp_path, case=noise(2, 8, 9, 10))
    assert open_image(cases, "case", channels=2).shape == (2, 8, 9, 10)
    assert open_image(cases, "case", channels=None).shape == (2, 8, 9, 10)
    expected = r"has the shape \(2, 8, 9, 10\); expected: \(3, depth, height, width\)"
    with pytest.raises(RejectedCaseError, match=expected) as error:
        open_image(cases, "case", channels=3)
    assert error.value.unusable


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2], True), ([1, 1], False), ([1, np.nan], False), ([1, np.inf], False), ([np.nan, np.nan], False)],
)
def test_an_image_has_contrast_if_one_channel_has_two_finite_values(values, expected):
    image = np.zeros((2, 4, 4, 4))
    image[1] = values[0]
    image[1, 1, 2, 3] = values[1]
    assert has_contrast(image) == expected
