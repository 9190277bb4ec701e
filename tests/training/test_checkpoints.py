"""The newest undamaged checkpoint is found."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from nnunetv2_vf.durable_files import is_undamaged, write_durably
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.training.checkpoints import BEST, FINAL, LATEST, PREVIOUS, STATE, newest_undamaged, read_checkpoint


def content(epoch: int) -> dict:
    weights = torch.full((1000,), float(epoch))
    return {
        "network_weights": {"w": weights},
        "current_epoch": epoch,
        "trainer_name": "T",
        "init_args": {"plans": {}},
    }


def epoch_of(path: Path) -> int:
    return torch.load(path, weights_only=True)["current_epoch"]


@pytest.fixture
def latest(tmp_path: Path) -> Path:
    """Write two checkpoints and return the path of the second; the first is kept as the previous one."""
    path = tmp_path / LATEST
    for epoch in (1, 2):
        write_durably(content(epoch), path, previous=tmp_path / PREVIOUS)
    return path


def test_the_newest_undamaged_checkpoint_is_chosen(latest):
    messages: list[str] = []
    assert newest_undamaged(latest, messages.append) == latest
    assert not messages
    best = latest.with_name(BEST)
    write_durably(content(3), best)
    os.utime(best, (0, 0))  # copying a folder may lose the times: the epoch counts
    assert newest_undamaged(latest, messages.append) == best
    for path in (best, latest):
        path.write_bytes(path.read_bytes()[:-10])
    messages.clear()
    assert newest_undamaged(latest, messages.append) == latest.with_name(PREVIOUS)
    assert messages == [
        f"WARNING: {latest} is damaged, renamed to {LATEST}.damaged",
        f"WARNING: {best} is damaged, renamed to {BEST}.damaged",
        f"Continuing from {PREVIOUS} instead of {LATEST}",
    ]


def test_a_damaged_final_checkpoint_is_not_replaced_by_an_unfinished_one(tmp_path):
    final, best = tmp_path / FINAL, tmp_path / BEST
    write_durably(content(1000), final)
    write_durably(content(800), best)
    final.write_bytes(final.read_bytes()[:-10])
    assert newest_undamaged(final, print) == best
    assert epoch_of(tmp_path / LATEST) == 800  # other ranks find it
    assert not final.exists()


def test_if_all_checkpoints_are_damaged_none_is_renamed(latest):
    for path in (latest, latest.with_name(PREVIOUS)):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_undamaged(latest, print)
    assert not list(latest.parent.glob("*.damaged"))


def test_a_damaged_checkpoint_is_not_kept_as_the_previous_one(latest):
    latest.write_bytes(latest.read_bytes()[:-10])
    previous = newest_undamaged(latest, print)
    assert newest_undamaged(latest, print) == latest, (
        "a training that is killed before it saves starts from the same checkpoint again"
    )
    write_durably(content(5), latest, previous=previous)
    assert is_undamaged(previous)
    assert is_undamaged(latest)


def test_a_read_error_of_the_file_system_is_not_taken_for_damage(latest, monkeypatch):
    def fail(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"cannot be read: .*Stale file handle; try again"):
        newest_undamaged(latest, print)
    monkeypatch.undo()
    assert newest_undamaged(latest, print) == latest


def test_a_checkpoint_of_an_earlier_training_in_the_folder_is_ignored(latest):
    """Its epoch may be higher: the user started a second training in the same folder."""
    best = latest.with_name(BEST)
    write_durably({**content(900), STATE: {"run": "before"}}, best)
    os.utime(best, (0, 0))
    assert newest_undamaged(latest, print) == latest


def test_a_file_that_is_not_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / LATEST
    path.write_bytes(b"PK but not a zip")
    with pytest.raises(UserError, match="damaged or not an nnU-Net checkpoint"):
        read_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="damaged or not an nnU-Net checkpoint"):
        read_checkpoint(path)
