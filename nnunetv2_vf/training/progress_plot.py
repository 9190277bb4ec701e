"""nnU-Net's local logger with the pretext task's own progress.png: one Dice curve per fusion class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

# Once per epoch: samples of the global batch in a second of training; part of that time spent on waiting for data;
# the largest amount of a GPU's memory in use, GB (NaN without one); since the start of the training, steps left out
# because their gradient was not finite, and cases that cannot be used.
WATCHED = ("samples_per_second", "data_wait_share", "gpu_memory_gb", "skipped_steps", "quarantined_cases")


class SparingLogger(LocalLogger):
    """nnU-Net's, but a disk with no room for its picture does not end the training."""

    def plot_progress_png(self, output_folder: str) -> None:
        try:
            self.draw(Path(output_folder) / "progress.png")
        except OSError as error:
            print(f"WARNING: progress.png was not written ({error})")

    def draw(self, file: Path) -> None:
        """Draw what is logged to ``progress.png``."""
        super().plot_progress_png(str(file.parent))


class PretextLogger(SparingLogger):
    """Logs what nnU-Net logs; ``dice_per_class_or_region`` holds all K + 1 fusion classes, class 0 included.

    Beside that, of every epoch: :data:`WATCHED`.

    Args:
        class_colours: the name of each fusion class, in their order, and its colour.
    """

    def __init__(self, class_colours: Mapping[str, Any]):
        super().__init__()
        self.my_fantastic_logging |= {name: [] for name in WATCHED}
        self.class_colours = class_colours

    def draw(self, file: Path) -> None:
        """Draw losses, pseudo Dice per fusion class, learning rate and what is watched."""
        logged = self.my_fantastic_logging
        epochs = np.arange(min(len(values) for values in logged.values()))
        curves = {name: np.asarray(values[: len(epochs)]) for name, values in logged.items()}

        figure = Figure(figsize=(14, 25), layout="constrained")
        losses, dice, seconds, speed, memory, bad, rate = figure.subplots(7, sharex=True)
        losses.plot(epochs, curves["train_losses"], label="training")
        losses.plot(epochs, curves["val_losses"], label="validation (fixed samples)")
        losses.set_ylabel("loss")
        class_dice = curves["dice_per_class_or_region"].T
        for (name, colour), values in zip(self.class_colours.items(), class_dice, strict=True):
            dice.plot(epochs, values, color=colour, label=name)
        dice.plot(epochs, curves["ema_fg_dice"], "k--", label="mean (moving average)")
        dice.set_ylabel("pseudo Dice")
        dice.set_ylim(0, 1)
        seconds.plot(epochs, curves["epoch_end_timestamps"] - curves["epoch_start_timestamps"])
        seconds.set_ylabel("seconds per epoch")
        seconds.set_ylim(bottom=0)
        speed.plot(epochs, curves["samples_per_second"], label="samples per second")
        speed.set_ylabel("samples per second")
        speed.set_ylim(bottom=0)
        waiting = speed.twinx()
        waiting.plot(epochs, 100 * curves["data_wait_share"], "k--", label="waiting for data, %")
        waiting.set_ylabel("% of the time")
        waiting.set_ylim(0, 100)
        memory.plot(epochs, curves["gpu_memory_gb"])
        memory.set_ylabel("GPU memory, GB")
        bad.plot(epochs, curves["skipped_steps"], label="steps left out (not finite)")
        bad.plot(epochs, curves["quarantined_cases"], label="cases in quarantine")
        bad.set_ylabel("so far")
        bad.set_ylim(bottom=0)
        rate.plot(epochs, curves["lrs"])
        rate.set_ylabel("learning rate")
        rate.set_xlabel("epoch")
        rate.xaxis.get_major_locator().set_params(integer=True)
        for axes in (losses, dice, bad):
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        waiting.legend(loc="upper left", bbox_to_anchor=(1.05, 1))
        for axes in (losses, dice, seconds, speed, memory, bad, rate):
            axes.grid(alpha=0.3)
        figure.savefig(file, dpi=100)
