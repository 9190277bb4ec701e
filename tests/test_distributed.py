"""torchrun -m nnunetv2_vf.distributed on CPUs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID, edit_json, fold_folder, pretrain

TIMEOUT = 240  # seconds


def torchrun(processes: int, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    """What a user types, on this machine."""
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "nnunetv2_vf.distributed", str(DATASET_ID), "3d_fullres", "0"),
            *("-tr", "VFPretrainTrainer", "-device", "cpu", *map(str, arguments)),
        ],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


@pytest.fixture
def batch_of_four(own_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plan that four ranks can share, and 20 steps of nnU-Net's optimiser."""
    edit_json(own_dataset / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(batch_size=4))
    for name, value in {"num_epochs": 1, "iterations_per_epoch": 20, "optimizer": "sgd", "initial_lr": 0.001}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    return own_dataset


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_share_a_batch_train_as_one_process(batch_of_four, tmp_path, monkeypatch, processes):
    done = torchrun(processes, nnUNet_results=tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "alone"))
    pretrain()
    shared, alone = (fold_folder(tmp_path / name) for name in ("shared", "alone"))
    files = [torch.load(folder / "checkpoint_final.pth", weights_only=False) for folder in (shared, alone)]
    for name, tensor in files[1]["network_weights"].items():
        torch.testing.assert_close(files[0]["network_weights"][name], tensor, rtol=0, atol=1e-5, msg=name)
    for key in ("train_losses", "val_losses", "mean_fg_dice"):
        assert files[0]["logging"][key] == pytest.approx(files[1]["logging"][key], abs=1e-4), key
    reports = [json.loads((folder / "pretext_report.json").read_text()) for folder in (shared, alone)]
    assert reports[0]["samples"] == reports[1]["samples"]
    assert reports[0]["mean_dice"] == pytest.approx(reports[1]["mean_dice"], abs=1e-3)
    log = next(shared.glob("training_log*.txt")).read_text()
    parts = " + ".join([str(4 // processes)] * processes)
    assert f"{processes} ranks, {processes} on this machine: a batch of {parts} samples" in log
    assert "the learning rate stays what it is set to, 0.001" in log
    assert len(list(shared.glob("training_log*.txt"))) == 1
