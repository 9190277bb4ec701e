"""Weights from the Hugging Face Hub: ``nnUNetv2_vf pull``, and files named ``hf://USER/NAME[@REVISION]``.

A repository holds ``model.safetensors`` (weights and metadata, no pickle), ``vf.json`` (the metadata again, to be read
by people and other tools), ``README.md`` (the model card) and pictures. huggingface_hub transfers and caches the files,
and reads its own variables: ``HF_TOKEN``, ``HF_HOME``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.architectures import require_known_architecture
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_artifact, write_artifact
from nnunetv2_vf.transfer.model_card import CARD_NAME
from nnunetv2_vf.transfer.nnssl_plan import NNSSL_PLAN_KEY

WEIGHTS, METADATA, PAGE, PICTURES = "model.safetensors", "vf.json", "README.md", "*.png"
_SCHEME = "hf://"
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubName:
    """A repository on the Hub, and a branch, tag or commit; None: the main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Parse ``USER/NAME[@REVISION]``, with or without ``hf://``.

        Raises:
            UserError: the text is no such name.
        """
        match = _NAME.fullmatch(text.removeprefix(_SCHEME))
        if match is None:
            raise UserError(f"{text!r} names no repository on the Hugging Face Hub; legal: USER/NAME or USER/NAME@TAG")
        return cls(match["repository"], match["revision"])

    def __str__(self) -> str:
        return self.repository if self.revision is None else f"{self.repository}@{self.revision}"


def local_file(file: str | Path) -> Path:
    """Return the path of a file of weights; a file on the Hub, ``hf://USER/NAME``, is fetched into the cache first.

    Raises:
        UserError: as :func:`pull`.
    """
    return _fetch(HubName.parse(str(file))) if str(file).startswith(_SCHEME) else Path(file)


def _fetch(name: HubName) -> Path:
    """Return the artifact of a repository, made once for each of its commits in the cache of huggingface_hub."""
    require_hub_packages()
    from huggingface_hub import cached_assets_path

    snapshot = _download(name)
    folder = cached_assets_path("nnunetv2_vf", name.repository, snapshot.name)
    if not (folder / ARTIFACT_NAME).is_file():
        _write_pulled_artifact(snapshot, name, folder)
    return folder / ARTIFACT_NAME


# ---------------------------------------------------------------- pull


def pull(text: str, folder: Path) -> list[Path]:
    """Download a repository; write ``vf_pretrained.pth``, ``MODEL_CARD.md`` and pictures.

    Args:
        text: ``USER/NAME[@REVISION]``.
        folder: created if it does not exist. Files of the same names are replaced.

    Returns:
        the files written.

    Raises:
        UserError: the Hub or the repository cannot be reached, or the files are damaged, unsafe or of another kind.
    """
    name = HubName.parse(text)
    require_hub_packages()
    from huggingface_hub import ModelCard

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder: -o FOLDER")
    snapshot = _download(name)
    written = [_write_pulled_artifact(snapshot, name, folder)]
    if (snapshot / PAGE).is_file():
        card = ModelCard((snapshot / PAGE).read_text(encoding="utf-8"), ignore_metadata_errors=True)
        written.append(folder / CARD_NAME)
        written[-1].write_text(card.text.lstrip(), encoding="utf-8")
    return [*written, *(Path(shutil.copyfile(file, folder / file.name)) for file in sorted(snapshot.glob(PICTURES)))]


def _write_pulled_artifact(snapshot: Path, name: HubName, folder: Path) -> Path:
    """Check the downloaded weights and write them as an artifact."""
    weights = snapshot / WEIGHTS
    _require_checksum(weights, name)
    artifact = read_artifact(weights)
    require_known_architecture(artifact["vf"]["architecture"], weights)
    folder.mkdir(parents=True, exist_ok=True)
    write_artifact(folder / ARTIFACT_NAME, artifact["network_weights"], artifact["vf"], artifact.get(NNSSL_PLAN_KEY))
    return folder / ARTIFACT_NAME


def _download(name: HubName) -> Path:
    """Return the folder with a repository's files in the cache; its name is the commit."""
    from huggingface_hub import snapshot_download

    with hub_errors(name):
        patterns = [WEIGHTS, METADATA, PAGE, PICTURES]
        snapshot = Path(
            snapshot_download(
                name.repository,
                revision=name.revision,
                allow_patterns=patterns,
                library_name="nnunetv2_vf",
                library_version=__version__,
            )
        )
    if not (snapshot / WEIGHTS).is_file():
        raise UserError(
            f"{name} has no {WEIGHTS}, so it was not made by nnUNetv2_vf push; a checkpoint of nnssl or MIS-FM can be "
            f"converted: hf download {name.repository} FILE --local-dir .; nnUNetv2_vf convert FILE -o {ARTIFACT_NAME}"
        )
    return snapshot


def _require_checksum(file: Path, name: HubName) -> None:
    """Remove the file and raise UserError if it is not what the Hub announced.

    In the cache a file is a link to its content, which is named by the SHA-256 that the Hub announced.
    """
    announced = file.resolve()
    if not _SHA256.fullmatch(announced.name):  # no links on this file system, or not stored as a large file
        return
    actual = _sha256(announced)
    if actual != announced.name:
        announced.unlink()
        file.unlink()
        raise UserError(
            f"{WEIGHTS} of {name} is damaged: its SHA-256 is {actual[:12]}..., the Hub announced "
            f"{announced.name[:12]}...; it was removed from the cache: run the same command again"
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------- errors


def require_hub_packages() -> None:
    for package in ("huggingface_hub", "safetensors"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"{error}; install what the Hub needs: pip install 'nnunetv2-vf[hub]'") from error


@contextmanager
def hub_errors(name: HubName) -> Iterator[None]:
    """Turn errors of the Hub and of the network into one line."""
    from huggingface_hub import constants, errors

    login = "log in (hf auth login, or set HF_TOKEN)"
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{name} is no legal name on the Hub: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated: ask for access on {constants.ENDPOINT}/{name.repository}, {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{constants.ENDPOINT} shows no {name}: it does not exist, or it is private: {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name.repository} has no branch, tag or commit {name.revision!r}") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"{constants.ENDPOINT} refused the transfer of {name}; {login}: {error}") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{name} could not be transferred, because {constants.ENDPOINT} cannot be reached or the transfer broke "
            f"off ({error.__cause__ or error}); run the same command again"
        ) from error
