"""Long tests (``make test-slow``): processes killed at any moment, machines that fail, a full disk.

The tests use temporary folders, the loopback device, and network namespaces that they create and remove.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID, edit_json, fold_folder, pretrain
from trainings import assert_nearly_same_weights, assert_same_training

from nnunetv2_vf.durable_files import is_undamaged

pytestmark = pytest.mark.slow

KILLS = 50
TIMEOUT = 400  # seconds, for each wait


def wait_until(condition, event: str, process=None) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"waited {TIMEOUT} s for: {event}"
        assert process is None or process.is_alive(), f"the process ended before: {event}"
        time.sleep(0.01)


# ---------------------------------------------------------------- kill -9


def test_fifty_kills_at_random_moments_lose_nothing(two_epochs, tmp_path, monkeypatch, capsys):
    """A checkpoint is written before every step, so that many kills happen while one is written."""
    for name, value in {"num_epochs": 150, "iterations_per_epoch": 4, "save_every_minutes": 0}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    folder = fold_folder(tmp_path / "results")
    rng, kills, while_writing = random.Random(0), 0, 0
    while kills < KILLS:
        process = multiprocessing.get_context("fork").Process(target=continue_training)
        process.start()
        wait_until(functools.partial(is_newer, folder, checkpoint_time(folder)), "a checkpoint", process)
        process.join(rng.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        files = list(folder.glob("checkpoint_*.pth"))
        assert all(map(is_undamaged, files)), files
        while_writing += any(folder.glob("*.part"))
    last = multiprocessing.get_context("fork").Process(target=continue_training)
    last.start()
    last.join(TIMEOUT)
    assert last.exitcode == 0
    with capsys.disabled():
        print(f"\n{kills} kills, {while_writing} of them while a file was being written")
    assert while_writing > 0
    killed = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "whole"))
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "30")
    pretrain()
    assert_same_training(
        torch.load(fold_folder(tmp_path / "whole") / "checkpoint_final.pth", weights_only=False), killed
    )


def checkpoint_time(folder: Path) -> int:
    latest = folder / "checkpoint_latest.pth"
    return latest.stat().st_mtime_ns if latest.is_file() else 0


def is_newer(folder: Path, time_before: int) -> bool:
    return checkpoint_time(folder) != time_before


def continue_training() -> None:
    """Do what ``nnUNetv2_train ... --c`` does, in a process that has imported everything."""
    with Path(os.devnull).open("w") as silent, contextlib.redirect_stdout(silent):
        pretrain(continue_training=True)


# ---------------------------------------------------------------- machines


@pytest.fixture
def two_hosts() -> Iterator[list[str]]:
    """Make two network namespaces that a virtual cable connects; yield their names."""
    if os.geteuid() != 0 or subprocess.run(["ip", "netns"], capture_output=True, check=False).returncode:
        pytest.skip("making network namespaces needs root and iproute2")
    names = [f"vf{os.getpid()}{side}" for side in "ab"]
    commands = [
        *(f"ip netns add {name}" for name in names),
        f"ip link add name cable netns {names[0]} type veth peer name cable netns {names[1]}",
        *(f"ip -n {name} link set {device} up" for name in names for device in ("lo", "cable")),
        *(f"ip -n {name} addr add 10.77.0.{number}/24 dev cable" for number, name in enumerate(names, 1)),
    ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True)
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def launch(host: str, number: int, log: Path, results: Path) -> subprocess.Popen[bytes]:
    """Start torchrun on one of two hosts."""
    command = [
        *("ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", "vf", "--local-addr", f"10.77.0.{number}"),
        *("--rdzv-conf", f"is_host={int(number == 1)}"),  # both namespaces have the same host name
        *("-m", "nnunetv2_vf.distributed", str(DATASET_ID), "3d_fullres", "0"),
        *("-tr", "VFPretrainTrainer", "-device", "cpu"),
    ]
    environment = {
        **os.environ, "nnUNet_results": str(results), "GLOO_SOCKET_IFNAME": "cable", "PYTHONUNBUFFERED": "1"
    }  # fmt: skip
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.parametrize("victim", [None, 0, 1])
def test_two_hosts_train_as_one_process_and_survive_a_kill(copied_dataset, two_hosts, tmp_path, monkeypatch, victim):
    """The killed rank is restarted, and all go on from the newest checkpoint to the same end."""
    edit_json(copied_dataset / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(batch_size=4))
    settings = {"num_epochs": 6, "iterations_per_epoch": 10, "optimizer": "sgd", "initial_lr": 1e-4}
    for name, value in {**settings, "save_every_minutes": 0}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    logs = [tmp_path / f"{host}.log" for host in two_hosts]
    hosts = [launch(host, i + 1, logs[i], tmp_path / "two") for i, host in enumerate(two_hosts)]
    try:
        if victim is not None:
            wait_until(lambda: "Epoch 2" in logs[0].read_text() + logs[1].read_text(), "the third epoch")
            (worker,) = children(hosts[victim].pid)
            os.kill(worker, signal.SIGKILL)
        for host in hosts:
            assert host.wait(TIMEOUT) == 0, "\n".join(log.read_text()[-3000:] for log in logs)
    finally:
        for host in hosts:
            host.kill()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "one"))
    pretrain()
    two, one = (torch.load(fold_folder(tmp_path / name) / "checkpoint_final.pth", weights_only=False)
                for name in ("two", "one"))  # fmt: skip
    assert two["current_epoch"] == one["current_epoch"] == 6
    assert [len(v) for v in two["logging"].values()] == [len(v) for v in one["logging"].values()]
    assert_nearly_same_weights(two, one)
    assert two["logging"]["train_losses"] == pytest.approx(one["logging"]["train_losses"], abs=1e-4)
    output = logs[0].read_text() + logs[1].read_text()
    assert "2 ranks, 1 on this machine" in output
    starts = len(list(fold_folder(tmp_path / "two").glob("training_log*.txt")))
    assert starts == (1 if victim is None else 2)


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 12 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_training_survives_a_full_disk(two_epochs, small_disk, tmp_path, monkeypatch):
    for name, value in {"num_epochs": 60, "iterations_per_epoch": 4, "save_every_minutes": 0.005}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    monkeypatch.setenv("nnUNet_results", str(small_disk))
    folder, output = fold_folder(small_disk), tmp_path / "output"
    command = [str(Path(sys.executable).with_name("nnUNetv2_train")), str(DATASET_ID), "3d_fullres", "0"]
    with output.open("wb") as file, subprocess.Popen(
        [*command, "-tr", "VFPretrainTrainer", "-device", "cpu"],
        stdout=file,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as training:  # fmt: skip
        try:
            wait_until(lambda: "Epoch 3" in output.read_text(), "the fourth epoch")
            wait_until((folder / "checkpoint_latest.pth").is_file, "a checkpoint")
            filler = small_disk / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as endless_file:
                while True:
                    endless_file.write(bytes(4096))
            wait_until(lambda: "checkpoint_latest.pth was not written" in output.read_text(), "a warning")
            assert all(map(is_undamaged, folder.glob("checkpoint_*.pth")))
            assert training.poll() is None, "the training must go on"
            filler.unlink()
            assert training.wait(TIMEOUT) == 0, output.read_text()[-3000:]
        finally:
            training.kill()
    assert "No space left on device" in output.read_text()
    final = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    assert [len(values) for values in final["logging"].values()] == [60] * len(final["logging"])
