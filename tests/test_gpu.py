"""Trainings on a GPU as users run them: compiled, in bf16, stopped and continued, and started by torchrun with NCCL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID

from nnunetv2_vf.training.signals import EXIT_RESUBMIT

TIMEOUT = 300  # seconds; the first step compiles
TRAIN = (str(Path(sys.executable).with_name("nnUNetv2_train")), str(DATASET_ID), "3d_fullres", "0")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


def start(*command: str, **variables: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **{name: str(value) for name, value in variables.items()}},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("plans", ["nnUNetPlans", "PCTNetPlans"])
def test_a_compiled_training_in_bf16_is_stopped_and_continued(three_epochs, pct_plans, tmp_path, plans):
    command = (*TRAIN, "-p", plans, "-tr", "VFPretrainTrainer")
    variables = {"nnUNet_compile": "t", "nnUNet_vf_num_epochs": 30}
    with start(*command, **variables) as process:
        for line in process.stdout:
            if "Epoch 2" in line:
                process.terminate()
                break
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == EXIT_RESUBMIT, output
    (file,) = (tmp_path / "results").rglob("checkpoint_latest.pth")
    stopped = torch.load(file, weights_only=False)
    with start(*command, "--c", **variables) as process:
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    final = torch.load(file.with_name("checkpoint_final.pth"), weights_only=False)
    losses = final["logging"]["train_losses"]
    assert losses[: stopped["current_epoch"]] == stopped["logging"]["train_losses"]
    assert len(losses) == 30
    assert all(torch.tensor(losses).isfinite())


@pytest.mark.gpu
def test_torchrun_trains_a_compiled_network_with_batch_norms_on_one_gpu(three_epochs, pct_plans, tmp_path):
    """NCCL, SyncBatchNorm, and DistributedDataParallel with torch.compile."""
    arguments = (str(DATASET_ID), "3d_fullres", "0", "-p", pct_plans, "-tr", "VFPretrainTrainer")
    with start(*TORCHRUN, "-m", "nnunetv2_vf.distributed", *arguments, nnUNet_compile="t") as process:
        output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    (report,) = (tmp_path / "results").rglob("pretext_report.json")
    assert json.loads(report.read_text())["samples"] > 0
