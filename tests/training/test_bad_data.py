"""Trainings that meet numbers that are not finite, cases that cannot be read, and workers that die."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import before_step, make_trainer

from nnunetv2_vf.transfer.artifact import FILE_NAME, read_artifact

# ---------------------------------------------------------------- numbers that are not finite


def test_a_step_that_is_not_finite_is_left_out_and_counted(three_epochs, folder):
    trainer = make_trainer()
    loss, calls = trainer._build_loss, iter(range(100))
    trainer.initialize()

    def sometimes_nan(*args):
        return loss_function(*args) * (float("nan") if next(calls) in (1, 2) else 1.0)

    loss_function, trainer.loss = loss(), sometimes_nan
    trainer.run_training()
    logged = torch.load(folder / "checkpoint_final.pth", weights_only=False)["logging"]
    assert logged["skipped_steps"] == [2, 2, 2]
    assert np.isfinite(logged["train_losses"]).all()
    assert all(t.isfinite().all() for t in read_artifact(folder / FILE_NAME)["network_weights"].values())


def test_twenty_in_a_row_end_the_training_and_leave_their_samples(tiny, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_iterations_per_epoch", "30")
    trainer = make_trainer()
    trainer.initialize()
    loss, calls = trainer.loss, iter(range(100))
    trainer.loss = lambda *args: loss(*args) * (float("nan") if next(calls) >= 3 else 1.0)
    with pytest.raises(SystemExit, match=r"20 steps in a row .* from step 3 on; .*not_finite_0\.pth holds"):
        trainer.run_training()
    left = torch.load(folder / "not_finite_0.pth", weights_only=False)
    assert left["steps"] == list(range(3, 23))
    assert left["sample_indices"][0] == [6, 7]
    assert left["first_batch"]["tensors"]["foreground"].shape == (2, 1, 16, 16, 24)
    assert len(left["cases"]) == 20


# ---------------------------------------------------------------- bad data


@pytest.fixture
def forty_cases(own_dataset, monkeypatch) -> Path:
    """The folder of 40 preprocessed cases, four of each of the dataset's ten."""
    folder = own_dataset / "nnUNetPlans_3d_fullres"
    for file in list(folder.iterdir()):
        for copy in "bcd":
            shutil.copy(file, folder / file.name.replace("torso_", f"torso{copy}_"))
    monkeypatch.setenv("nnUNet_vf_iterations_per_epoch", "30")
    return folder


def test_one_case_in_twenty_may_be_damaged(forty_cases, folder, monkeypatch):
    """One truncated, one deleted while the training runs: each is told of once, and other cases take their place."""
    trainer = make_trainer(fold="all")
    truncated, deleted = forty_cases / "torso_0003.b2nd", forty_cases / "torsob_0005.b2nd"
    truncated.write_bytes(truncated.read_bytes()[:500])
    before_step(trainer, 3, deleted.unlink)
    trainer.run_training()
    log = next((folder.parent / "fold_all").glob("training_log*.txt")).read_text()
    for case in ("torso_0003", "torsob_0005"):
        assert log.count(f"WARNING: case {case} cannot be read (") == 1
    assert trainer.logger.get_value("quarantined_cases", step=None)[-1] == 2


def test_more_stop_the_training_with_the_list(forty_cases, folder):
    cases = [f"torso_{number:04d}" for number in range(1, 4)]
    for case in cases:
        (forty_cases / f"{case}.b2nd").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        make_trainer(fold="all").run_training()
    assert "3 of 40 cases cannot be used, more than 5%" in stopped.value.code
    assert all(case in stopped.value.code for case in cases)
    assert "nnUNet_vf_quarantine_limit" in stopped.value.code


@pytest.mark.parametrize("suffix", [".b2nd", ".pkl"])
def test_the_first_case_may_be_the_damaged_one(forty_cases, folder, suffix):
    (forty_cases / f"torso_0000{suffix}").write_bytes(b"")
    make_trainer(fold="all").run_training()
    assert (folder.parent / "fold_all" / "checkpoint_final.pth").is_file()


def test_a_worker_that_fails_is_reported_with_its_own_traceback(tiny, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the worker")

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setattr("nnunetv2_vf.pretext.sampling.draw_fusion_map", fail)
    with pytest.raises(ZeroDivisionError, match=r"(?s)in DataLoader worker process 0.*in __getitem__.*in the worker"):
        make_trainer().run_training()


def test_a_worker_that_is_killed_is_reported(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setattr("nnunetv2_vf.pretext.sampling.draw_fusion_map", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly"):
        make_trainer().run_training()
