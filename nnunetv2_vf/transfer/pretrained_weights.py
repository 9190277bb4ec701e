"""The weights that a training command names with ``-pretrained_weights``: find, check and load them.

nnU-Net does not tell its trainers about this option, so it is read from the command line.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunetv2_vf.errors import UserError
from nnunetv2_vf.network_parts import HEADS
from nnunetv2_vf.transfer.artifact import read_pretrained
from nnunetv2_vf.transfer.differences import describe_differences
from nnunetv2_vf.transfer.metadata import read_pretext
from nnunetv2_vf.transfer.network_fit import require_fit
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING
from nnunetv2_vf.transfer.suggested_commands import convert_command
from nnunetv2_vf.transfer.target_plans import TargetPlans

_TRAINING_COMMANDS = ("nnUNetv2_train", "run_training", "distributed")  # the last is nnunetv2_vf.distributed
_OPTION = "-pretrained_weights"


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights that fit the network of the training.

    Attributes:
        file: what ``-pretrained_weights`` names.
        record: plain data for the log and for checkpoints: name and digest of the file, pretext, dataset, number of
            cases, what ``adapt`` did, and the differences between pretraining and this training.
    """

    file: Path
    record: dict[str, Any]

    @classmethod
    def from_command_line(
        cls, command: Sequence[str], target: TargetPlans, is_continued: bool = False
    ) -> PretrainedWeights | None:
        """Read and check the file that a training command names; None if it names none.

        Args:
            is_continued: the training has a checkpoint and needs the file no more; None if the file is gone.

        Raises:
            UserError: the file cannot be read, or its weights do not fit the target's network.
        """
        file = pretrained_weights_argument(command)
        if file is None or (is_continued and not file.exists()):
            return None
        _require_pth(file)
        pretrained = read_pretrained(file)
        metadata = pretrained["vf"]
        with malformed_file_errors(file):
            require_fit(file, pretrained, target)
            differences = describe_differences(metadata, target)
            pretext = read_pretext(metadata)
        record = {
            "file": file.name,  # without its folder, since checkpoints are shared with others
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "hub": metadata.get("hub"),
            "pretext": pretext,
            "dataset": metadata.get("dataset"),
            "num_cases": metadata.get("num_cases"),
            "adapted": metadata.get("adapted"),
            "compared": differences,
        }
        return cls(file, record)

    def copy_into(self, network: nn.Module) -> None:
        """Copy all weights except the heads into the network, as stock ``-pretrained_weights`` does."""
        weights = read_pretrained(self.file)["network_weights"]
        for name, tensor in network.state_dict().items():
            if HEADS not in name:
                tensor.copy_(weights[name.removeprefix("_orig_mod.")])  # torch.compile adds this prefix


def describe_origin(record: Mapping[str, Any]) -> str:
    """Return what a :attr:`PretrainedWeights.record` says of the weights: their file, pretext and dataset."""
    # Checkpoints of earlier versions have neither of these two entries.
    pretext = f"pretext {record['pretext']}, " if record.get("pretext") else ""
    return f"{record.get('hub') or record['file']}, {pretext}trained on {record['dataset'] or 'an unknown dataset'}"


def are_same_weights(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> bool:
    """True if two :attr:`PretrainedWeights.record` are of the same file; None stands for new weights."""
    if first is None or second is None:
        return first is second
    digests = {record.get("sha256") for record in (first, second)}
    if None in digests:  # a checkpoint of an earlier version, which has no pretext either
        names = [(record.get("hub") or record["file"], record["dataset"]) for record in (first, second)]
        return names[0] == names[1]
    return len(digests) == 1


def describe_starts(first: Mapping[str, Any] | None, second: Mapping[str, Any] | None) -> tuple[str, str]:
    """Return what two trainings with different :attr:`PretrainedWeights.record` started from, for a message."""
    starts = ["from scratch" if record is None else f"from {describe_origin(record)}" for record in (first, second)]
    return starts[0], starts[1] if starts[1] != starts[0] else f"{starts[1]} with other content"


def require_same_origin(recorded: Mapping[str, Any] | None, given: PretrainedWeights | None, file: Path) -> None:
    """Raise UserError if a training that started from other weights is continued with ``-pretrained_weights``.

    Args:
        recorded: the :attr:`PretrainedWeights.record` in the checkpoint.
        given: the weights that the command names.
        file: the checkpoint.
    """
    if given is not None and not are_same_weights(recorded, given.record):
        before, now = describe_starts(recorded, given.record)
        raise UserError(
            f"{file} was trained {before}, not {now}: leave out {_OPTION} to continue it, or write to another folder "
            "(export nnUNet_results=FOLDER)"
        )


def _require_pth(file: Path) -> None:
    """Raise UserError for weights that our commands read but nnU-Net does not."""
    if file.parts[:1] == ("hf:",):
        name = "/".join(file.parts[1:])
        raise UserError(f"nnU-Net reads no weights from the Hub; download them: nnUNetv2_vf pull {name} -o FOLDER")
    if file.suffix == SAFETENSORS_ENDING:
        raise UserError(f"nnU-Net does not read {file}; make a file that it reads: {convert_command(file)}")


def pretrained_weights_argument(command: Sequence[str]) -> Path | None:
    """Return the file that a training command names with ``-pretrained_weights``; None for other commands."""
    if Path(command[0]).stem not in _TRAINING_COMMANDS:
        return None
    file = None
    for word, next_word in itertools.zip_longest(command[1:], command[2:]):
        if word == _OPTION and next_word is not None:
            file = Path(next_word)
        if word.startswith(f"{_OPTION}="):
            file = Path(word.removeprefix(f"{_OPTION}="))
    return file  # of several, nnU-Net too takes the last
