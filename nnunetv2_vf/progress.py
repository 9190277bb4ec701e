"""nnU-Net's local logger with the pretext task's own progress.png: one Dice curve per fusion class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from nnunetv2.training.logging.nnunet_logger import LocalLogger

from nnunetv2_vf.preview import class_colours


class PretextLogger(LocalLogger):
    """Logs what nnU-Net logs; ``dice_per_class_or_region`` holds all K + 1 fusion classes, class 0 included.

    Args:
        class_names: one per fusion class.
    """

    def __init__(self, class_names: list[str]):
        super().__init__()
        self.class_names = class_names

    def plot_progress_png(self, output_folder: str) -> None:
        """Draw losses, pseudo Dice per fusion class, epoch duration and learning rate to ``progress.png``."""
        logged = self.my_fantastic_logging
        epochs = np.arange(min(len(values) for values in logged.values()))
        curves = {name: np.asarray(values[: len(epochs)]) for name, values in logged.items()}

        figure = Figure(figsize=(14, 16), layout="constrained")
        losses, dice, seconds, rate = figure.subplots(4, sharex=True)
        losses.plot(epochs, curves["train_losses"], label="training")
        losses.plot(epochs, curves["val_losses"], label="validation (fixed samples)")
        losses.set_ylabel("loss")
        colours = class_colours(len(self.class_names) - 1)
        for label, (name, values) in enumerate(
            zip(self.class_names, curves["dice_per_class_or_region"].T, strict=True)
        ):
            dice.plot(epochs, values, color=colours(label), label=name)
        dice.plot(epochs, curves["ema_fg_dice"], "k--", label="mean (moving average)")
        dice.set_ylabel("pseudo Dice")
        dice.set_ylim(0, 1)
        seconds.plot(epochs, curves["epoch_end_timestamps"] - curves["epoch_start_timestamps"])
        seconds.set_ylabel("seconds per epoch")
        seconds.set_ylim(bottom=0)
        rate.plot(epochs, curves["lrs"])
        rate.set_ylabel("learning rate")
        rate.set_xlabel("epoch")
        rate.xaxis.get_major_locator().set_params(integer=True)
        for axes in (losses, dice):
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        for axes in (losses, dice, seconds, rate):
            axes.grid(alpha=0.3)
        figure.savefig(Path(output_folder) / "progress.png", dpi=100)
