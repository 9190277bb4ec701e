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
from typing import Any

from filelock import FileLock

from nnunetv2_vf import __version__
from nnunetv2_vf.errors import UserError
from nnunetv2_vf.transfer.artifact import ARTIFACT_NAME, read_checked_artifact, write_artifact
from nnunetv2_vf.transfer.model_card import CARD_NAME
from nnunetv2_vf.transfer.nnssl_plan import NNSSL_PLAN_KEY
from nnunetv2_vf.transfer.safe_loading import malformed_file_errors
from nnunetv2_vf.transfer.safetensors_files import SAFETENSORS_ENDING

WEIGHTS, METADATA, PAGE = "model.safetensors", "vf.json", "README.md"
PICTURES = ("preview.png", "progress.png", "pretext_report.png")
_SCHEME = "hf://"
_ENDINGS = (".pth", ".pt", ".model", SAFETENSORS_ENDING)  # of files of weights
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n+", re.DOTALL)


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
    text, path = str(file), Path(file)
    if text.startswith(_SCHEME):
        return _fetch(HubName.parse(text))
    if not path.exists() and path.suffix not in _ENDINGS and _NAME.fullmatch(text):
        raise UserError(f"no file {text}; weights on the Hugging Face Hub are named {_SCHEME}{text}")
    return path


def _fetch(name: HubName) -> Path:
    """Return the artifact of a repository from the cache. It is made from the downloaded files once for each commit."""
    require_hub_packages()
    from huggingface_hub import cached_assets_path

    snapshot = _download(name, [WEIGHTS])
    with hub_errors(name):
        folder = cached_assets_path("nnunetv2_vf", name.repository, snapshot.name)
        with FileLock(folder / ".lock"):  # folds that start at the same time
            if not (folder / ARTIFACT_NAME).is_file():
                _write_checked_artifact(snapshot, name, folder)
    return folder / ARTIFACT_NAME


# ---------------------------------------------------------------- pull


def pull(text: str, folder: Path) -> list[Path]:
    """Download a repository; write ``vf_pretrained.pth``, ``MODEL_CARD.md`` and pictures.

    Args:
        text: ``USER/NAME[@REVISION]``.
        folder: created if it does not exist.

    Returns:
        the files written, the weights first.

    Raises:
        UserError: the Hub or the repository cannot be reached, the files are damaged, unsafe or of another kind, or the
            folder has such files already.
    """
    name = HubName.parse(text)
    require_hub_packages()
    present = [each for each in (ARTIFACT_NAME, CARD_NAME) if (folder / each).exists()]
    if present:
        raise UserError(f"{folder} has a {present[0]} already; name another folder: -o FOLDER")
    snapshot = _download(name, [WEIGHTS, METADATA, PAGE, *PICTURES])
    with hub_errors(name):
        folder.mkdir(parents=True, exist_ok=True)
        written = [_write_checked_artifact(snapshot, name, folder)]
        if (snapshot / PAGE).is_file():
            card = (snapshot / PAGE).read_text(encoding="utf-8", errors="replace")
            written.append(folder / CARD_NAME)
            written[-1].write_text(_FRONT_MATTER.sub("", card), encoding="utf-8")
        pictures = [snapshot / picture for picture in PICTURES if (snapshot / picture).is_file()]
        return [*written, *(Path(shutil.copyfile(picture, folder / picture.name)) for picture in pictures)]


def _write_checked_artifact(snapshot: Path, name: HubName, folder: Path) -> Path:
    """Check the downloaded weights and write them as an artifact."""
    weights = snapshot / WEIGHTS
    _require_checksum(weights, name)
    artifact = read_checked_artifact(weights)
    with malformed_file_errors(weights):
        tensors, plan = artifact["network_weights"], artifact.get(NNSSL_PLAN_KEY)
        origin = {"hub": f"{name.repository}@{snapshot.name}"}
        write_artifact(folder / ARTIFACT_NAME, tensors, {**artifact["vf"], **origin}, plan)
    return folder / ARTIFACT_NAME


def _download(name: HubName, files: list[str]) -> Path:
    """Return the folder with a repository's files in the cache; its name is the commit."""
    from huggingface_hub import constants, snapshot_download

    with hub_errors(name):
        is_current = constants.HF_HUB_OFFLINE or _COMMIT.fullmatch(name.revision or "") or _is_available(name)
        folder = snapshot_download(
            name.repository,
            revision=name.revision,
            allow_patterns=files,
            library_name="nnunetv2_vf",
            library_version=__version__,
        )
    snapshot = Path(str(folder))
    if not is_current:
        print(f"{constants.ENDPOINT} does not answer; commit {snapshot.name[:7]} of {name} from the cache is used")
    if not (snapshot / WEIGHTS).is_file():
        raise UserError(
            f"{name} has no {WEIGHTS}: its upload broke off, or nnUNetv2_vf push did not make it; a checkpoint of "
            f"nnssl or MIS-FM can be converted: hf download {name.repository} FILE --local-dir .; nnUNetv2_vf convert "
            f"FILE -o {ARTIFACT_NAME}"
        )
    return snapshot


def _is_available(name: HubName) -> bool:
    """True if the Hub shows the repository; False if only the cache is left, which huggingface_hub uses silently."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi().repo_info(name.repository, revision=name.revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.HTTPError, ConnectionError):
        return False
    return True


def _require_checksum(file: Path, name: HubName) -> None:
    """Remove the file and raise UserError if it is not what the Hub announced."""
    content = file.resolve()
    announced, actual = _announced_sha256(content, file.parent.name, name), _sha256(content)
    if actual != announced:
        content.unlink()
        file.unlink(missing_ok=True)
        raise UserError(
            f"{WEIGHTS} of {name} is damaged: its SHA-256 is {actual[:12]}..., the Hub announced {announced[:12]}...; "
            "it was removed from the cache: run the same command again"
        )


def _announced_sha256(content: Path, commit: str, name: HubName) -> str:
    """Return the SHA-256 of the weights by which the Hub stores them.

    In the cache a file is a link to its content, whose name is this SHA-256; where there are no links, ask the Hub.
    """
    if _SHA256.fullmatch(content.name):
        return content.name
    from huggingface_hub import HfApi

    with hub_errors(name):
        (info,) = HfApi().get_paths_info(name.repository, [WEIGHTS], revision=commit)
    large_file: Any = getattr(info, "lfs", None)
    if large_file is None:
        raise UserError(
            f"the Hub names no SHA-256 for {WEIGHTS} of {name}; push it again: nnUNetv2_vf push FILE {name}"
        )
    return str(large_file.sha256)


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
    """Turn errors of the Hub, of the network and of the disk into one line."""
    from huggingface_hub import constants, errors, get_token

    hub, login = constants.ENDPOINT, "log in (hf auth login, or set HF_TOKEN)"
    try:
        yield
    except UserError:
        raise
    except errors.HFValidationError as error:
        raise UserError(f"{name} is no legal name on the Hub: {error}") from error
    except errors.GatedRepoError as error:
        raise UserError(f"{name} is gated: ask for access on {hub}/{name.repository}, {login}") from error
    except errors.RepositoryNotFoundError as error:
        hint = "use a token that can read it" if get_token() else login
        raise UserError(f"{hub} has no {name}: check the spelling; if it is private, {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name.repository} has no branch, tag or commit {name.revision!r}") from error
    except errors.HfHubHTTPError as error:
        _raise_for_missing_xet(error, hub)
        if error.response.status_code == 401:
            raise UserError(f"{hub} does not know who you are: {login}") from error
        hint = f"; {login}" if error.response.status_code == 403 else "; try again later"
        raise UserError(f"{hub} refused the transfer of {name}: {error}{hint}") from error
    except (errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        _raise_for_missing_xet(error, hub)
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"the cache does not hold {name}, and HF_HUB_OFFLINE is set; unset it") from error
        raise UserError(
            f"{name} could not be transferred, because {hub} cannot be reached or the transfer broke off "
            f"({error.__cause__ or error}); check the network and HF_ENDPOINT, then run the same command again"
        ) from error
    except OSError as error:  # a full disk, a folder without rights
        raise UserError(f"{name} was not transferred completely: {error}") from error
    except (RuntimeError, ValueError) as error:  # of the transfer service Xet, and of the Hub's check of README.md
        _raise_for_missing_xet(error, hub)
        raise UserError(f"the transfer of {name} failed: {error}") from error


def _raise_for_missing_xet(error: Exception, hub: str) -> None:
    """Raise UserError if a Hub of one's own lacks the transfer service Xet, which huggingface_hub uses by default."""
    if "xet-write-token" in str(error) or "xet-read-token" in str(error):
        hint = "switch it off: export HF_HUB_DISABLE_XET=1"
        raise UserError(f"{hub} does not offer the transfer service Xet; {hint}") from error
