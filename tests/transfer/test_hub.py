"""Weights on a Hub that runs on this machine: pushed, pulled, named as hf://USER/NAME, and what can go wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DATASET_ID
from local_hub import LocalHub, Repository, local_hub
from trainings import make_trainer

from nnunetv2_vf.cli import main
from nnunetv2_vf.transfer.artifact import read_artifact
from nnunetv2_vf.transfer.model_card import AUTHORS_ENTRIES, CARD_NAME, TO_BE_FILLED_IN
from nnunetv2_vf.transfer.nnssl_plan import NNSSL_PLAN_KEY
from nnunetv2_vf.transfer.safetensors_files import write_safetensors

NAME = "someone/lung-ct"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that huggingface_hub of this process talks to, with a token and an empty cache."""
    from huggingface_hub import constants

    with local_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # needs a further server
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
        monkeypatch.setenv("HF_TOKEN", server.TOKEN)
        yield server


@pytest.fixture
def file(artifacts, tmp_path) -> Path:
    """A copy of the U-Net's artifact, with pictures and a completed model card beside it."""
    folder = tmp_path / "trained"
    folder.mkdir()
    trained = artifacts["U-Net"].parent
    for each in (artifacts["U-Net"], trained / "checkpoint_final.pth", *trained.glob("*.png")):
        shutil.copyfile(each, folder / each.name)
    card = artifacts["U-Net"].with_name(CARD_NAME).read_text()
    (folder / CARD_NAME).write_text(card.replace(TO_BE_FILLED_IN, "CC BY 4.0"))
    return folder / "vf_pretrained.pth"


@pytest.fixture
def pushed(hub: LocalHub, file: Path) -> LocalHub:
    main(["push", str(file), NAME])
    return hub


def assert_equal_artifacts(file: Path, other: Path) -> None:
    one, two = read_artifact(file), read_artifact(other)
    assert one["vf"] == {name: value for name, value in two["vf"].items() if name != "hub"}
    assert one[NNSSL_PLAN_KEY] == two[NNSSL_PLAN_KEY]
    assert one["network_weights"].keys() == two["network_weights"].keys()
    for name, tensor in one["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][name], tensor, rtol=0, atol=0)


def error_of(command: list[str]) -> str:
    with pytest.raises(SystemExit) as error:
        main(command)
    message = str(error.value)
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- what works


def test_pulled_weights_equal_pushed_ones(pushed, file, tmp_path, capsys):
    capsys.readouterr()
    main(["pull", NAME, "-o", str(tmp_path / "pulled")])
    assert_equal_artifacts(file, tmp_path / "pulled" / file.name)
    commit = pushed.repositories[NAME].commit
    assert read_artifact(tmp_path / "pulled" / file.name)["vf"]["hub"] == f"{NAME}@{commit}"
    pictures = {each.name for each in file.parent.glob("*.png")}
    assert {each.name for each in (tmp_path / "pulled").iterdir()} == {file.name, CARD_NAME, *pictures}
    assert f"plan -d ID --like {tmp_path / 'pulled' / file.name}" in capsys.readouterr().out


def test_the_pushed_page_is_the_model_card_with_entries_for_the_hub(pushed, file):
    from huggingface_hub import ModelCard

    card = ModelCard(pushed.repositories[NAME].files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert card.data.library_name == "nnunetv2-vf"
    assert card.data.metrics == ["dice"]
    assert {"nnunet", "volume-fusion", "ct"} <= set(card.data.tags)
    assert f"nnUNetv2_vf pull {NAME} -o ." in card.text
    assert pushed.repositories[NAME].files.keys() >= {"model.safetensors", "vf.json"}


def test_weights_with_several_names_are_stored_once(pushed, file):
    weights = pushed.repositories[NAME].files["model.safetensors"]
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in read_artifact(file)["network_weights"].values()}
    assert sum(unique.values()) < len(weights) < sum(unique.values()) + 60_000  # the header holds the metadata


@pytest.mark.parametrize("suffix", ["", "@main"])
def test_a_name_on_the_hub_works_wherever_weights_are_named(
    pushed, copied_dataset, tmp_path, monkeypatch, capsys, suffix
):
    monkeypatch.delenv("nnUNet_n_proc_DA")  # a value for training
    weights = f"hf://{NAME}{suffix}"
    main(["info", weights])
    origin = f"{NAME}@{pushed.repositories[NAME].commit}"
    assert f", from {origin} on the Hugging Face Hub" in capsys.readouterr().out
    main(["plan", "-d", str(DATASET_ID), "--like", weights, "-overwrite_plans_name", "Like"])
    planned = capsys.readouterr().out
    assert json.loads((copied_dataset / "Like.json").read_text())["volume_fusion_like"]["hub"] == origin
    assert "-pretrained_weights" in planned
    assert "vf_pretrained.pth" in planned
    main(["adapt", weights, "-d", str(DATASET_ID), "-o", str(tmp_path / "adapted.pth")])
    capsys.readouterr()
    with contextlib.suppress(SystemExit):  # nothing is preprocessed for these plans
        main(["doctor", "-d", str(DATASET_ID), "-p", "Like", "-w", weights])
    assert "vf_pretrained.pth fits" in capsys.readouterr().out


def test_cached_weights_work_without_a_network(pushed, monkeypatch, capsys):
    from huggingface_hub import constants

    main(["info", f"hf://{NAME}"])
    online = capsys.readouterr().out
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens here
    main(["info", f"hf://{NAME}"])
    notice, offline = capsys.readouterr().out.split("\n", 1)
    assert offline == online
    commit = pushed.repositories[NAME].commit[:7]
    assert notice == f"http://127.0.0.1:9 does not answer; commit {commit} of {NAME} from the cache is used"


def test_cached_weights_of_a_commit_need_no_answer(pushed, monkeypatch, capsys):
    weights = f"hf://{NAME}@{pushed.repositories[NAME].commit}"
    main(["info", weights])
    online = capsys.readouterr().out
    pushed.shutdown()
    pushed.server_close()
    main(["info", weights])
    assert capsys.readouterr().out == online


def test_a_hub_that_is_out_of_order_does_not_stop_cached_weights(pushed, capsys):
    main(["info", f"hf://{NAME}"])
    pushed.is_out_of_order = True
    main(["info", f"hf://{NAME}"])
    assert "does not answer; commit" in capsys.readouterr().out


def test_the_log_of_a_fine_tuning_names_repository_and_commit(pushed, two_epochs, tmp_path, monkeypatch):
    main(["pull", NAME, "-o", str(tmp_path / "pulled")])
    weights = tmp_path / "pulled" / "vf_pretrained.pth"
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "-pretrained_weights", str(weights)])
    trainer = make_trainer("VFFinetuneTrainer")
    trainer.initialize()
    trainer.on_train_start()
    (log,) = Path(trainer.output_folder).glob("training_log*.txt")
    assert (
        f"Pretrained weights: {NAME}@{pushed.repositories[NAME].commit}, pretext fusion, trained on" in log.read_text()
    )


def test_safetensors_are_read_like_artifacts_and_converted(pushed, file, tmp_path, capsys):
    downloaded = tmp_path / "model.safetensors"
    downloaded.write_bytes(pushed.repositories[NAME].files[downloaded.name])
    main(["info", str(downloaded)])
    assert f"plan -d ID --like {downloaded}" in capsys.readouterr().out
    main(["convert", str(downloaded), "-o", str(tmp_path / "converted.pth")])
    assert_equal_artifacts(file, tmp_path / "converted.pth")


def test_the_commands_use_hf_endpoint(pushed, tmp_path):
    """The variable by which mirrors and private Hubs are set; huggingface_hub reads it when it is imported."""
    cache = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": pushed.url}
    command = [sys.executable, "-m", "nnunetv2_vf", "pull", NAME, "-o", str(tmp_path / "pulled")]
    done = subprocess.run(command, env={**os.environ, **cache}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "pulled" / "vf_pretrained.pth").is_file()


# ---------------------------------------------------------------- what goes wrong


def test_a_damaged_download_is_refused_and_fetched_again(pushed, file, tmp_path):
    repository = pushed.repositories[NAME]
    repository.wrong_content = True
    command = ["pull", NAME, "-o", str(tmp_path / "pulled")]
    assert "damaged: its SHA-256" in error_of(command)
    assert not list((tmp_path / "pulled").glob("*"))
    repository.wrong_content = False
    main(command)
    assert_equal_artifacts(file, tmp_path / "pulled" / file.name)


def test_a_broken_transfer_can_be_repeated(pushed, file, tmp_path):
    pushed.repositories[NAME].breaks = 6  # huggingface_hub tries five times more
    command = ["pull", NAME, "-o", str(tmp_path / "pulled")]
    assert "broke off" in error_of(command)
    assert not (tmp_path / "pulled").exists()
    main(command)
    assert_equal_artifacts(file, tmp_path / "pulled" / file.name)


def test_without_a_network_the_error_is_one_line(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    message = error_of(["pull", NAME, "-o", str(tmp_path / "pulled")])
    assert "cannot be reached" in message
    assert not (tmp_path / "pulled").exists()


def test_private_gated_and_unknown_repositories_are_told_apart(pushed, file, tmp_path, monkeypatch):
    repository = pushed.repositories[NAME]
    pull = ["pull", NAME, "-o", str(tmp_path / "pulled")]
    assert "has no branch, tag or commit 'v9'" in error_of(["pull", f"{NAME}@v9", "-o", str(tmp_path)])
    repository.gated = True
    assert "is gated" in error_of(pull)
    repository.gated, repository.private = False, True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "check the spelling; if it is private, use a token that can read it" in error_of(pull)
    assert "log in" in error_of(["push", str(file), NAME])
    monkeypatch.setenv("HF_TOKEN", pushed.TOKEN)
    main(pull)


def test_a_private_upload_never_goes_to_a_public_repository(hub, file):
    main(["push", str(file), NAME, "--private"])
    assert hub.repositories[NAME].private
    hub.repositories["a/public"] = Repository()
    assert "exists and is public" in error_of(["push", str(file), "a/public", "--private"])
    assert not hub.repositories["a/public"].files


def test_only_the_pictures_of_the_training_are_uploaded(hub, file):
    file.with_name("patient.png").touch()
    main(["push", str(file), NAME])
    uploaded = {name for name in hub.repositories[NAME].files if name.endswith(".png")}
    assert "preview.png" in uploaded
    assert uploaded <= {"preview.png", "progress.png", "pretext_report.png"}
    main(["push", str(file), NAME, "--no-pictures"])
    assert not {name for name in hub.repositories[NAME].files if name.endswith(".png")}


def test_weights_that_were_pulled_name_their_origin_when_they_are_pushed_again(pushed, tmp_path):
    main(["pull", NAME, "-o", str(tmp_path / "pulled")])
    main(["push", str(tmp_path / "pulled" / "vf_pretrained.pth"), "someone-else/lung-ct"])
    page = pushed.repositories["someone-else/lung-ct"].files["README.md"].decode()
    assert f"base_model: {NAME}\n" in page
    assert "nnUNetv2_vf pull someone-else/lung-ct -o ." in page
    assert f"nnUNetv2_vf pull {NAME}" not in page
    main(["push", str(tmp_path / "pulled" / "vf_pretrained.pth"), NAME])
    assert "base_model" not in pushed.repositories[NAME].files["README.md"].decode()


def test_a_pretraining_that_started_from_weights_of_the_hub_names_them(hub, file):
    content = torch.load(file, weights_only=True)
    content["vf"]["pretrained"] = {"hub": "someone-else/lung-ct@v1", "file": "w.pth", "dataset": None}
    torch.save(content, file)
    main(["push", str(file), NAME])
    assert "base_model: someone-else/lung-ct\n" in hub.repositories[NAME].files["README.md"].decode()


def test_pictures_and_emphasis_of_the_author_are_kept(hub, file):
    card = file.with_name(CARD_NAME)
    text = card.read_text().replace("- Licence of the weights: CC BY 4.0", "**Licence of the weights:** MIT")
    card.write_text(text + "![logo](https://example.org/logo.png)\n")
    main(["push", str(file), NAME, "--no-pictures"])
    page = hub.repositories[NAME].files["README.md"].decode()
    assert "license: mit\n" in page
    assert "![logo](https://example.org/logo.png)" in page
    assert "preview.png" not in page


def test_a_hub_without_the_transfer_service_xet_is_explained(hub, file, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert "export HF_HUB_DISABLE_XET=1" in error_of(["push", str(file), NAME])


def test_a_branch_is_made(hub, file, tmp_path):
    main(["push", str(file), f"{NAME}@v2"])
    main(["pull", f"{NAME}@v2", "-o", str(tmp_path / "pulled")])
    assert hub.repositories[NAME].branches == {"main", "v2"}


@pytest.mark.parametrize(
    ("licence", "entries"),
    [("CC BY 4.0", "license: cc-by-4.0\n"), ("MIT License", "license: other\nlicense_name: MIT License\n")],
)
def test_licences_that_the_hub_does_not_know_are_called_other(hub, file, licence, entries):
    card = file.with_name(CARD_NAME)
    card.write_text(card.read_text().replace("Licence of the weights: CC BY 4.0", f"Licence of the weights: {licence}"))
    main(["push", str(file), NAME])
    assert entries in hub.repositories[NAME].files["README.md"].decode()


def test_a_repository_of_another_kind_is_explained(hub, tmp_path):
    hub.repositories[NAME] = Repository(files={"checkpoint_final.pth": b"", "README.md": b""})
    assert "has no model.safetensors" in error_of(["pull", NAME, "-o", str(tmp_path / "pulled")])


def name_unknown_network(artifact) -> None:
    artifact["vf"]["architecture"]["network_class_name"] = "os.system"


def name_unknown_network_in_nnssl_plan(artifact) -> None:
    artifact[NNSSL_PLAN_KEY]["architecture_plans"]["arch_class_name"] = "os.system"


def name_plans_by_a_path(artifact) -> None:
    artifact["vf"]["plans"] = "/etc/passwd"


def leave_out_the_network(artifact) -> None:
    del artifact["vf"]["architecture"]


def nest_deeply(artifact) -> None:
    artifact["vf"] = []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (name_unknown_network, "os.system"),
        (name_unknown_network_in_nnssl_plan, "os.system"),
        (name_plans_by_a_path, "missing or wrong entries"),
        (leave_out_the_network, "missing or wrong entries"),
        (nest_deeply, "missing or wrong entries"),
    ],
)
def test_hostile_and_wrong_weights_are_refused_and_nothing_is_written(pushed, file, tmp_path, change, message):
    artifact = read_artifact(file)
    change(artifact)
    write_safetensors(tmp_path / "model.safetensors", artifact)
    pushed.repositories[NAME].files["model.safetensors"] = (tmp_path / "model.safetensors").read_bytes()
    assert message in error_of(["pull", NAME, "-o", str(tmp_path / "pulled")])
    assert not list((tmp_path / "pulled").glob("*"))
    assert message in error_of(["convert", str(tmp_path / "model.safetensors"), "-o", str(tmp_path / "out.pth")])
    assert not (tmp_path / "out.pth").exists()


def test_files_that_are_there_are_not_replaced(pushed, tmp_path):
    (tmp_path / "vf_pretrained.pth").touch()
    assert "has a vf_pretrained.pth already" in error_of(["pull", NAME, "-o", str(tmp_path)])


def test_without_links_in_the_cache_the_hub_is_asked_for_the_checksum(pushed, file, tmp_path, monkeypatch):
    from huggingface_hub import file_download

    main(["push", str(file), NAME, "--no-pictures"])  # those of this test are equal files, which need links
    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda cache_dir=None: False)
    pushed.repositories[NAME].wrong_content = True
    command = ["pull", NAME, "-o", str(tmp_path / "pulled")]
    assert "damaged: its SHA-256" in error_of(command)
    pushed.repositories[NAME].wrong_content = False
    main(command)
    assert_equal_artifacts(file, tmp_path / "pulled" / file.name)


def test_push_needs_a_complete_model_card(hub, file):
    card = file.with_name(CARD_NAME)
    complete = card.read_text()
    card.write_text(complete.replace(f"{AUTHORS_ENTRIES[1]}: CC BY 4.0", f"{AUTHORS_ENTRIES[1]}:"))
    assert f"then run again: '{AUTHORS_ENTRIES[1]}: ...'" in error_of(["push", str(file), NAME])
    card.write_text(complete.replace("CC BY 4.0", TO_BE_FILLED_IN))
    assert all(entry in error_of(["push", str(file), NAME]) for entry in AUTHORS_ENTRIES)
    card.unlink()
    assert "'Author and contact: ...'" in error_of(["push", str(file), NAME])
    assert not hub.repositories


def test_push_takes_only_files_of_pretrained_weights(hub, file):
    assert "nnUNetv2_vf pull a/b -o FOLDER" in error_of(["push", "hf://a/b", NAME])
    assert f"name a file in it: {file.with_name('checkpoint_final.pth')}, {file}" in error_of(
        ["push", str(file.parent), NAME]
    )
    assert "legal: vf_pretrained.pth, which pretraining writes beside it" in error_of(
        ["push", str(file.with_name("checkpoint_final.pth")), NAME]
    )
    assert not hub.repositories


def test_a_name_without_its_scheme_is_explained():
    for name in (NAME, f"{NAME}@v1.0"):
        assert f"are named hf://{name}" in error_of(["info", name])
    assert "hf://" not in error_of(["info", "no/file.pth"])


@pytest.mark.parametrize("name", ["lung-ct", "a/b/c", "user/name@", "https://huggingface.co/a/b"])
def test_illegal_names_are_refused(name, tmp_path):
    assert "legal: USER/NAME" in error_of(["pull", name, "-o", str(tmp_path)])


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"garbage" * 9])
def test_damaged_safetensors_are_refused(content, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    assert str(file) in error_of(["plan", "-d", "7", "--like", str(file)])


def test_training_from_files_that_nnunet_does_not_read_is_explained(copied_dataset, monkeypatch):
    from nnunetv2_vf.errors import UserError
    from nnunetv2_vf.transfer.pretrained_weights import PretrainedWeights

    solutions = {"hf://a/b": "nnUNetv2_vf pull a/b", "model.safetensors": "nnUNetv2_vf convert", "": "is a folder"}
    for weights, solution in solutions.items():
        with pytest.raises(UserError, match=solution):
            PretrainedWeights.from_command_line(["nnUNetv2_train", "-pretrained_weights", weights], None)
