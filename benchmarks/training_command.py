"""nnU-Net's training command, as the few-labels experiment runs it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2_vf.nnunet_commands import Workspace


@dataclasses.dataclass(frozen=True)
class TrainingCommand:
    """nnUNetv2_train for one dataset, in one workspace and on one device."""

    workspace: Workspace
    dataset: str
    device: str

    def run(
        self, plans: str, trainer: str, fold: int | str, results: Path, *flags: object, **environment: object
    ) -> None:
        """Train a fold of 3d_fullres; ``environment`` holds variables in addition to those of the workspace."""
        common = ("-p", plans, "-tr", trainer, "-device", self.device)
        configuration = (self.dataset, "3d_fullres", fold)
        self.workspace.run("nnUNetv2_train", *configuration, *common, *flags, nnUNet_results=results, **environment)


def variables(prefix: str, settings: Mapping[str, Any], workers: int = 0) -> dict[str, Any]:
    """Return the environment variables of a training.

    Without workers a fine-tuning draws its samples itself: the same samples in the same order on any machine.
    torch.compile is off: such a short training would not win back the time for compiling.
    """
    return {
        "nnUNet_n_proc_DA": workers,
        "nnUNet_compile": "f",
        **{f"{prefix}{name}": value for name, value in settings.items()},
    }


def has_checkpoint(fold: Path) -> bool:
    """True if ``--c`` can continue the training of this folder."""
    return any((fold / f"checkpoint_{name}.pth").is_file() for name in ("final", "latest", "best"))
