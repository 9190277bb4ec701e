"""Trainings on a GPU as users run them: compiled, in bf16, stopped and continued, and started by torchrun with NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID

from nnunetv2_vf.training.signals import EXIT_RESUBMIT

TIMEOUT = 240  # seconds for a process; the first step compiles
TRAIN = (sys.executable, "-m", "nnunetv2.run.run_training", str(DATASET_ID), "3d_fullres", "0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


def run(log: Path, *command: str, stop_at: str | None = None, **variables: object) -> tuple[int, str]:
    """Run a command; return its exit status and its output, also if it hangs: it is killed after TIMEOUT.

    Args:
        stop_at: send SIGTERM when the output has this text.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **{name: str(value) for name, value in variables.items()}}
    deadline = time.monotonic() + TIMEOUT
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while stop_at and process.poll() is None and time.monotonic() < deadline and stop_at not in log.read_text():
                time.sleep(0.2)
            if stop_at:
                process.terminate()
            process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode, log.read_text()


@pytest.mark.gpu
@pytest.mark.parametrize("plans", ["nnUNetPlans", "PCTNetPlans"])
def test_a_compiled_training_in_bf16_is_stopped_and_continued(three_epochs, pct_plans, tmp_path, plans):
    command = (*TRAIN, "-p", plans, "-tr", "VFPretrainTrainer")
    variables = {"nnUNet_compile": "t", "nnUNet_vf_num_epochs": 30}
    status, output = run(tmp_path / "first.log", *command, stop_at="Epoch 2", **variables)
    assert status == EXIT_RESUBMIT, output
    (file,) = (tmp_path / "results").rglob("checkpoint_latest.pth")
    stopped = torch.load(file, weights_only=False)
    status, output = run(tmp_path / "second.log", *command, "--c", **variables)
    assert status == 0, output
    final = torch.load(file.with_name("checkpoint_final.pth"), weights_only=False)
    losses = final["logging"]["train_losses"]
    assert losses[: stopped["current_epoch"]] == stopped["logging"]["train_losses"]
    assert len(losses) == 30
    assert all(torch.tensor(losses).isfinite())


@pytest.mark.gpu
def test_torchrun_trains_a_compiled_network_with_batch_norms_on_one_gpu(three_epochs, pct_plans, tmp_path):
    """NCCL, and DistributedDataParallel with torch.compile; with one rank SyncBatchNorm computes like a batch norm."""
    arguments = (str(DATASET_ID), "3d_fullres", "0", "-p", pct_plans, "-tr", "VFPretrainTrainer")
    command = (*TORCHRUN, "-m", "nnunetv2_vf.distributed", *arguments)
    status, output = run(tmp_path / "torchrun.log", *command, nnUNet_compile="t")
    assert status == 0, output
    (report,) = (tmp_path / "results").rglob("pretext_report.json")
    assert json.loads(report.read_text())["samples"] > 0
