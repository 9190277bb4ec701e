"""The dataset's ``dataset.json``: write it, and read what a later import needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.importing.case_files import CaseFiles
from nnunetv2_vf.importing.settings import ImportSettings

DESCRIPTION = "dataset.json"


@dataclass(frozen=True)
class Description:
    """The part of ``dataset.json`` that a later import needs.

    Attributes:
        cases: names of the cases.
        num_channels: number of channels of each case.
        file_ending: ending of the dataset's files.
        channel: the value of ``--channel`` in the last import.
    """

    cases: frozenset[str]
    num_channels: int
    file_ending: str
    channel: str


def read_description(dataset_folder: Path) -> Description | None:
    """Read a dataset's ``dataset.json``; return None if there is none.

    Raises:
        UserError: the file is damaged or was not written by an import.
    """
    path = dataset_folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        return Description(
            cases=frozenset(content["dataset"]),
            num_channels=len(content["channel_names"]),
            file_ending=content["file_ending"],
            channel=content["last_import"]["channel"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or was not written by import ({type(error).__name__}: {error}); remove it and run the "
            "same command again to rewrite it"
        ) from error


def make_description(
    hashes: Mapping[str, str],
    channel_names: Sequence[str],
    case_files: CaseFiles,
    settings: ImportSettings,
    channel: str,
) -> str:
    """Return the content of ``dataset.json``. It changes if the voxels of a case do.

    Args:
        hashes: of the content of each case.
        channel: the value of ``--channel``.
    """
    content_digest = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
    marked = "the body, found with a threshold" if settings.mask else "the whole volume"
    content = {
        "channel_names": {str(number): name for number, name in enumerate(channel_names)},
        "labels": {"background": 0, "body": 1},
        "numTraining": len(hashes),
        "file_ending": case_files.file_ending,
        "description": f"Unlabelled volumes. Label 1 is not an annotation. It marks {marked}.",
        "last_import": {
            "nnunetv2_vf": __version__,
            "channel": channel,
            **asdict(settings),
            "content_digest": content_digest,
        },
        # Without a list of its cases nnU-Net compares the name of every case with every file: a quarter of an hour
        # for 110,000 cases.
        "dataset": {
            case: {
                "images": [f"imagesTr/{name}" for name in case_files.image_names(case)],
                "label": f"labelsTr/{case_files.label_name(case)}",
            }
            for case in hashes
        },
    }
    return json.dumps(content, indent=1)
