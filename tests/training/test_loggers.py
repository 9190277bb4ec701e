"""TensorBoard and MLflow beside nnU-Net's own logger: numbers of every epoch, pictures, continued trainings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
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
        history = sorted(client.get_metric_history(runs[0].info.run_id, name), key=lambda metric: metric.step)
        by_epoch = {metric.step: metric.value for metric in history}
        assert [*by_epoch.values()] == pytest.approx(values), name
        assert len(history) == 2 or name == "lrs", "nnU-Net logs the rate again when it continues within an epoch"
    assert {"preview", "progress", "pretext_report"} <= set(events.Tags()["images"])
    artifacts = {file.path for file in client.list_artifacts(runs[0].info.run_id)}
    assert artifacts == {"preview.png", "progress.png", "pretext_report.png"}
    assert runs[0].data.params["iterations_per_epoch"] == "2"
    assert runs[0].info.run_name == "VFPretrainTrainer__nnUNetPlans__3d_fullres fold_0"
    assert any(name.startswith("final_val/") for name in runs[0].data.metrics)
    assert runs[0].info.status == "FINISHED"


def test_a_later_validation_goes_on_with_the_run_and_hides_nothing(both, tmp_path):
    make_trainer().run_training()
    validation = make_trainer()
    validation.load_checkpoint(str(fold_folder(tmp_path / "results") / "checkpoint_final.pth"))
    validation.perform_actual_validation()
    assert {"preview", "progress", "pretext_report"} <= set(
        read_tensorboard(fold_folder(tmp_path / "results")).Tags()["images"]
    )
    client, (run,) = read_mlflow(tmp_path / "results")
    assert "pretext_report.png" in {file.path for file in client.list_artifacts(run.info.run_id)}


@pytest.fixture
def fold(tmp_path, monkeypatch) -> Path:
    """The output folder of a training that logs to local files."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "results" / DATASET / "trainer" / "fold_0"
    folder.mkdir(parents=True)
    return folder


def test_a_new_training_in_the_same_folder_is_a_new_run(fold, tmp_path):
    for value in (0.5, 0.4):
        for logger in make_loggers("tensorboard+mlflow", Run(fold, {}), pytest.fail):
            for step in range(2):
                logger.log("train_losses", value, step)
    _, runs = read_mlflow(tmp_path / "results")
    assert len(runs) == 2
    events = read_tensorboard(fold).Scalars("train_losses")
    assert [(event.step, event.value) for event in events] == [(0, pytest.approx(0.4)), (1, pytest.approx(0.4))]


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
        for name in ("lrs", "train_losses"):
            logger.log(name, 0.5, step)
    assert len(lines) == 3, "one warning in each epoch, then the rest of the epoch is left out"
    assert lines[0].startswith("WARNING: mlflow failed")


def test_logging_goes_on_when_the_server_is_back(tmp_path, monkeypatch):
    results = tmp_path / "results"
    fold = results / DATASET / "trainer" / "fold_0"
    fold.mkdir(parents=True)
    lines: list[str] = []
    (logger,) = make_loggers("mlflow", Run(fold, {}), lines.append)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    logger.log("train_losses", 0.5, 0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    logger.log("train_losses", 0.4, 1)
    client, runs = read_mlflow(results)
    assert [metric.step for metric in client.get_metric_history(runs[0].info.run_id, "train_losses")] == [1]


def test_a_server_that_fails_after_it_has_made_the_run_gets_no_second_run(fold, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    lines: list[str] = []
    (logger,) = make_loggers("mlflow", Run(fold, {"seed": 3}), lines.append)

    def fail(*_: object) -> None:
        raise ConnectionError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_param", fail)
        logger.log("train_losses", 0.5, 0)
    logger.log("train_losses", 0.4, 1)
    _, (run,) = read_mlflow(tmp_path / "results")
    assert run.data.params == {"seed": "3"}
    assert run.data.metrics == {"train_losses": 0.4}
    assert len(lines) == 1


def test_a_server_that_fails_when_a_training_continues_gets_no_second_run(fold, tmp_path, monkeypatch):
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    lines: list[str] = []
    (logger,) = make_loggers("mlflow", Run(fold, {}), lines.append)
    logger.log("train_losses", 0.5, 0)
    (logger,) = make_loggers("mlflow", Run(fold, {}, is_continued=True), lines.append)

    def fail(*_: object) -> None:
        raise MlflowException("out of order")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_run", fail)
        logger.log("train_losses", 0.4, 1)
    logger.log("train_losses", 0.3, 2)
    client, (run,) = read_mlflow(tmp_path / "results")
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train_losses")] == [0, 2]
    assert len(lines) == 1


def test_folds_that_start_together_share_an_experiment(tmp_path, monkeypatch):
    """Another fold makes the experiment between the question whether it exists and its creation."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folds = [tmp_path / "results" / DATASET / "trainer" / f"fold_{fold}" for fold in range(2)]
    lines: list[str] = []
    first, second = (make_loggers("mlflow", Run(fold, {}), lines.append)[0] for fold in folds)
    for fold in folds:
        fold.mkdir(parents=True)
    from mlflow import MlflowClient

    ask = MlflowClient.get_experiment_by_name

    def ask_then_be_overtaken(client, name):
        experiment = ask(client, name)
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", ask)
        first.log("train_losses", 0.5, 0)
        return experiment

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", ask_then_be_overtaken)
    second.log("train_losses", 0.5, 0)
    assert not lines
    assert len(read_mlflow(tmp_path / "results")[1]) == 2


@pytest.mark.slow
def test_mlflow_reports_no_usage(tmp_path):
    """MLflow reports its usage unless it is told not to, or runs in a test or in CI."""
    code = f"""
from pathlib import Path
from nnunetv2_vf.training.loggers import Run, make_loggers
make_loggers("mlflow", Run(Path({str(tmp_path / "results" / DATASET / "trainer")!r}), {{}}), print)[0].start(0)
from mlflow.environment_variables import MLFLOW_DISABLE_TELEMETRY
print("switched off:", MLFLOW_DISABLE_TELEMETRY.get())
"""
    (tmp_path / "results" / DATASET / "trainer").mkdir(parents=True)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "DO_NOT"))}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, encoding="utf-8")
    assert "switched off: True" in done.stdout, done.stderr


def test_a_missing_package_is_named_before_anything_is_written(both, tmp_path, monkeypatch):
    find = loggers.importlib.util.find_spec
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None if name == "mlflow" else find(name))
    with pytest.raises(SystemExit, match=r"needs mlflow; install it: pip install 'nnunetv2-vf\[mlflow\]'"):
        make_trainer()
    assert not (tmp_path / "results").exists()
