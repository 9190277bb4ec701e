"""Trainings with non-finite steps, cases that cannot be read, and data workers that die."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import make_trainer, run_before_step

from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact

# ---------------------------------------------------------------- numbers that are not finite


def test_a_step_with_a_non_finite_loss_is_skipped_and_counted(three_epochs, folder):
    trainer = make_trainer()
    trainer.initialize()
    loss, calls = trainer.loss, itertools.count()
    trainer.loss = lambda *args: loss(*args) * (float("nan") if next(calls) in (1, 2) else 1.0)
    trainer.run_training()
    logged = torch.load(folder / "checkpoint_final.pth", weights_only=False)["logging"]
    assert logged["skipped_steps"] == [2, 2, 2]
    assert np.isfinite(logged["train_losses"]).all()
    assert all(t.isfinite().all() for t in read_artifact(folder / ARTIFACT_NAME)["network_weights"].values())


def test_twenty_skipped_steps_in_a_row_stop_the_training_and_save_their_samples(two_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_iterations_per_epoch", "30")
    trainer = make_trainer()
    trainer.initialize()
    loss, calls = trainer.loss, itertools.count()
    trainer.loss = lambda *args: loss(*args) * (float("nan") if next(calls) >= 3 else 1.0)
    with pytest.raises(SystemExit, match=r"20 steps in a row .* from step 3 on; .*not_finite_0\.pth has"):
        trainer.run_training()
    saved = torch.load(folder / "not_finite_0.pth", weights_only=False)
    assert saved["steps"] == list(range(3, 23))
    assert saved["sample_indices"][0] == [6, 7]
    assert saved["first_batch"]["tensors"]["foreground"].shape == (2, 1, 16, 16, 24)
    assert len(saved["cases"]) == 20


# ---------------------------------------------------------------- bad data


@pytest.fixture
def forty_cases(copied_dataset, monkeypatch) -> Path:
    """A folder of 40 preprocessed cases: four copies of each of the ten cases of the dataset."""
    folder = copied_dataset / "nnUNetPlans_3d_fullres"
    for file in list(folder.iterdir()):
        for copy in "bcd":
            shutil.copy(file, folder / file.name.replace("torso_", f"torso{copy}_"))
    monkeypatch.setenv("nnUNet_vf_iterations_per_epoch", "30")
    return folder


def test_a_training_goes_on_with_one_damaged_case_in_twenty(forty_cases, folder, monkeypatch):
    """One case is truncated, one is deleted while the training runs; the log reports each of them once."""
    trainer = make_trainer(fold="all")
    truncated, deleted = forty_cases / "torso_0003.b2nd", forty_cases / "torsob_0005.b2nd"
    truncated.write_bytes(truncated.read_bytes()[:500])
    run_before_step(trainer, 3, deleted.unlink)
    trainer.run_training()
    log = next((folder.parent / "fold_all").glob("training_log*.txt")).read_text()
    for case in ("torso_0003", "torsob_0005"):
        assert log.count(f"WARNING: case {case} cannot be read (") == 1
    assert trainer.logger.get_value("quarantined_cases", step=None)[-1] == 2


def test_more_damaged_cases_than_the_limit_stop_the_training_and_are_listed(forty_cases, folder):
    cases = [f"torso_{number:04d}" for number in range(1, 4)]
    for case in cases:
        (forty_cases / f"{case}.b2nd").write_bytes(b"")
    with pytest.raises(SystemExit) as stopped:
        make_trainer(fold="all").run_training()
    assert "3 of 40 cases cannot be used, more than 5%" in stopped.value.code
    assert all(case in stopped.value.code for case in cases)
    assert "nnUNet_vf_quarantine_limit" in stopped.value.code


@pytest.mark.parametrize("suffix", [".b2nd", ".pkl"])
def test_a_training_starts_although_its_first_case_is_damaged(forty_cases, folder, suffix):
    (forty_cases / f"torso_0000{suffix}").write_bytes(b"")
    make_trainer(fold="all").run_training()
    assert (folder.parent / "fold_all" / "checkpoint_final.pth").is_file()


def test_an_error_in_a_data_worker_is_raised_with_the_traceback_of_the_worker(two_epochs, monkeypatch):
    def fail(*_: object) -> None:
        raise ZeroDivisionError("in the worker")

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setattr("nnunetv2_vf.pretext.dataset.draw_fusion_map", fail)
    with pytest.raises(ZeroDivisionError, match=r"(?s)in DataLoader worker process 0.*in __getitem__.*in the worker"):
        make_trainer().run_training()


def test_a_killed_data_worker_is_reported(two_epochs, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setattr("nnunetv2_vf.pretext.dataset.draw_fusion_map", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly"):
        make_trainer().run_training()
