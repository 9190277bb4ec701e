"""nnU-Net's local logger; for pretraining, with a progress.png that has a curve for every output of the network."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunetv2_vf.durable_files import replacing

_DASHED: dict[str, Any] = {"color": "black", "linestyle": "--"}
# Logged once per epoch beside nnU-Net's own values: samples per second on all ranks together; share of the time spent
# waiting for data; peak GPU memory in GB (NaN without a GPU); skipped steps of the whole training; cases in quarantine
# since the last start.
MONITORED = ("samples_per_second", "data_wait_share", "gpu_memory_gb", "skipped_steps", "quarantined_cases")


class PlotLogger(LocalLogger):
    """nnU-Net's logger. If progress.png cannot be written, for example on a full disk, it only warns."""

    def plot_progress_png(self, output_folder: str) -> None:
        try:
            self.draw(Path(output_folder) / "progress.png")
        except OSError as error:
            print(f"WARNING: progress.png was not written ({error})")

    def draw(self, file: Path) -> None:
        """Draw all logged values to ``progress.png``."""
        folder = file.with_suffix(".part")  # nnU-Net chooses the name of the file
        folder.mkdir(exist_ok=True)
        try:
            super().plot_progress_png(str(folder))
            (folder / file.name).replace(file)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class PretrainLogger(PlotLogger):
    """Logs what nnU-Net logs, with a score of each output as ``dice_per_class_or_region``, and :data:`MONITORED`.

    Args:
        score_colours: the name of every score, in order, and the colour of its curve.
    """

    def __init__(self, score_colours: Mapping[str, Any]):
        super().__init__()
        self.my_fantastic_logging |= {name: [] for name in MONITORED}
        self.score_colours = score_colours

    def draw(self, file: Path) -> None:
        """Draw losses, the score of each output, learning rate and :data:`MONITORED` over the epochs."""
        # Lines alone would not show a single epoch, or one between two unknown values.
        with rc_context({"lines.marker": "."}):
            self._draw(file)

    def _draw(self, file: Path) -> None:
        logged = self.my_fantastic_logging
        epochs = np.arange(min(len(values) for values in logged.values()))
        curves = {name: np.asarray(values[: len(epochs)]) for name, values in logged.items()}

        has_gpu = not np.isnan(curves["gpu_memory_gb"]).all()
        figure = Figure(figsize=(14, 25), layout="constrained")
        losses, scores, seconds, speed, problems, rate, *memory = figure.subplots(6 + has_gpu, sharex=True)
        losses.plot(epochs, curves["train_losses"], label="training")
        losses.plot(epochs, curves["val_losses"], label="validation (fixed samples)")
        _set_y_axis(losses, "loss")
        self._draw_scores(scores, epochs, curves)
        seconds.plot(epochs, curves["epoch_end_timestamps"] - curves["epoch_start_timestamps"])
        _set_y_axis(seconds, "seconds per epoch", bottom=0)
        speed.plot(epochs, curves["samples_per_second"], label="samples per second")
        _set_y_axis(speed, "samples per second", bottom=0)
        waiting = speed.twinx()
        waiting.plot(epochs, 100 * curves["data_wait_share"], **_DASHED, label="waiting for data, %")
        _set_y_axis(waiting, "% of the time", bottom=0, top=100)
        problems.plot(epochs, curves["skipped_steps"], label="skipped steps (not finite)")
        problems.plot(epochs, curves["quarantined_cases"], label="cases in quarantine\n(since the last start)")
        _set_y_axis(problems, "number so far", bottom=0)
        rate.plot(epochs, curves["lrs"])
        _set_y_axis(rate, "learning rate")
        for axes in memory:
            axes.plot(epochs, curves["gpu_memory_gb"])
            _set_y_axis(axes, "GPU memory, GB")
        lowest = memory[-1] if memory else rate
        lowest.set_xlabel("epoch")
        lowest.xaxis.get_major_locator().set_params(integer=True)

        for axes in (losses, scores, problems):
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        waiting.legend(loc="upper left", bbox_to_anchor=(1.05, 1))
        for axes in (losses, scores, seconds, speed, problems, rate, *memory):
            axes.grid(alpha=0.3)
        with replacing(file) as unfinished:
            figure.savefig(unfinished, dpi=100, format="png")

    def _draw_scores(self, axes: Axes, epochs: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
        scores = curves["dice_per_class_or_region"].T
        for (name, colour), values in zip(self.score_colours.items(), scores, strict=True):
            axes.plot(epochs, values, color=colour, label=name)
        axes.plot(epochs, curves["ema_fg_dice"], **_DASHED, label="mean (moving average)")
        _set_y_axis(axes, "score", bottom=0, top=1)


def _set_y_axis(axes: Axes, name: str, bottom: float | None = None, top: float | None = None) -> None:
    axes.set_ylabel(name)
    axes.set_ylim(bottom, top)
