"""Reading preprocessed cases: damaged files, and file systems that fail for a while."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from preprocessed_cases import noise, save_cases

from nnunetv2_vf.pretext import cases as cases_module
from nnunetv2_vf.pretext.cases import RejectedCaseError, has_contrast, open_image


class Pauses:
    """Replaces the pauses between two attempts to read: records them, and may mend the file system during one."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mend_during: dict[int, Callable[[], object]] = {}

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.mend_during.get(len(self.seconds), lambda: None)()


@pytest.fixture
def pauses(monkeypatch) -> Pauses:
    pauses = Pauses()
    monkeypatch.setattr(cases_module.time, "sleep", pauses.sleep)
    return pauses


@pytest.fixture
def cases(tmp_path):
    (tmp_path / "folder").mkdir()
    return save_cases(tmp_path / "folder", case=noise(1, 8, 9, 10))


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_folder_that_is_away_for_a_while_does_not_reject_its_cases(cases, tmp_path, pauses, attempt):
    (tmp_path / "folder").rename(tmp_path / "away")
    pauses.mend_during[attempt] = lambda: (tmp_path / "away").rename(tmp_path / "folder")
    assert open_image(cases, "case", channels=1).shape == (1, 8, 9, 10)
    assert pauses.seconds == [1, 10][:attempt]


def test_a_file_that_cannot_be_opened_for_a_while_does_not_reject_its_case(cases, tmp_path, pauses):
    file, away = tmp_path / "folder" / "case.b2nd", tmp_path / "away"
    file.rename(away)
    file.mkdir()  # opening a folder is an OSError, for blosc2 a RuntimeError

    def mend():
        file.rmdir()
        away.rename(file)

    pauses.mend_during[1] = mend
    assert open_image(cases, "case", channels=1).shape == (1, 8, 9, 10)
    assert pauses.seconds == [1]


def test_a_case_is_rejected_after_three_attempts_if_the_file_system_fails(cases, tmp_path, pauses):
    (tmp_path / "folder").rename(tmp_path / "away")
    with pytest.raises(RejectedCaseError, match=r"^cannot be read \(FileNotFoundError: .*case.b2nd\)$") as error:
        open_image(cases, "case", channels=1)
    assert error.value.unusable
    assert pauses.seconds == [1, 10]


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"no image")])
def test_missing_and_damaged_files_are_rejected_without_a_pause(cases, tmp_path, pauses, damage):
    damage(tmp_path / "folder" / "case.b2nd")
    with pytest.raises(RejectedCaseError, match="cannot be read"):
        open_image(cases, "case", channels=1)
    assert not pauses.seconds


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"\xd3" + (9).to_bytes(8, "big"), b"\xd3" + (10**12).to_bytes(8, "big"), "too few for the shape"),
        (b"b2nd", b"xxxx", "holds no array"),
    ],
)
def test_a_case_with_a_damaged_header_is_rejected(cases, tmp_path, pauses, old, new, message):
    file = tmp_path / "folder" / "case.b2nd"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(RejectedCaseError, match=message):
        open_image(cases, "case", channels=1)


def test_lack_of_memory_does_not_reject_the_case(cases):
    def read():
        raise MemoryError

    with pytest.raises(MemoryError):
        cases_module.read_with_retries(read, cases, "case")


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
