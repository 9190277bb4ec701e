"""``nnUNetv2_vf push``: upload pretrained weights, their model card and pictures to the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import network_name
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_checked_artifact
from nnunetv2_vf.transfer.hub import METADATA, PAGE, PICTURES, WEIGHTS, HubName, hub_errors, require_hub_packages
from nnunetv2_vf.transfer.model_card import AUTHORS_ENTRIES, CARD_NAME, LICENCE, TO_BE_FILLED_IN
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.safetensors_files import write_safetensors

_PULL = re.compile(r"nnUNetv2_vf pull \S+")  # in the model card, with a placeholder or its first repository
# The identifiers of the Hub for the licences that weights usually have; it takes others as "other".
_LICENCES = (
    *("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0"),
    *("cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail"),
)


def push(file: Path, text: str, private: bool, pictures: bool = True) -> str:
    """Upload an artifact, its model card and the pictures beside it.

    Args:
        file: an artifact, with a completed ``MODEL_CARD.md`` beside it.
        text: ``USER/NAME[@BRANCH]``; the repository is created if it does not exist.
        private: the repository must not be public.
        pictures: False leaves them out; they show slices of images.

    Returns:
        the address of the uploaded commit.

    Raises:
        UserError: the file is no artifact, the model card is missing or incomplete, the repository is public although
            it should be private, or the Hub refuses the upload.
    """
    name = HubName.parse(text)
    if str(file).startswith("hf:"):
        raise UserError(f"push takes a file; download it first: nnUNetv2_vf pull {'/'.join(file.parts[1:])} -o FOLDER")
    require_hub_packages()
    from huggingface_hub import HfApi

    artifact = read_checked_artifact(file)
    card = _read_completed_card(file.with_name(CARD_NAME))
    with tempfile.TemporaryDirectory() as temporary, hub_errors(name):
        folder = Path(temporary)
        with malformed_file_errors(file):
            write_safetensors(folder / WEIGHTS, artifact)
            (folder / METADATA).write_text(json.dumps(artifact["vf"], indent=2) + "\n", encoding="utf-8")
            shown = [each for each in PICTURES if pictures and file.with_name(each).is_file()]
            (folder / PAGE).write_text(_make_page(card, artifact["vf"], name, shown), encoding="utf-8")
        for picture in shown:
            shutil.copyfile(file.with_name(picture), folder / picture)
        api = HfApi(library_name="nnunetv2_vf", library_version=__version__)
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(name.repository).private:
            raise UserError(f"{name.repository} exists and is public; choose another name, or leave --private out")
        print(f"uploading to {name}: {', '.join(sorted(each.name for each in folder.iterdir()))}")
        if name.revision is not None:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name.repository,
            folder_path=folder,
            revision=name.revision,
            commit_message=f"Upload {network_name(artifact['vf']['architecture'])} with nnunetv2-vf {__version__}",
            delete_patterns=[*PICTURES],  # of an earlier upload
        )
    return str(commit.commit_url)


def _read_completed_card(file: Path) -> str:
    if not file.is_file():
        lines = "; ".join(f"'{entry}: ...'" for entry in AUTHORS_ENTRIES)
        raise UserError(f"no file {file}; pretraining writes it beside {ARTIFACT_NAME}; or write it, with {lines}")
    card = file.read_text(encoding="utf-8", errors="replace")
    answers = {entry: _entry(card, entry) for entry in AUTHORS_ENTRIES}
    missing = [entry for entry, answer in answers.items() if not answer or TO_BE_FILLED_IN in answer]
    if missing:
        lines = "; ".join(f"'{entry}: ...'" for entry in missing)
        raise UserError(f"{file} is not complete; write an answer into each of these lines, then run again: {lines}")
    return card


def _entry(card: str, name: str) -> str:
    """Return what the author of a model card has written after the name of an entry; empty if nothing."""
    match = re.search(rf"^\W*{re.escape(name)}[*_]*:(.*)$", card, re.MULTILINE)
    return match[1].strip(" \t*_") if match else ""


def _make_page(card: str, metadata: dict[str, Any], name: HubName, pictures: Sequence[str]) -> str:
    """Return the model card with the entries by which the Hub finds and describes it (YAML front matter).

    Args:
        pictures: the files that are uploaded; the page shows no others.
    """
    from huggingface_hub import ModelCardData

    pretext_tags = {"fusion": ["volume-fusion"], "masked": ["masked-image-modeling"]}
    pretext = metadata["settings"].get("pretext", "fusion").split("+") if "settings" in metadata else []
    started_from = metadata.get("pretrained") or {}
    origin = (metadata.get("hub") or started_from.get("hub") or "").partition("@")[0]  # of weights that were pulled
    data = ModelCardData(
        **_describe_licence(_entry(card, LICENCE)),
        library_name="nnunetv2-vf",
        pipeline_tag="image-segmentation",
        tags=[
            *("nnunet", "medical-imaging", "3d-segmentation"),
            *(["self-supervised-learning"] if pretext else []),
            *(tag for part in pretext for tag in pretext_tags[part]),
            *(str(channel).lower() for channel in (metadata.get("channel_names") or {}).values()),
        ],
        base_model=origin if origin not in ("", name.repository) else None,
        metrics=["dice"] if metadata.get("pretext_dice_per_class") else None,
    )
    page = _PULL.sub(f"nnUNetv2_vf pull {name}", card)
    for missing in set(PICTURES) - set(pictures):
        page = re.sub(rf"!\[[^\]]*\]\({re.escape(missing)}\)\n?", "", page)
    return f"---\n{data.to_yaml()}\n---\n\n{page}"


def _describe_licence(licence: str) -> dict[str, Any]:
    """Return the Hub's entries for a licence."""
    identifier = licence.rstrip(".").lower().replace(" ", "-")
    if identifier in _LICENCES:
        return {"license": identifier}
    return {"license": "other", "license_name": licence}
