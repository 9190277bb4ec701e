"""Checkpoints: written whole or not at all, and the newest undamaged one is found."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from nnunetv2_vf.durable_files import is_undamaged, write_durably
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.training.checkpoints import BEST, LATEST, PREVIOUS, STATE, newest_undamaged, read_checkpoint


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


def test_a_new_file_replaces_the_old_one_which_keeps_its_second_name(latest):
    assert epoch_of(latest) == 2
    assert epoch_of(latest.with_name(PREVIOUS)) == 1
    assert {path.name for path in latest.parent.iterdir()} == {LATEST, PREVIOUS}
    assert torch.equal(
        torch.load(latest, weights_only=True)["network_weights"]["w"], content(2)["network_weights"]["w"]
    )


def test_a_file_system_without_hard_links_keeps_the_previous_checkpoint_too(latest, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_durably(content(3), latest, previous=latest.with_name(PREVIOUS))
    assert (epoch_of(latest), epoch_of(latest.with_name(PREVIOUS))) == (3, 2)
    assert newest_undamaged(latest, print) == latest


def test_a_full_disk_leaves_all_files_unchanged(latest):
    """A limit on file sizes acts like a full disk: the kernel refuses to write more."""
    before = {path.name: path.read_bytes() for path in latest.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_durably(content(3), latest, previous=latest.with_name(PREVIOUS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert {path.name: path.read_bytes() for path in latest.parent.iterdir()} == before


@pytest.mark.parametrize("step", ["write", "fsync", "link", "replace"])
def test_a_process_killed_while_writing_leaves_an_undamaged_file(latest, monkeypatch, step):
    """The process exits without any clean-up, right before each step that changes the disk."""
    functions = {
        "write": (Path, "open"),
        "fsync": (os, "fsync"),
        "link": (Path, "hardlink_to"),
        "replace": (Path, "replace"),
    }
    owner, name = functions[step]
    process = os.fork()
    if process == 0:
        monkeypatch.setattr(owner, name, lambda *_, **__: os._exit(9))
        write_durably(content(3), latest, previous=latest.with_name(PREVIOUS))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert epoch_of(latest) == 2
    assert is_undamaged(latest.with_name(PREVIOUS))
    write_durably(content(4), latest, previous=latest.with_name(PREVIOUS))  # the remains do not disturb it
    assert (epoch_of(latest), epoch_of(latest.with_name(PREVIOUS))) == (4, 2)
    assert {path.name for path in latest.parent.iterdir()} == {LATEST, PREVIOUS}


def test_damage_at_any_position_is_found(latest):
    undamaged = latest.read_bytes()
    assert is_undamaged(latest)
    for position in range(100, len(undamaged), 97):
        damaged = bytearray(undamaged)
        damaged[position : position + 16] = bytes(byte ^ 255 for byte in damaged[position : position + 16])
        latest.write_bytes(damaged)
        # a change in the unused padding between the members of the archive does no harm
        assert not is_undamaged(latest) or torch.load(latest, weights_only=True)["network_weights"]["w"].eq(2).all()
    for length in (0, 1, 100, len(undamaged) // 2, len(undamaged) - 1):
        latest.write_bytes(undamaged[:length])
        assert not is_undamaged(latest)
    assert not is_undamaged(latest.with_name("missing"))


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
