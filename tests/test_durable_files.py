"""Files are written whole or not at all, and damage is found."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from nnunetv2_vf.durable_files import is_undamaged, write_durably


def content(number: int) -> dict:
    return {"tensor": torch.full((1000,), float(number)), "number": number}


def number_in(path: Path) -> int:
    return torch.load(path, weights_only=True)["number"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Write a file twice; return its path and that of the previous file."""
    current, previous = tmp_path / "current.pth", tmp_path / "previous.pth"
    for number in (1, 2):
        write_durably(content(number), current, previous=previous)
    return current, previous


def test_the_old_file_becomes_the_previous_one(files):
    current, previous = files
    assert number_in(current) == 2
    assert number_in(previous) == 1
    assert {path.name for path in current.parent.iterdir()} == {current.name, previous.name}
    assert torch.equal(torch.load(current, weights_only=True)["tensor"], content(2)["tensor"])


def test_a_file_system_without_hard_links_keeps_the_previous_file_too(files, monkeypatch):
    current, previous = files

    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    write_durably(content(3), current, previous=previous)
    assert (number_in(current), number_in(previous)) == (3, 2)
    assert is_undamaged(current)


def test_a_full_disk_leaves_all_files_unchanged(files):
    """A limit on file sizes acts like a full disk: the kernel refuses to write more."""
    current, previous = files
    before = {path.name: path.read_bytes() for path in current.parent.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_durably(content(3), current, previous=previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert {path.name: path.read_bytes() for path in current.parent.iterdir()} == before


@pytest.mark.parametrize("step", ["write", "fsync", "link", "replace"])
def test_a_process_killed_while_writing_leaves_an_undamaged_file(files, monkeypatch, step):
    """The process exits without any clean-up, right before each step that changes the disk."""
    current, previous = files
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
        write_durably(content(3), current, previous=previous)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert number_in(current) == 2
    assert is_undamaged(previous)
    write_durably(content(4), current, previous=previous)  # the remains do not disturb it
    assert (number_in(current), number_in(previous)) == (4, 2)
    assert {path.name for path in current.parent.iterdir()} == {current.name, previous.name}


def test_damage_at_any_position_is_found(files):
    current, _ = files
    undamaged = current.read_bytes()
    assert is_undamaged(current)
    for position in range(100, len(undamaged), 97):
        damaged = bytearray(undamaged)
        damaged[position : position + 16] = bytes(byte ^ 255 for byte in damaged[position : position + 16])
        current.write_bytes(damaged)
        # a change in the unused padding between the members of the archive does no harm
        assert not is_undamaged(current) or torch.load(current, weights_only=True)["tensor"].eq(2).all()
    for length in (0, 1, 100, len(undamaged) // 2, len(undamaged) - 1):
        current.write_bytes(undamaged[:length])
        assert not is_undamaged(current)
    assert not is_undamaged(current.with_name("missing"))
