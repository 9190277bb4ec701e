"""Work that machines with a common file system share in parts: ``-num_parts N -part_id I``, and journals of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from nnunetv2_vf.errors import UserError

# Newer versions of filelock would else use a soft lock, a file that survives a kill, where the system has no locks.
_HAS_SOFT_LOCK = "fallback_to_soft" in signature(FileLock.__init__).parameters
_NO_SOFT_LOCK: dict[str, Any] = {"fallback_to_soft": False} if _HAS_SOFT_LOCK else {}
_SCRATCH = ".scratch"
_TIME_STEP = 1e-6  # in seconds; the time of a line, as a float, tells apart steps of 0.3 microseconds
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def check_parts(num_parts: int, part_id: int, processes: int) -> None:
    """Raise UserError unless the part exists and the number of processes is positive."""
    if num_parts < 1:
        raise UserError(f"--num_parts is {num_parts}; it must be at least 1")
    if not 0 <= part_id < num_parts:
        raise UserError(f"--part_id is {part_id}; with --num_parts {num_parts} it must be 0 to {num_parts - 1}")
    if processes < 1:
        raise UserError(f"-np is {processes}; it must be at least 1")


@contextmanager
def continuable_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk and Ctrl-C into a UserError: the same command continues."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read or write {folder}: {error}; fix this, then run the same command to continue"
        ) from error
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command to continue") from None


def part_name(num_parts: int, part_id: int) -> str:
    """Return the name of a part, which its journal, its lock and its scratch folder have."""
    return f"part_{part_id}_of_{num_parts}"


def scratch_folder(journals: Path, part: str) -> Path:
    """Return the path of the folder in which a part writes files before it renames them."""
    return journals / f"{part}{_SCRATCH}"


class PartJournals:
    """A folder with the journal of each part: lines of JSON, appended when a piece of work is finished.

    All journals are read together, and the newest line about a piece of work counts. Each line has a ``time``, in
    seconds since the epoch. A line that a kill has cut off is ignored.

    Args:
        folder: created if it does not exist.
        part: name of this part, to whose journal lines are appended.
    """

    def __init__(self, folder: Path, part: str):
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.part = part
        self._path = folder / f"{part}.jsonl"
        self._newest_time = 0.0

    @contextmanager
    def lock_part(self) -> Iterator[None]:
        """Lock this part. The system releases the lock when the process ends, even if it is killed.

        Nothing is locked if the file system has no locks: starting a part twice only repeats its work.

        Raises:
            UserError: another process works on this part.
        """
        try:
            with _locked(self._lock_file(self.part), timeout=0):
                self._newest_time = max((line.get("time", 0.0) for line in self._read_lines()), default=0.0)
                yield
        except Timeout:
            raise UserError(f"{self.part} is already running, says {self.folder}") from None

    def lock_merge(self) -> AbstractContextManager[bool]:
        """Lock the merging of all parts. Wait if another part merges."""
        return _locked(self.folder / "merge.lock", timeout=-1)

    def append_line(self, content: Mapping[str, Any]) -> None:
        """Append a line to the journal of this part, with the current time.

        It is newer than all lines that existed when the part was locked, even if the clock of an earlier run was ahead.
        """
        self._newest_time = max(time.time(), self._newest_time + _TIME_STEP)
        line = json.dumps({**content, "time": self._newest_time}).encode()
        with self._path.open("ab+") as file:
            if file.tell() and not _ends_with_newline(file):
                line = b"\n" + line  # a kill has cut off the previous line
            file.write(line + b"\n")

    def read_newest(self, key: str) -> dict[str, dict[str, Any]]:
        """Return the newest line of all journals for each value of an entry, such as ``case``."""
        newest: dict[str, dict[str, Any]] = {}
        for line in self._read_lines():
            with suppress(KeyError):  # not written by this version
                if line[key] not in newest or newest[line[key]]["time"] <= line["time"]:
                    newest[line[key]] = line
        return newest

    def _read_lines(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self.folder.glob("*.jsonl")):
            # another part, which has finished the work, may remove the journals
            with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    with suppress(ValueError):  # cut off
                        content = json.loads(line)
                        if isinstance(content, dict):
                            yield content

    @contextmanager
    def replacing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary path; rename it to ``path`` if the block ends without an error."""
        temporary = self.folder / f"{path.name}.{self.part}"
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())  # else a power failure may leave an empty file under the final name
        temporary.replace(path)

    def remove_leftover_scratch_folders(self) -> None:
        """Remove the scratch folders of parts that do not run: they were killed."""
        for folder in self.folder.glob(f"*{_SCRATCH}"):
            with suppress(Timeout), _locked(self._lock_file(folder.stem), timeout=0) as is_locked:
                if is_locked:  # a file system without locks does not tell which parts run
                    shutil.rmtree(folder, ignore_errors=True)

    def _lock_file(self, part: str) -> Path:
        return self.folder / f"{part}.lock"


@contextmanager
def _locked(path: Path, timeout: float) -> Iterator[bool]:
    """Lock a file, and yield True; yield False on a file system without locks.

    Raises:
        Timeout: another process holds the lock.
    """
    lock = FileLock(path, **_NO_SOFT_LOCK)
    try:
        lock.acquire(timeout)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, Timeout) or getattr(error, "errno", errno.ENOSYS) not in _NO_LOCKS:
            raise
    try:
        yield lock.is_locked
    finally:
        lock.release()


def _ends_with_newline(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
