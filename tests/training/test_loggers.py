"""TensorBoard and MLflow beside nnU-Net's own logger: numbers of every epoch, pictures, continued trainings."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from conftest import DATASET, fold_folder
from trainings import make_trainer, run_before_step, run_until_signal, sender_of

from nnunetv2_vf.training import loggers
from nnunetv2_vf.training.loggers import Run, make_loggers

NUMBERS = (
    "train_losses",
    "val_losses",
    "mean_fg_dice",
    "lrs",
    "samples_per_second",
    "dice_per_class_or_region/class_5",
)


@pytest.fixture
def both(two_epochs, monkeypatch):
    """Both loggers for pretraining and fine-tuning, without a server."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for prefix in ("nnUNet_vf_", "nnUNet_vf_finetune_"):
        monkeypatch.setenv(f"{prefix}loggers", "tensorboard+mlflow")


def read_tensorboard(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def read_mlflow(results: Path):
    """Return client and runs of the dataset's experiment, the newest run first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{results / 'mlflow.db'}")
    return client, client.search_runs([client.get_experiment_by_name(DATASET).experiment_id])


@pytest.mark.pictures
def test_an_interrupted_training_is_one_run_with_every_epoch_once(both, tmp_path):
    trainer = make_trainer()
    run_before_step(trainer, 5, sender_of(signal.SIGTERM))  # in the second epoch
    assert run_until_signal(trainer)
    continued = make_trainer(continue_training=True)
    continued.run_training()
    continued.perform_actual_validation()
    folder = fold_folder(tmp_path / "results")

    events = read_tensorboard(folder)
    client, runs = read_mlflow(tmp_path / "results")
    assert len(runs) == 1
    logged = continued.logger.local_logger.my_fantastic_logging
    for name in NUMBERS:
        key, _, number = name.partition("/class_")
        values = [value[int(number) - 1] if number else value for value in logged[key]]
        assert [event.step for event in events.Scalars(name)] == [0, 1], name
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values), name
        history = {metric.step: metric.value for metric in client.get_metric_history(runs[0].info.run_id, name)}
        assert [history[0], history[1]] == pytest.approx(values), name
    assert {"preview", "progress", "pretext_report"} <= set(events.Tags()["images"])
    artifacts = {file.path for file in client.list_artifacts(runs[0].info.run_id)}
    assert artifacts == {"preview.png", "progress.png", "pretext_report.png"}
    assert runs[0].data.params["iterations_per_epoch"] == "2"
    assert runs[0].info.run_name == "VFPretrainTrainer__nnUNetPlans__3d_fullres fold_0"
    assert any(name.startswith("final_val/") for name in runs[0].data.metrics)


def test_a_new_training_in_the_same_folder_is_a_new_run(both, tmp_path):
    for _ in range(2):
        make_trainer("VFFinetuneTrainer").run_training()
    _, runs = read_mlflow(tmp_path / "results")
    assert len(runs) == 2
    folder = fold_folder(tmp_path / "results").parents[1] / "VFFinetuneTrainer__nnUNetPlans__3d_fullres" / "fold_0"
    assert [event.step for event in read_tensorboard(folder).Scalars("train_losses")] == [0, 1]


def test_without_the_setting_nothing_is_written(two_epochs, tmp_path):
    trainer = make_trainer()
    assert trainer.logger.loggers == []
    assert not (tmp_path / "results" / "mlflow.db").exists()


def test_a_server_that_does_not_answer_ends_no_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nothing listens here
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lines: list[str] = []
    (logger,) = make_loggers("mlflow", Run(tmp_path / "results" / DATASET / "trainer" / "fold_0", {}), lines.append)
    for step in range(3):
        logger.log("train_losses", 0.5, step)
    (line,) = lines
    assert line.startswith("WARNING: mlflow failed")


def test_a_missing_package_is_named_before_anything_is_written(both, tmp_path, monkeypatch):
    find = loggers.importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    with pytest.raises(SystemExit, match=r"needs mlflow; install it: pip install 'nnunetv2-vf\[mlflow\]'"):
        make_trainer()
    assert not (tmp_path / "results").exists()
