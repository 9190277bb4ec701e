from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from nnunetv2_vf.durable_files import is_whole, write_durably
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
    """The second of two checkpoints; the first is the previous one."""
    path = tmp_path / LATEST
    for epoch in (1, 2):
        write_durably(content(epoch), path, previous=tmp_path / PREVIOUS)
    return path


def test_a_file_replaces_another_which_keeps_a_second_name(latest):
    assert epoch_of(latest) == 2
    assert epoch_of(latest.with_name(PREVIOUS)) == 1
    assert {path.name for path in latest.parent.iterdir()} == {LATEST, PREVIOUS}
    assert torch.equal(
        torch.load(latest, weights_only=True)["network_weights"]["w"], content(2)["network_weights"]["w"]
    )


def test_it_does_without_hard_links(latest, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_durably(content(3), latest, previous=latest.with_name(PREVIOUS))
    assert (epoch_of(latest), epoch_of(latest.with_name(PREVIOUS))) == (3, 2)
    assert newest_undamaged(latest, print) == latest


def test_a_disk_that_is_full_leaves_everything_as_it_was(latest):
    """A limit on the size of files stands for it: the kernel refuses to write on."""
    before = {path.name: path.read_bytes() for path in latest.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_durably(content(3), latest, previous=latest.with_name(PREVIOUS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    assert {path.name: path.read_bytes() for path in latest.parent.iterdir()} == before


@pytest.mark.parametrize("step", ["write", "fsync", "link", "replace"])
def test_whenever_it_is_killed_a_whole_file_is_there(latest, monkeypatch, step):
    """The process ends without any cleaning up at each of the moments at which the disk changes."""
    seam = {
        "write": (Path, "open"),
        "fsync": (os, "fsync"),
        "link": (Path, "hardlink_to"),
        "replace": (Path, "replace"),
    }
    owner, name = seam[step]
    process = os.fork()
    if process == 0:
        monkeypatch.setattr(owner, name, lambda *_, **__: os._exit(9))
        write_durably(content(3), latest, previous=latest.with_name(PREVIOUS))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert epoch_of(latest) == 2
    assert is_whole(latest.with_name(PREVIOUS))
    write_durably(content(4), latest, previous=latest.with_name(PREVIOUS))  # what was left behind is in no one's way
    assert (epoch_of(latest), epoch_of(latest.with_name(PREVIOUS))) == (4, 2)
    assert {path.name for path in latest.parent.iterdir()} == {LATEST, PREVIOUS}


def test_damage_anywhere_is_found(latest):
    whole = latest.read_bytes()
    assert is_whole(latest)
    for position in range(100, len(whole), 97):
        damaged = bytearray(whole)
        damaged[position : position + 16] = bytes(byte ^ 255 for byte in damaged[position : position + 16])
        latest.write_bytes(damaged)
        # what differs in unused padding between the members of the archive is no damage
        assert not is_whole(latest) or torch.load(latest, weights_only=True)["network_weights"]["w"].eq(2).all()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        latest.write_bytes(whole[:length])
        assert not is_whole(latest)
    assert not is_whole(latest.with_name("missing"))


def test_of_several_checkpoints_the_newest_that_is_whole_is_taken(latest):
    said: list[str] = []
    assert newest_undamaged(latest, said.append) == latest
    assert not said
    best = latest.with_name(BEST)
    write_durably(content(3), best)
    os.utime(best, (0, 0))  # a copy of a folder does not keep the order
    assert newest_undamaged(latest, said.append) == best
    for path in (best, latest):
        path.write_bytes(path.read_bytes()[:-10])
    said.clear()
    assert newest_undamaged(latest, said.append) == latest.with_name(PREVIOUS)
    assert said == [
        f"WARNING: {latest} is damaged, now {LATEST}.damaged",
        f"WARNING: {best} is damaged, now {BEST}.damaged",
        f"Continuing from {PREVIOUS} instead of {LATEST}",
    ]


def test_where_all_are_damaged_nothing_is_touched(latest):
    for path in (latest, latest.with_name(PREVIOUS)):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
        newest_undamaged(latest, print)
    assert not list(latest.parent.glob("*.damaged"))


def test_a_damaged_checkpoint_does_not_become_the_previous_one(latest):
    latest.write_bytes(latest.read_bytes()[:-10])
    previous = newest_undamaged(latest, print)
    assert newest_undamaged(latest, print) == latest, "killed before it saved, a training begins where it began"
    write_durably(content(5), latest, previous=previous)
    assert is_whole(previous)
    assert is_whole(latest)


def test_a_file_system_that_fails_is_no_damage(latest, monkeypatch):
    def fail(*_):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"cannot be read: .*Stale file handle; try again"):
        newest_undamaged(latest, print)
    monkeypatch.undo()
    assert newest_undamaged(latest, print) == latest


def test_a_checkpoint_of_a_training_before_is_left_alone(latest):
    """It may be further: the training that is continued was started anew in the same folder."""
    best = latest.with_name(BEST)
    write_durably({**content(900), STATE: {"run": "before"}}, best)
    os.utime(best, (0, 0))
    assert newest_undamaged(latest, print) == latest


def test_what_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / LATEST
    path.write_bytes(b"PK but not a zip")
    with pytest.raises(UserError, match="damaged or no nnU-Net checkpoint"):
        read_checkpoint(path)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="damaged or no nnU-Net checkpoint"):
        read_checkpoint(path)
