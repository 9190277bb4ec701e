"""``nnUNetv2_vf push``: upload pretrained weights, their model card and pictures to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import network_name, require_known_architecture
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact
from nnunetv2_vf.transfer.hub import METADATA, PAGE, PICTURES, WEIGHTS, HubName, hub_errors, require_hub_packages
from nnunetv2_vf.transfer.metadata import describe_pretext
from nnunetv2_vf.transfer.model_card import CARD_NAME, TO_BE_FILLED_IN
from nnunetv2_vf.transfer.safetensors_files import write_safetensors

_LICENCE = re.compile(r"Licence of the weights: *(.+)")
_PULL_COMMAND = re.compile(r"nnUNetv2_vf pull \S+")


def push(file: Path, text: str, private: bool) -> str:
    """Upload an artifact, its model card and the pictures beside it.

    Args:
        file: an artifact, with a completed ``MODEL_CARD.md`` beside it.
        text: ``USER/NAME[@BRANCH]``; the repository is created if it does not exist.
        private: visibility of a new repository.

    Returns:
        the address of the uploaded commit.

    Raises:
        UserError: the file is no artifact, the model card is missing or incomplete, or the Hub refuses the upload.
    """
    name = HubName.parse(text)
    require_hub_packages()
    from huggingface_hub import HfApi

    artifact = read_artifact(file)
    metadata = artifact["vf"]
    require_known_architecture(metadata["architecture"], file)
    card = _read_completed_card(file.with_name(CARD_NAME))
    with tempfile.TemporaryDirectory() as temporary, hub_errors(name):
        folder = Path(temporary)
        write_safetensors(folder / WEIGHTS, artifact)
        (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        (folder / PAGE).write_text(_make_page(card, metadata, name), encoding="utf-8")
        for picture in sorted(file.parent.glob(PICTURES)):
            shutil.copyfile(picture, folder / picture.name)
        api = HfApi(library_name="nnunetv2_vf", library_version=__version__)
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name.repository,
            folder_path=folder,
            revision=name.revision,
            commit_message=f"Upload {network_name(metadata['architecture'])} with nnunetv2-vf {__version__}",
        )
    return str(commit.commit_url)


def _read_completed_card(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"no file {file}; pretraining writes it beside {ARTIFACT_NAME}; for other weights write it")
    card = file.read_text(encoding="utf-8")
    for line in card.splitlines():
        if TO_BE_FILLED_IN in line:
            raise UserError(f"{file} is not complete: {line.strip('- ')!r}; fill it in and run the same command again")
    return card


def _make_page(card: str, metadata: dict[str, Any], name: HubName) -> str:
    """Return the model card with the entries by which the Hub finds and describes it (YAML front matter)."""
    from huggingface_hub import ModelCardData

    licence = _LICENCE.search(card)
    data = ModelCardData(
        **_describe_licence(licence[1].strip() if licence else ""),
        library_name="nnunetv2-vf",
        pipeline_tag="image-segmentation",
        tags=[
            *("nnunet", "medical-imaging", "3d-segmentation", "self-supervised-learning"),
            *({"volume-fusion"} if "Volume Fusion" in describe_pretext(metadata) else {"masked-image-modeling"}),
            *(channel.lower() for channel in metadata.get("channel_names", {}).values()),
        ],
        metrics=["dice"] if metadata.get("pretext_dice_per_class") else None,
    )
    page = _PULL_COMMAND.sub(f"nnUNetv2_vf pull {name.repository}", card)
    return f"---\n{data.to_yaml()}\n---\n\n{page}"


def _describe_licence(licence: str) -> dict[str, Any]:
    """Return the Hub's entries for a licence: its identifiers are words such as apache-2.0 and cc-by-4.0."""
    identifier = licence.rstrip(".").lower().replace(" ", "-")
    if re.fullmatch(r"(apache|mit|cc|bsd|gpl|lgpl|agpl|mpl)[\w.-]*", identifier):
        return {"license": identifier}
    return {"license": "other", "license_name": licence}
