"""torchrun -m nnunetv2_vf.distributed on CPUs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID, edit_json, fold_folder, pretrain
from trainings import assert_nearly_same_weights

from nnunetv2_vf import distributed
from nnunetv2_vf.errors import UserError

TIMEOUT = 240  # seconds


def start_torchrun(processes: int, *arguments: object, **variables: object) -> subprocess.Popen[str]:
    """Start the command that a user types, on this machine."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "nnunetv2_vf.distributed", str(DATASET_ID), "3d_fullres", "0"),
            *("-tr", "VFPretrainTrainer", "-device", "cpu", *map(str, arguments)),
        ],
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def torchrun(processes: int, *arguments: object, **variables: object) -> subprocess.CompletedProcess[str]:
    with start_torchrun(processes, *arguments, **variables) as launch:
        output, errors = launch.communicate(timeout=TIMEOUT)
    return subprocess.CompletedProcess(launch.args, launch.returncode, output, errors)


@pytest.fixture
def batch_of_four(copied_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Plans with a batch that four ranks can share, and 4 steps of SGD.

    The gradient of a bias before an instance norm is only rounding error. Adam would make full steps of it, and the
    weights of two runs would differ. A large learning rate or many steps amplify the rounding errors of all weights.
    """
    edit_json(copied_dataset / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(batch_size=4))
    for name, value in {"num_epochs": 1, "iterations_per_epoch": 4, "optimizer": "sgd", "initial_lr": 0.001}.items():
        monkeypatch.setenv(f"nnUNet_vf_{name}", str(value))
    return copied_dataset


@pytest.mark.parametrize(
    ("processes", "pretext"),
    [
        (2, "fusion"),
        pytest.param(4, "fusion", marks=pytest.mark.slow),
        pytest.param(2, "masked", marks=pytest.mark.slow),
        pytest.param(2, "fusion+masked", marks=pytest.mark.slow),
    ],
)
def test_ranks_that_share_a_batch_get_the_weights_of_a_single_process(
    batch_of_four, tmp_path, monkeypatch, processes, pretext
):
    monkeypatch.setenv("nnUNet_vf_pretext", pretext)
    monkeypatch.setenv("nnUNet_vf_mask_side", "4")
    done = torchrun(processes, nnUNet_results=tmp_path / "shared")
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "alone"))
    pretrain()
    shared, alone = (fold_folder(tmp_path / name) for name in ("shared", "alone"))
    files = [torch.load(folder / "checkpoint_final.pth", weights_only=False) for folder in (shared, alone)]
    assert_nearly_same_weights(*files, tolerance=2e-6)
    for key in ("train_losses", "val_losses", "mean_fg_dice"):
        assert files[0]["logging"][key] == pytest.approx(files[1]["logging"][key], abs=1e-4), key
    reports = [json.loads((folder / "pretext_report.json").read_text()) for folder in (shared, alone)]
    assert reports[0]["samples"] == reports[1]["samples"]
    scores = [[*report["dice_per_class"].values(), *report["restored_share"].values()] for report in reports]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3, nan_ok=True)
    log = next(shared.glob("training_log*.txt")).read_text()
    parts = " + ".join([str(4 // processes)] * processes)
    assert f"{processes} ranks, {processes} on this machine: a batch of {parts} samples" in log
    assert "learning rate is not scaled: 0.001" in log
    assert len(list(shared.glob("training_log*.txt"))) == 1


@pytest.mark.slow
def test_batch_per_gpu_gives_every_rank_its_own_batch(batch_of_four, tmp_path):
    settings = {"nnUNet_vf_iterations_per_epoch": 2, "nnUNet_vf_batch_per_gpu": 3}
    done = torchrun(2, "--disable_checkpointing", **settings)
    assert done.returncode == 0, done.stderr
    assert "a batch of 3 + 3 samples" in done.stdout
    report = json.loads((fold_folder(tmp_path / "results") / "pretext_report.json").read_text())
    assert report["samples"] == 2 * 6


def test_a_terminated_launch_continues_from_its_checkpoint(batch_of_four, tmp_path, monkeypatch):
    """The training starts from pretrained weights, which nnU-Net refuses together with --c."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "other"))
    pretrain()
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    weights = fold_folder(tmp_path / "other") / "vf_pretrained.pth"
    settings = {"nnUNet_vf_num_epochs": 300, "nnUNet_n_proc_DA": 2}
    arguments = ("-pretrained_weights", weights)
    folder = fold_folder(tmp_path / "results")
    with start_torchrun(2, *arguments, **settings) as launch:
        for line in launch.stdout:
            if "Epoch 2" in line:
                launch.terminate()  # torchrun terminates its processes, which save a checkpoint
                break
        output, errors = launch.communicate(timeout=TIMEOUT)
    assert launch.returncode != 0
    assert "SIGTERM: exit in epoch" in output, errors[-3000:]
    ended = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
    assert ended["current_epoch"] >= 2
    done = torchrun(1, *arguments, **{**settings, "nnUNet_vf_seed": 1})
    assert done.returncode != 0
    assert "seed = 1 (recorded: 0)" in done.stderr, "it continues, and therefore refuses other settings"


@pytest.mark.slow
def test_ranks_stay_equal_with_new_decoder_stages_and_an_encoder_that_trains_later(batch_of_four, artifacts):
    """Ranks compare their weights at the end. DDP ignores parameters that need no gradient when it is built."""
    schedule = {"num_epochs": 2, "iterations_per_epoch": 3, "schedule": "sawtooth", "decoder_fraction": 0.5}
    settings = {**schedule, "kernel_norms": "fresh", "fresh_decoder_stages": 1}
    variables = {f"nnUNet_vf_finetune_{name}": value for name, value in settings.items()}
    done = torchrun(2, "-tr", "VFFinetuneTrainer", "-pretrained_weights", artifacts["U-Net"], **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pretrained kernels scaled to the norm of new ones, by" in done.stdout
    assert "1 epoch of decoder and heads only, then the whole network" in done.stdout
    assert "differs from rank 0" not in done.stdout + done.stderr


@pytest.mark.parametrize("order", [("-p", "P", "-pretrained_weights", "w"), ("-pretrained_weights", "w", "-p", "P")])
def test_the_flags_of_nnunetv2_train_are_parsed_in_any_order(two_epochs, order):
    arguments = distributed.parse_arguments(
        [*order[:2], "7", "3d_fullres", "all", "-tr", "VFPretrainTrainer", *order[2:], "--npz"]
    )
    assert (arguments.dataset_name_or_id, arguments.configuration, arguments.fold, arguments.p) == (
        "7",
        "3d_fullres",
        "all",
        "P",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tr", "nnUNetTrainer"], "-tr nnUNetTrainer cannot train on several machines; legal: VFPretrainTrainer"),
        (["-tr", "NoTrainer"], "nnU-Net finds no trainer NoTrainer"),
        (["-num_gpus", "2"], "-num_gpus 2 has no effect with torchrun; use torchrun's --nproc-per-node"),
        pytest.param(
            ["-device", "cuda"],
            "torch finds no GPU; train on the CPU with -device cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_illegal_arguments_are_reported_in_one_line(two_epochs, monkeypatch, capsys, arguments, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(sys, "argv", ["distributed.py", "7", "3d_fullres", "0", "-tr", "VFPretrainTrainer", *arguments])
    with pytest.raises(SystemExit, match=re.escape(message)):
        distributed.main()


def test_a_fold_is_named_as_nnunet_names_its_folder(capsys):
    arguments = ["7", "3d_fullres", "00", "-tr", "VFPretrainTrainer"]
    assert distributed.parse_arguments(arguments).fold == "0"
    with pytest.raises(SystemExit, match="2"):
        distributed.parse_arguments(["7", "3d_fullres", "first", "-tr", "VFPretrainTrainer"])
    assert "argument fold: 'first' is no fold; legal: 0 to 4, or all" in capsys.readouterr().err


def test_a_rank_waits_until_it_sees_the_checkpoint_of_rank_0(two_epochs, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    of_rank_0 = ["checkpoint_latest.pth", "checkpoint_best.pth"]
    monkeypatch.setattr(distributed.dist, "broadcast_object_list", lambda found: found.__setitem__(0, of_rank_0))
    arguments = distributed.parse_arguments([str(DATASET_ID), "3d_fullres", "0", "-tr", "VFPretrainTrainer"])
    monkeypatch.setattr(distributed, "_CHECKPOINT_WAIT_S", 1)
    file = fold_folder(tmp_path / "results") / "checkpoint_latest.pth"
    file.parent.mkdir(parents=True)
    file.with_name("checkpoint_best.pth").touch()
    with pytest.raises(UserError, match=r"rank 1 does not find checkpoint_latest.pth, which rank 0 finds in .*fold_0"):
        distributed._is_continued(arguments)
    monkeypatch.setattr(distributed, "_CHECKPOINT_WAIT_S", 60)
    monkeypatch.setattr(distributed.time, "sleep", lambda _: file.touch())  # meanwhile it appears
    assert distributed._is_continued(arguments)


def test_a_device_that_cannot_train_on_several_ranks_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        distributed.parse_arguments(["7", "3d_fullres", "0", "-tr", "VFPretrainTrainer", "-device", "mps"])
    assert "argument -device: invalid choice: 'mps' (choose from" in capsys.readouterr().err


def test_a_start_without_torchrun_shows_the_torchrun_command(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["distributed.py", "7", "3d_fullres", "0", "-tr", "VFPretrainTrainer"])
    with pytest.raises(SystemExit, match="start it with torchrun: torchrun --nproc-per-node 2"):
        distributed.main()


def test_the_slurm_script_ends_the_training_on_sigusr1_and_requeues_the_job(tmp_path):
    """SLURM's commands are replaced by small scripts that record their arguments."""
    calls = tmp_path / "calls"
    for name, script in {
        "srun": f"echo $$ > {tmp_path}/step; echo $@ >> {calls}; trap 'echo ended >> {calls}; exit 1' USR2; "
        "while true; do sleep 0.1; done",
        "scancel": f'[ "$*" = "--signal=TERM 42" ] && kill -USR2 $(cat {tmp_path}/step)',  # srun itself dies of SIGTERM
        "scontrol": f'echo scontrol $@ >> {calls}; echo "host-1"',
        "nnUNetv2_vf": "true",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "42",
        "SLURM_NNODES": "4",
        "nnUNet_raw": "r",
        "nnUNet_preprocessed": "p",
        "nnUNet_results": "s",
        "SLURM_JOB_NODELIST": "host-[1-4]",
    }
    script = Path(__file__).parent.parent / "docs" / "how-to" / "slurm.sh"
    with subprocess.Popen(
        ["bash", str(script)], env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ) as job:
        for _ in range(200):
            time.sleep(0.05)
            if calls.is_file() and "distributed" in calls.read_text():
                break
        time.sleep(0.3)  # until the script waits
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == 0
    assert "--rdzv-endpoint host-1:20042 -m nnunetv2_vf.distributed 100 3d_fullres all" in calls.read_text()
    assert calls.read_text().splitlines()[-2:] == ["ended", "scontrol requeue 42"]
