"""Trainings that are interrupted, resumed, or run out of disk space."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATASET, DATASET_ID, THREE_EPOCHS, fold_folder
from trainings import assert_same_training, make_trainer, run_before_step, run_until_signal, sender_of

from nnunetv2_vf.training.distributed_trainer import weights_digest
from nnunetv2_vf.training.resumable_trainer import ResumableTrainer
from nnunetv2_vf.training.signals import EXIT_RESUBMIT, StopSignals

JOINT_PRETEXT = {"nnUNet_vf_pretext": "fusion+masked", "nnUNet_vf_mask_side": "4"}  # everything that is drawn


@pytest.fixture(scope="module")
def uninterrupted(nnunet, pct_plans, tmp_path_factory) -> dict[str, dict]:
    """Return the final checkpoint of an uninterrupted training of three epochs, by plans."""
    results = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        environment = {**THREE_EPOCHS, **JOINT_PRETEXT, "nnUNet_results": str(results), "nnUNet_n_proc_DA": "0"}
        for name, value in environment.items():
            patch.setenv(name, value)
        for plans in ("nnUNetPlans", pct_plans):
            make_trainer(plans=plans).run_training()
    return {plans: checkpoint(results, plans) for plans in ("nnUNetPlans", pct_plans)}


def checkpoint(results: Path, plans: str = "nnUNetPlans") -> dict:
    folder = results / DATASET / f"VFPretrainTrainer__{plans}__3d_fullres" / "fold_0"
    return torch.load(folder / "checkpoint_final.pth", weights_only=False)


@pytest.fixture(autouse=True)
def joint_pretext(monkeypatch) -> None:
    for name, value in JOINT_PRETEXT.items():
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------- signals


@pytest.fixture
def ctrl_c_enabled():
    """Handle SIGINT also where the tests run in the background of a shell, which ignores it."""
    previous_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous_handler)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        pytest.param(signal.SIGTERM, 0, id="before the first step", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 2, id="within an epoch"),
        pytest.param(signal.SIGTERM, 5, id="in validation", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 9, id="in the second epoch", marks=pytest.mark.slow),
    ],
)
def test_a_training_stopped_by_a_signal_resumes_without_loss(
    three_epochs, uninterrupted, pct_plans, tmp_path, number, step
):
    """PCT-Net has dropout: the random numbers must continue too."""
    trainer = make_trainer(plans=pct_plans)
    run_before_step(trainer, step, sender_of(number))
    with pytest.raises(SystemExit) as exit_info:
        trainer.run_training()
    assert exit_info.value.code == EXIT_RESUBMIT == 75
    torch.manual_seed(123)  # a new process has other random numbers
    np.random.seed(5)  # noqa: NPY002
    make_trainer(plans=pct_plans, continue_training=True).run_training()
    assert_same_training(uninterrupted[pct_plans], checkpoint(tmp_path / "results", pct_plans))


def test_many_signals_and_frequent_checkpoints_do_not_change_the_result(
    three_epochs, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")  # before every step
    exits = 0
    while not (fold_folder(tmp_path / "results") / "checkpoint_final.pth").is_file():
        trainer = make_trainer(continue_training=exits > 0)
        # With step 1 it would never end: a resumed validation starts at its first step.
        run_before_step(trainer, 2, sender_of(signal.SIGTERM))
        exits += run_until_signal(trainer)
    assert exits >= 6
    assert_same_training(uninterrupted["nnUNetPlans"], checkpoint(tmp_path / "results"))


def test_a_training_that_exits_has_ended_its_data_workers(three_epochs, monkeypatch):
    """Else Python ends them, and nnU-Net's thread prints a traceback about dead workers."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer = make_trainer("VFFinetuneTrainer")
    run_before_step(trainer, 1, sender_of(signal.SIGTERM))
    assert run_until_signal(trainer)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("trainer", "number"),
    [
        ("VFPretrainTrainer", signal.SIGTERM),
        pytest.param("VFFinetuneTrainer", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("VFPretrainTrainer", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("VFFinetuneTrainer", signal.SIGTERM, marks=pytest.mark.slow),
        ("VFFinetuneTrainer", signal.SIGINT),
        pytest.param("VFPretrainTrainer", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_the_command_exits_with_the_status_for_resubmission(
    three_epochs, tmp_path, monkeypatch, ctrl_c_enabled, trainer, number
):
    """The data workers receive the signal too, as they do from torchrun, ``timeout`` and SLURM."""
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
    assert process.returncode == (130 if number == signal.SIGINT else EXIT_RESUBMIT), rest
    assert f"{number.name}: exit in epoch" in rest
    assert number != signal.SIGINT or "Traceback" not in rest, rest
    assert list((tmp_path / "results").rglob("checkpoint_latest.pth"))


def test_fine_tuning_stops_at_a_signal_too(three_epochs, tmp_path):
    trainer = make_trainer("VFFinetuneTrainer")
    run_before_step(trainer, 5, sender_of(signal.SIGTERM))  # the second step of the second epoch
    with pytest.raises(SystemExit) as exit_info:
        trainer.run_training()
    assert exit_info.value.code == EXIT_RESUBMIT
    resumed = make_trainer("VFFinetuneTrainer", continue_training=True)
    assert resumed.current_epoch == 1
    resumed.run_training()
    assert len(resumed.logger.get_value("train_losses", step=None)) == 2
    assert not Path(resumed.output_folder, "checkpoint_previous.pth").exists()


def test_a_second_ctrl_c_ends_at_once_unless_it_follows_immediately(ctrl_c_enabled, monkeypatch, capfd):
    now = 100.0
    monkeypatch.setattr("nnunetv2_vf.training.signals.time.monotonic", lambda: now)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the launcher forwards the same Ctrl-C
        assert (signals.received, signals.by_ctrl_c) == ("SIGINT", True)
        now += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err.count("press it again to exit at once") == 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)  # the previous handler is back


def test_ctrl_c_works_without_a_terminal_and_later_signals_do_not_replace_it(ctrl_c_enabled, monkeypatch):
    def broken_pipe(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("nnunetv2_vf.training.signals.os.write", broken_pipe)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert signals.by_ctrl_c


def test_a_signal_after_the_last_step_skips_the_final_validation(three_epochs, tmp_path):
    trainer = make_trainer("VFFinetuneTrainer")
    original = trainer.on_train_end

    def on_train_end() -> None:
        original()
        sender_of(signal.SIGTERM)()

    trainer.on_train_end = on_train_end
    assert run_until_signal(trainer)
    assert list((tmp_path / "results").rglob("checkpoint_final.pth"))


def test_ctrl_c_stays_ignored_in_a_background_process(ctrl_c_enabled):
    """A shell ignores SIGINT in processes that it starts with &."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received is None


def test_forked_processes_can_still_be_terminated():
    with StopSignals() as signals:
        read_end, write_end = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(write_end, b"!")  # Python loses a signal that arrives while it forks
            for _ in range(200):  # signal.pause would miss a signal that comes just before it
                time.sleep(0.05)
            os._exit(1)
        os.read(read_end, 1)
        os.kill(process, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# ---------------------------------------------------------------- checkpoints


def test_the_digest_of_the_weights_depends_on_every_parameter():
    network = torch.nn.Module()
    network.scale, network.kernel = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.ones(2, 3).half())
    before = weights_digest(network)
    assert weights_digest(network) == before
    for parameter in (network.scale, network.kernel):
        with torch.no_grad():
            parameter.view(-1)[-1] += 2**-10
        assert weights_digest(network) != before
        before = weights_digest(network)


def test_different_weights_on_the_ranks_are_reported(three_epochs, folder, monkeypatch, capsys):
    trainer = make_trainer()
    trainer.initialize()
    trainer.state()  # chooses the fold's cases, while the ranks are still whole
    for other_digest in (None, "another"):

        def gather(value, other_digest=other_digest):
            return [value, other_digest if other_digest and isinstance(value, str) else value]

        monkeypatch.setattr(trainer, "ranks", SimpleNamespace(size=2, rank=1, gather=gather))
        ResumableTrainer.on_train_end(trainer)
        assert ("WARNING: the weights differ between ranks" in capsys.readouterr().out) == bool(other_digest)


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_used(
    three_epochs, uninterrupted, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")
    trainer = make_trainer()
    run_before_step(trainer, 8, sender_of(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run_training()
    latest = folder / "checkpoint_latest.pth"
    latest.write_bytes(latest.read_bytes()[:-1000])
    capsys.readouterr()
    trainer = make_trainer(continue_training=True)
    output = capsys.readouterr().out
    assert f"WARNING: {latest} is damaged, renamed to checkpoint_latest.pth.damaged" in output
    assert "Continuing from checkpoint_previous.pth instead of checkpoint_latest.pth" in output
    trainer.run_training()
    assert_same_training(uninterrupted["nnUNetPlans"], checkpoint(tmp_path / "results"))


def full_disk(folder: Path, monkeypatch) -> None:
    """Let no file of the folder be written but the log, as on a disk with a few bytes left."""
    original = Path.open

    def refuse(path: Path, mode: str = "r", *args, **kwargs):
        if "w" in mode and path.parent == folder:
            raise OSError(28, "No space left on device", str(path))
        return original(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)


def test_a_training_goes_on_while_the_disk_is_full(three_epochs, folder, monkeypatch):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        run_before_step(trainer, 7, lambda: full_disk(folder, patch))
        run_before_step(trainer, 15, patch.undo)
        trainer.run_training()
    log = next(folder.glob("training_log*.txt")).read_text()
    assert log.count("WARNING") >= 8
    assert "checkpoint_latest.pth was not written ([Errno 28] No space left on device" in log
    assert (folder / "checkpoint_final.pth").is_file()


def test_a_final_checkpoint_that_cannot_be_written_is_an_error(three_epochs, folder, monkeypatch):
    trainer = make_trainer()
    with monkeypatch.context() as patch:
        run_before_step(trainer, 17, lambda: full_disk(folder, patch))
        with pytest.raises(SystemExit, match=r"checkpoint_final\.pth was not written.*--c"):
            trainer.run_training()
    assert not (folder / "checkpoint_final.pth").exists()
    make_trainer(continue_training=True).run_training()
    assert (folder / "checkpoint_final.pth").is_file()


def test_a_signal_does_not_hide_that_the_final_checkpoint_cannot_be_written(three_epochs, folder, monkeypatch):
    trainer = make_trainer()

    def fill_disk_and_terminate():
        full_disk(folder, monkeypatch)
        trainer.stop_signals.received = "SIGTERM"

    save = trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda file: (file.endswith("final.pth") and fill_disk_and_terminate(), save(file))
    )
    with pytest.raises(SystemExit, match=r"checkpoint_final\.pth was not written.*--c"):
        trainer.run_training()


def test_a_best_checkpoint_that_a_kill_has_prevented_is_written_when_the_training_continues(
    three_epochs, folder, monkeypatch
):
    monkeypatch.setenv("nnUNet_vf_save_every", "1")

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    trainer = make_trainer()
    save = trainer.save_checkpoint
    monkeypatch.setattr(trainer, "save_checkpoint", lambda file: kill() if file.endswith("best.pth") else save(file))
    with pytest.raises(Killed):
        trainer.run_training()
    assert not (folder / "checkpoint_best.pth").exists()
    trainer = make_trainer(continue_training=True)
    run_before_step(trainer, 0, kill)
    with pytest.raises(Killed):
        trainer.run_training()
    latest, best = (torch.load(folder / f"checkpoint_{name}.pth", weights_only=False) for name in ("latest", "best"))
    assert best["current_epoch"] == latest["current_epoch"] == 1
    assert all(torch.equal(tensor, latest["network_weights"][name]) for name, tensor in best["network_weights"].items())
    times = (folder / "checkpoint_best.pth").stat().st_mtime_ns
    trainer = make_trainer(continue_training=True)
    run_before_step(trainer, 0, kill)
    with pytest.raises(Killed):
        trainer.run_training()
    assert (folder / "checkpoint_best.pth").stat().st_mtime_ns == times  # it is written once


def test_a_training_that_continues_with_other_cases_says_so(three_epochs, copied_dataset, tmp_path):
    trainer = make_trainer(fold="all")
    run_before_step(trainer, 1, sender_of(signal.SIGTERM))
    assert run_until_signal(trainer)
    for file in (copied_dataset / "nnUNetPlans_3d_fullres").glob("torso_0000*"):
        file.unlink()
    trainer = make_trainer(fold="all", continue_training=True)
    run_before_step(trainer, 0, sender_of(signal.SIGTERM))
    assert run_until_signal(trainer)
    logs = (fold_folder(tmp_path / "results", "all")).glob("training_log*")
    assert sum("the cases of this fold are others than before" in log.read_text() for log in logs) == 1


def test_a_report_that_cannot_be_written_is_made_when_the_training_continues(three_epochs, folder):
    trainer = make_trainer()
    trainer.run_training()
    (folder / "pretext_report.json").mkdir()  # no file can be written there
    with pytest.raises(SystemExit, match=r"pretext_report\.json was not written.*--c"):
        trainer.perform_actual_validation()
    (folder / "pretext_report.json").rmdir()
    make_trainer(continue_training=True).perform_actual_validation()
    assert (folder / "pretext_report.json").is_file()


def test_a_save_that_fails_does_not_change_the_epoch(three_epochs, monkeypatch):
    trainer = make_trainer()

    def fail(_: str) -> None:
        raise MemoryError

    monkeypatch.setattr(trainer, "save_checkpoint", fail)
    trainer.current_epoch = 2
    trainer.stop_signals.received = "SIGTERM"
    with pytest.raises(MemoryError):
        trainer.between_steps()
    assert trainer.current_epoch == 2


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="Linux lists the files in memory")
def test_a_continued_training_does_not_keep_the_file_of_its_checkpoint_open(three_epochs, folder):
    trainer = make_trainer()
    run_before_step(trainer, 7, sender_of(signal.SIGTERM))
    assert run_until_signal(trainer)
    continued = make_trainer(continue_training=True)
    continued.on_train_start()
    gc.collect()
    assert str(folder / "checkpoint_latest.pth") not in Path("/proc/self/maps").read_text()


def test_a_training_can_run_in_a_thread(three_epochs, folder):
    thread = threading.Thread(target=make_trainer().run_training)
    thread.start()
    thread.join()
    assert (folder / "checkpoint_final.pth").is_file()


def test_disable_checkpointing_writes_no_checkpoint_at_a_signal_either(three_epochs, folder, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_vf_save_every_minutes", "0")
    trainer = make_trainer()
    trainer.disable_checkpointing = True
    run_before_step(trainer, 9, sender_of(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run_training()
    output = capsys.readouterr().out
    assert output.count("No checkpoint written") == 2  # the best one of the first epoch, and the one at the signal
    assert "status 75; nothing is saved (--disable_checkpointing)" in output
    assert not list(folder.glob("*.pth"))


def test_val_best_after_c_loads_the_best_checkpoint(three_epochs, folder, monkeypatch):
    first = make_trainer(continue_training=True)  # there is nothing to continue from
    first.run_training()
    resumed = make_trainer(continue_training=True)
    best = torch.load(folder / "checkpoint_best.pth", weights_only=False)
    bias = best["network_weights"]["decoder.seg_layers.1.bias"]
    bias += 1
    best["current_epoch"] = 1  # the final one is further
    torch.save(best, folder / "checkpoint_best.pth")
    for trainer in (first, resumed):
        trainer.load_checkpoint(str(folder / "checkpoint_best.pth"))
        assert torch.equal(trainer.network.state_dict()["decoder.seg_layers.1.bias"], bias)
