"""Trainings that are interrupted, run out of disk, or meet numbers that are not finite."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATASET, DATASET_ID, fold_folder
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunetv2_vf.interruption import EXIT_STATUS, Interruption
from nnunetv2_vf.long_training import LongTraining, fingerprint
from nnunetv2_vf.weights import FILE_NAME, read_artifact

CPU = torch.device("cpu")
LOGGED = ("train_losses", "val_losses", "mean_fg_dice", "ema_fg_dice", "lrs", "skipped_steps", "quarantined_cases")


def make_trainer(name: str = "VFPretrainTrainer", plans: str = "nnUNetPlans", go_on: bool = False, fold: int | str = 0):
    """As nnUNetv2_train makes it."""
    trainer = get_trainer_from_args(str(DATASET_ID), "3d_fullres", fold, name, plans, go_on, CPU)
    maybe_load_checkpoint(trainer, go_on, validation_only=False)
    return trainer


def before_step(trainer, number: int, do) -> None:
    """Have something done before a step of training or validation, counted from 0 in this process."""
    original, steps = trainer.between_steps, iter(range(10**6))

    def between_steps() -> None:
        if next(steps) == number:
            do()
        original()

    trainer.between_steps = between_steps


def leaves_early(trainer) -> bool:
    try:
        trainer.run_training()
    except SystemExit as left:
        return left.code == EXIT_STATUS
    return False


def send(number: signal.Signals):
    return lambda: os.kill(os.getpid(), number)


SCHEDULE = {
    "nnUNet_vf_num_epochs": "3",
    "nnUNet_vf_iterations_per_epoch": "4",
    "nnUNet_vf_val_iterations_per_epoch": "2",
}


@pytest.fixture
def three_epochs(tiny, monkeypatch) -> None:
    """An epoch has 4 steps of training and 2 of validation: 18 steps."""
    for name, value in SCHEDULE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def uninterrupted(nnunet, pct_plans, tmp_path_factory) -> dict[str, dict]:
    """The final checkpoint of a whole training in three epochs, by plans."""
    results = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SCHEDULE, "nnUNet_results": str(results), "nnUNet_n_proc_DA": "0"}.items():
            patch.setenv(name, value)
        for plans in ("nnUNetPlans", pct_plans):
            make_trainer(plans=plans).run_training()
    return {plans: checkpoint(results, plans) for plans in ("nnUNetPlans", pct_plans)}


def checkpoint(results: Path, plans: str = "nnUNetPlans") -> dict:
    folder = results / DATASET / f"VFPretrainTrainer__{plans}__3d_fullres" / "fold_0"
    return torch.load(folder / "checkpoint_final.pth", weights_only=False)


def assert_same_training(one: dict, other: dict) -> None:
    for name, tensor in one["network_weights"].items():
        assert torch.equal(tensor, other["network_weights"][name]), name
    for name in (name for name in LOGGED if name in one["logging"]):
        np.testing.assert_array_equal(one["logging"][name], other["logging"][name], err_msg=name)
    assert {name: len(values) for name, values in one["logging"].items()} == {
        name: len(values) for name, values in other["logging"].items()
    }
    assert one["_best_ema"] == other["_best_ema"]
    assert one["current_epoch"] == other["current_epoch"]


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("number", "step"),
    [
        pytest.param(signal.SIGTERM, 0, id="before the first", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 2, id="within an epoch"),
        pytest.param(signal.SIGTERM, 5, id="in validation"),
        pytest.param(signal.SIGTERM, 9, id="in the second epoch", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_leaves_and_nothing_is_lost(three_epochs, uninterrupted, pct_plans, tmp_path, number, step):
    """PCT-Net has dropout: also the random numbers go on where they were."""
    trainer = make_trainer(plans=pct_plans)
    before_step(trainer, step, send(number))
    with pytest.raises(SystemExit) as left:
        trainer.run_training()
    assert left.value.code == EXIT_STATUS == 75
    torch.manual_seed(123)  # another process has other random numbers
    np.random.seed(5)  # noqa: NPY002
    make_trainer(plans=pct_plans, go_on=True).run_training()
    assert_same_training(uninterrupted[pct_plans], checkpoint(tmp_path / "results", pct_plans))


def test_many_signals_and_periodic_checkpoints_change_nothing(three_epochs, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")  # before every step
    exits = 0
    while not (fold_folder(tmp_path / "results") / "checkpoint_final.pth").is_file():
        trainer = make_trainer(go_on=exits > 0)
        before_step(trainer, 2, send(signal.SIGTERM))  # a validation begins anew: fewer, and it would never end
        exits += leaves_early(trainer)
    assert exits >= 6
    assert_same_training(uninterrupted["nnUNetPlans"], checkpoint(tmp_path / "results"))


@pytest.mark.parametrize(
    ("trainer", "number"),
    [
        ("VFPretrainTrainer", signal.SIGTERM),
        ("VFFinetuneTrainer", signal.SIGUSR1),
        pytest.param("VFPretrainTrainer", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("VFFinetuneTrainer", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_the_command_leaves_with_a_status_of_its_own(three_epochs, tmp_path, monkeypatch, trainer, number):
    """Its workers get the signal too, as from torchrun, ``timeout`` or SLURM."""
    for prefix in ("nnUNet_vf_", "nnUNet_vf_finetune_"):
        monkeypatch.setenv(f"{prefix}num_epochs", "500")
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    command = [str(Path(sys.executable).with_name("nnUNetv2_train")), str(DATASET_ID), "3d_fullres", "0"]
    with subprocess.Popen(
        [*command, "-tr", trainer, "-device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        for line in process.stdout:
            if "Epoch 1" in line:
                os.killpg(process.pid, number)
                break
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STATUS, rest
    assert f"{number.name}: leaving in epoch" in rest
    assert list((tmp_path / "results").rglob("checkpoint_latest.pth"))


def test_fine_tuning_heeds_signals_too(three_epochs, tmp_path):
    trainer = make_trainer("VFFinetuneTrainer")
    before_step(trainer, 5, send(signal.SIGTERM))  # the second step of the second epoch
    with pytest.raises(SystemExit) as left:
        trainer.run_training()
    assert left.value.code == EXIT_STATUS
    again = make_trainer("VFFinetuneTrainer", go_on=True)
    assert again.current_epoch == 1
    again.run_training()
    assert len(again.logger.get_value("train_losses", step=None)) == 2
    assert not Path(again.output_folder, "checkpoint_previous.pth").exists()


def test_processes_that_were_forked_can_still_be_ended():
    with Interruption() as interruption:
        there, here = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(here, b"!")  # a signal that comes while Python is forking is lost
            for _ in range(200):  # signal.pause would miss a signal that comes just before it
                time.sleep(0.05)
            os._exit(1)
        os.read(there, 1)
        os.kill(process, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
        assert interruption.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---------------------------------------------------------------- checkpoints


def test_a_fingerprint_is_of_every_bit_of_parameters_of_any_shape():
    network = torch.nn.Module()
    network.scale, network.kernel = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(2, 3).half())
    before = fingerprint(network)
    assert fingerprint(network) == before
    for parameter in (network.scale, network.kernel):
        with torch.no_grad():
            parameter.view(-1)[-1] += 2**-10
        assert fingerprint(network) != before
        before = fingerprint(network)


def test_weights_that_drifted_apart_are_told(three_epochs, folder, monkeypatch, capsys):
    trainer = make_trainer()
    trainer.initialize()
    for theirs in (None, "another"):

        def gather(mine, theirs=theirs):
            return [mine, theirs if theirs and isinstance(mine, str) else mine]

        monkeypatch.setattr(trainer, "ranks", SimpleNamespace(size=2, rank=1, gather=gather))
        LongTraining.on_train_end(trainer)
        assert ("WARNING: the weights of the ranks have drifted apart" in capsys.readouterr().out) == bool(theirs)


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(
    three_epochs, uninterrupted, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")
    trainer = make_trainer()
    before_step(trainer, 8, send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run_training()
    latest = folder / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    capsys.readouterr()
    trainer = make_trainer(go_on=True)
    said = capsys.readouterr().out
    assert f"WARNING: {latest} is damaged, now checkpoint_latest.pth.damaged" in said
    assert "Going on from checkpoint_previous.pth instead of checkpoint_latest.pth" in said
    trainer.run_training()
    assert_same_training(uninterrupted["nnUNetPlans"], checkpoint(tmp_path / "results"))


def full_disk(folder: Path, monkeypatch) -> None:
    """No file in the folder can be written any more, but for the log, as on a disk that has a few bytes left."""
    original = Path.open

    def refuse(path: Path, mode: str = "r", *args, **kwargs):
        if "w" in mode and path.parent == folder:
            raise OSError(28, "No space left on device", str(path))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)


def test_training_goes_on_while_the_disk_is_full(three_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        before_step(trainer, 7, lambda: full_disk(folder, patch))
        before_step(trainer, 15, patch.undo)
        trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert log.count("WARNING") >= 8
    assert "checkpoint_latest.pth was not written ([Errno 28] No space left on device" in log
    assert (folder / "checkpoint_final.pth").is_file()


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(three_epochs, folder, monkeypatch):
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        before_step(trainer, 17, lambda: full_disk(folder, patch))
        with pytest.raises(SystemExit, match=r"checkpoint_final\.pth was not written.*--c"):
            trainer.run_training()
    assert not (folder / "checkpoint_final.pth").exists()
    make_trainer(go_on=True).run_training()
    assert (folder / "checkpoint_final.pth").is_file()


def test_without_checkpoints_none_are_tried(three_epochs, folder, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")
    trainer = make_trainer()
    trainer.disable_checkpointing = True
    before_step(trainer, 9, send(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run_training()
    said = capsys.readouterr().out
    assert said.count("No checkpoint written") == 2  # the best one of the first epoch, and on leaving
    assert "exit status 75; nothing is saved, as you asked for" in said
    assert not list(folder.glob("*.pth"))


def test_val_best_after_c_is_of_the_best_one(three_epochs, folder, monkeypatch):
    trainer = make_trainer()
    trainer.run_training()
    again = make_trainer(go_on=True)
    best = torch.load(folder / "checkpoint_best.pth", weights_only=False)
    best["network_weights"]["decoder.seg_layers.1.bias"] += 1
    torch.save(best, folder / "checkpoint_best.pth")
    again.load_checkpoint(str(folder / "checkpoint_best.pth"))
    assert torch.equal(
        again.network.state_dict()["decoder.seg_layers.1.bias"], best["network_weights"]["decoder.seg_layers.1.bias"]
    )


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
    monkeypatch.setattr("nnunetv2_vf.sampling.draw_fusion_map", fail)
    with pytest.raises(ZeroDivisionError, match=r"(?s)in DataLoader worker process 0.*in __getitem__.*in the worker"):
        make_trainer().run_training()


def test_a_worker_that_is_killed_is_reported(tiny, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setattr("nnunetv2_vf.sampling.draw_fusion_map", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid\(s\) \d+\) exited unexpectedly"):
        make_trainer().run_training()


# ---------------------------------------------------------------- what is watched


class Backend:
    """A logger as nnU-Net's MetaLogger feeds them, W&B's for one."""

    def __init__(self) -> None:
        self.logged: dict[str, list] = {}

    def log(self, key: str, value, step: int) -> None:
        self.logged.setdefault(key, []).append((step, value))

    def log_summary(self, key: str, value) -> None:
        pass

    def update_config(self, config: dict) -> None:
        pass


def test_what_is_watched_goes_to_the_log_the_picture_and_nnunets_loggers(three_epochs, folder):
    trainer = make_trainer()
    backend = Backend()
    trainer.logger.loggers.append(backend)
    trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert log.count("samples/s, ") == log.count("cases in quarantine") == 3
    assert (folder / "progress.png").stat().st_size > 10_000
    for name in ("samples_per_second", "data_wait_share", "gpu_memory_gb", "skipped_steps", "quarantined_cases"):
        assert [step for step, _ in backend.logged[name]] == [0, 1, 2]
    assert all(value > 0 for _, value in backend.logged["samples_per_second"])
    assert all(0 < value < 1 for _, value in backend.logged["data_wait_share"])


def test_a_collapsed_pretext_is_told(tiny, folder):
    trainer = make_trainer()
    trainer.initialize()
    with torch.no_grad():
        for head in trainer.network.decoder.seg_layers:
            head.weight.zero_()
            head.bias.copy_(torch.tensor([0.0, 0, 50, 0, 0]))
    for group in trainer.optimizer.param_groups:
        group["params"] = group["params"][:1]  # the heads stay
    trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert "WARNING: the pretext has collapsed: 100.0% of the voxels are answered with class 2" in log
