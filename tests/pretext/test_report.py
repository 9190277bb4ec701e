"""The report of a pretraining: confusion matrix, Dice, warnings, and the written files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_vf.pretext.report import count_confusion, dice_per_class, name_scores, pretext_warnings, write_report
from nnunetv2_vf.settings import VFSettings

NO_SHARE = np.zeros(0)  # of a pretext without a mask


def test_voxels_are_counted_by_true_and_predicted_class():
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randint(0, 5, (3, 6, 7, 8), generator=generator) for _ in range(2))
    counted = count_confusion(prediction, target.to(torch.uint8), 5)
    expected = np.zeros((5, 5), int)
    np.add.at(expected, (target.numpy().ravel(), prediction.numpy().ravel()), 1)
    assert np.array_equal(counted.numpy(), expected)


def test_the_dice_of_a_class_that_does_not_occur_is_nan():
    confusion = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    np.testing.assert_allclose(dice_per_class(confusion), [16 / 18, 10 / 12, np.nan])


def test_no_warning_while_the_network_is_learning():
    assert pretext_warnings(np.full((5, 5), 10) + 50 * np.eye(5, dtype=int), NO_SHARE) == []


def test_a_collapsed_pretext_task_gives_a_warning():
    collapsed = np.zeros((5, 5), int)
    collapsed[:, 3] = 100
    assert "collapsed: 100.0% of the voxels are predicted as class 3" in pretext_warnings(collapsed, NO_SHARE)[0]


def test_a_solved_pretext_task_gives_a_warning_only_if_every_class_is_solved():
    confusion = np.ones((5, 5), int) + 1000 * np.eye(5, dtype=int)
    assert "solved: every class has a Dice of at least 0.996" in pretext_warnings(confusion, NO_SHARE)[0]
    confusion[2, 1] = 500
    assert pretext_warnings(confusion, NO_SHARE) == []


@pytest.mark.parametrize("share", [[-0.5], [0.005], [np.nan]])
def test_a_network_that_restores_nothing_gives_a_warning(share):
    no_fusion = np.zeros((0, 0), int)
    assert "restores nothing" in pretext_warnings(no_fusion, np.array(share))[0]
    assert pretext_warnings(no_fusion, np.array([*share, 0.3])) == []


def test_a_collapse_is_reported_beside_a_failed_restoration():
    collapsed = np.zeros((5, 5), int)
    collapsed[:, 3] = 100
    assert len(pretext_warnings(collapsed, np.array([0.0]))) == 2


@pytest.mark.pictures
def test_the_report_is_written_as_json_and_as_a_picture(tmp_path):
    confusion = np.ones((5, 5), int) + 9 * np.eye(5, dtype=int)
    sums = np.array([[10, 0.0, 10.0, 2.5]])  # a channel of which three quarters of the variance are restored
    report = write_report(confusion, sums, 4, VFSettings().as_dict(), tmp_path)
    assert report["restored_share"] == {"channel_0": 0.75}
    assert json.loads((tmp_path / "pretext_report.json").read_text()) == json.loads(json.dumps(report))
    assert report["mean_dice"] == np.mean(list(report["dice_per_class"].values()))
    assert (tmp_path / "pretext_report.png").stat().st_size > 1000


@pytest.mark.pictures
def test_the_report_of_a_pretext_without_fusion_has_a_picture_too(tmp_path):
    sums = np.array([[10, 0.0, 10.0, 25.0], [10, 0.0, 10.0, 1.0], [10, 0.0, 0.0, 1.0]])
    report = write_report(np.zeros((0, 0), int), sums, 4, VFSettings(pretext="masked").as_dict(), tmp_path)
    assert [*report["restored_share"].values()] == pytest.approx([-1.5, 0.9, np.nan], nan_ok=True)
    assert (tmp_path / "pretext_report.png").stat().st_size > 1000


def test_the_report_is_json_although_a_class_does_not_occur(tmp_path):
    write_report(np.diag([5, 0, 5]), np.zeros((0, 4)), 2, {}, tmp_path)

    def refuse(name):
        raise ValueError(name)

    report = json.loads((tmp_path / "pretext_report.json").read_text(), parse_constant=refuse)
    assert list(report["dice_per_class"].values()) == [1, None, 1]


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_report(np.diag([5, 5]), np.zeros((0, 4)), 2, {}, tmp_path)
    old = (tmp_path / "pretext_report.png").read_bytes()

    def fill_disk(_, file, **__):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fill_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(np.diag([5, 5]), np.zeros((0, 4)), 2, {}, tmp_path)
    assert (tmp_path / "pretext_report.png").read_bytes() == old
    assert {file.name for file in tmp_path.iterdir()} == {"pretext_report.png", "pretext_report.json"}


def test_scores_have_names():
    assert name_scores([0.1, 0.2], [0.3]) == {
        "Dice, a = 0/1": 0.1,
        "Dice, a = 1/1": 0.2,
        "restored share, channel 0": 0.3,
    }
    assert [*name_scores([], [0.1, 0.2])] == ["restored share, channel 0", "restored share, channel 1"]
