"""TensorBoard and MLflow beside nnU-Net's own loggers; both can write to local files.

nnU-Net's ``MetaLogger`` passes every value on to a list of loggers; those here are added to it. They start with the
first value, so commands that only read a training leave no trace.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nnunetv2_vf.errors import UserError

_ILLEGAL_IN_NAMES = re.compile(r"[^\w. :/-]", re.ASCII)  # of MLflow's metrics
_MLFLOW_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # seconds; other ranks wait for rank 0
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}
_RUN_FILE = "mlflow_run.txt"  # in the output folder: the run that a continued training goes on with


@dataclass(frozen=True)
class Run:
    """The training that is logged.

    Attributes:
        folder: output folder of the training: DATASET/TRAINER__PLANS__CONFIGURATION/fold_X in nnUNet_results.
        settings: recorded once, as text.
        is_continued: False for a new training, which gets a new run.
    """

    folder: Path
    settings: Mapping[str, Any]
    is_continued: bool = False

    @property
    def results(self) -> Path:
        return self.folder.parents[2]

    @property
    def dataset(self) -> str:
        return self.folder.parents[1].name

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name} {self.folder.name}"


class ExtraLogger(ABC):
    """A logger with the methods that ``MetaLogger`` calls.

    If it fails, for example because a server does not answer, it warns, leaves out the rest of the epoch, and tries
    again in the next one. The training continues.

    Args:
        report: prints a line to the log of the training.
    """

    package: ClassVar[str]

    def __init__(self, run: Run, report: Callable[[str], None]):
        self.run = run
        self._report = report
        self._is_started = False
        self._failed_step: int | None = None

    def update_config(self, config: Mapping[str, Any]) -> None:  # noqa: B027  nothing to do, but nnU-Net calls it
        """Ignore nnU-Net's plans: they are in the folder of the training. Our settings are recorded at the start."""

    def log(self, key: str, value: Any, step: int) -> None:
        """Log a number of an epoch; numbers that are unknown (NaN) are left out."""
        if math.isfinite(value):
            self._attempt(step, lambda: self.write_number(key, float(value), step))

    def log_summary(self, key: str, value: Any) -> None:
        """Log a number of the whole training; NaN is left out."""
        if math.isfinite(value):
            self._attempt(None, lambda: self.write_number(key, float(value), 0))

    def log_picture(self, file: Path, step: int) -> None:
        """Log a PNG file."""
        self._attempt(step, lambda: self.write_picture(file, step))

    def log_end(self) -> None:
        """Note that the training has ended."""
        if self._is_started:
            self._attempt(None, self.write_end)

    def _attempt(self, step: int | None, write: Callable[[], None]) -> None:
        if self._failed_step is not None and self._failed_step == step:
            return
        try:
            if not self._is_started:
                self.start(step)
                self._is_started = True
            write()
        except Exception as error:  # servers and disks fail in many ways; no training of weeks ends for that
            self._report(f"WARNING: {self.package} failed ({error}); the training continues, the next epoch is tried")
            self._failed_step = step

    @abstractmethod
    def start(self, step: int | None) -> None:
        """Begin the run or, after an interruption, go on with it at a step."""

    @abstractmethod
    def write_number(self, key: str, value: float, step: int) -> None: ...

    @abstractmethod
    def write_picture(self, file: Path, step: int) -> None: ...

    def write_end(self) -> None:  # noqa: B027  not every logger has an end
        """Mark the run as finished."""


class TensorBoardLogger(ExtraLogger):
    """Writes into the folder ``tensorboard`` beside the checkpoints: ``tensorboard --logdir nnUNet_results``."""

    package = "tensorboard"

    def start(self, step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Values of an earlier start from this step on are hidden: the continued training logs them again.
        self._writer = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=step)
        rows = "\n".join(f"| {name} | {value} |" for name, value in self.run.settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", step or 0)

    def write_number(self, key: str, value: float, step: int) -> None:
        self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def write_picture(self, file: Path, step: int) -> None:
        from matplotlib.image import imread

        self._writer.add_image(file.stem, imread(file)[..., :3], step, dataformats="HWC")
        self._writer.flush()


class MlflowLogger(ExtraLogger):
    """Writes to the server that ``MLFLOW_TRACKING_URI`` names; by default into ``mlflow.db`` in nnUNet_results.

    The experiment is the dataset. A continued training goes on with its run. Unless MLflow's variables say otherwise,
    its usage reports are off, and a server that does not answer holds up a training for seconds only.
    """

    package = "mlflow"
    _run_id = ""

    def start(self, step: int | None) -> None:
        for name, value in _MLFLOW_VARIABLES.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        server = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(server or f"sqlite:///{self.run.results / 'mlflow.db'}")
        if not self._run_id:  # else server or disk have failed below, after the run was created
            self._run_id = self._read_known_run(step)
            if self._run_id:
                return
            run = self._client.create_run(self._find_experiment(bool(server)), run_name=self.run.name)
            self._run_id = run.info.run_id
        (self.run.folder / _RUN_FILE).write_text(f"{self._run_id}\n")
        for name, value in self.run.settings.items():
            self._client.log_param(self._run_id, name, value)

    def _read_known_run(self, step: int | None) -> str:
        """Return the run of the training that continues; empty if there is none, or another server has it."""
        from mlflow.exceptions import MlflowException

        record = self.run.folder / _RUN_FILE
        is_continued = self.run.is_continued or step is None  # None: --val logs no epochs
        if not is_continued or not record.is_file():
            return ""
        run_id = record.read_text().strip()
        try:
            self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return ""
            raise
        return run_id

    def _find_experiment(self, has_server: bool) -> str:
        """Return the experiment of the dataset; make it if there is none."""
        from mlflow.exceptions import MlflowException

        name = self.run.dataset
        pictures = None if has_server else (self.run.results / "mlflow_artifacts" / name).resolve().as_uri()
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, pictures))
            except MlflowException:
                experiment = self._client.get_experiment_by_name(name)  # another fold has just made it
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def write_number(self, key: str, value: float, step: int) -> None:
        self._client.log_metric(self._run_id, _ILLEGAL_IN_NAMES.sub("_", key), value, step=step)

    def write_picture(self, file: Path, step: int) -> None:
        self._client.log_artifact(self._run_id, str(file))

    def write_end(self) -> None:
        self._client.set_terminated(self._run_id)


_PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
LOGGERS: Mapping[str, type[ExtraLogger]] = {"tensorboard": TensorBoardLogger, "mlflow": MlflowLogger}


def require_logger_packages(names: str) -> None:
    """Raise UserError if the package of a logger is not installed.

    Args:
        names: the setting ``loggers``.
    """
    for name in names.split("+"):
        for package in _PACKAGES.get(name, ()):
            if importlib.util.find_spec(package) is None:
                raise UserError(f"loggers = {names} needs {package}; install it: pip install 'nnunetv2-vf[{name}]'")


def make_loggers(names: str, run: Run, report: Callable[[str], None]) -> list[ExtraLogger]:
    """Return the loggers that a setting names, such as ``tensorboard+mlflow``; none for ``none``."""
    return [LOGGERS[name](run, report) for name in names.split("+") if name in LOGGERS]
