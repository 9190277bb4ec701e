"""Files from elsewhere: nothing that they name is called, and their text cannot control the terminal."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from foreign_checkpoints import nnssl_checkpoint
from nnunetv2.run.run_training import get_trainer_from_args

from nnunetv2_vf.cli import main
from nnunetv2_vf.errors import UserError, printable
from nnunetv2_vf.transfer.architectures import build_network, can_be_planned, require_known_architecture
from nnunetv2_vf.transfer.artifact import read_artifact, read_pretrained, read_with_architecture
from nnunetv2_vf.transfer.safe_loading import load_safely, malformed_file_errors


def hostile(entry: dict, canary: Path) -> dict:
    """Return the entry with a shell command in place of the nonlinearity."""
    entry = copy.deepcopy(entry)
    entry["arch_kwargs"] |= {"nonlin": "subprocess.Popen", "nonlin_kwargs": {"args": f"touch {canary}", "shell": True}}
    return entry


def test_a_command_in_an_artifact_is_not_run(artifacts, two_epochs, copied_dataset, tmp_path):
    canary, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = torch.load(artifacts["U-Net"], weights_only=True)
    content["vf"]["architecture"] = hostile(content["vf"]["architecture"], canary)
    torch.save(content, path)
    for command in (["plan", "--like", str(path)], ["adapt", str(path), "-o", str(tmp_path / "out.pth")]):
        with pytest.raises(
            SystemExit,
            match=r"names 'subprocess.Popen' as the nonlin .*; legal: convolutions, batch and instance norms",
        ):
            main([*command, "-d", "7"])
    main(["info", str(path)])
    assert not canary.exists()


def test_a_command_in_a_checkpoint_of_nnssl_is_not_run(tmp_path, capsys):
    canary, path = tmp_path / "ran", tmp_path / "evil.pth"
    content = nnssl_checkpoint()
    plan = content["nnssl_adaptation_plan"]["architecture_plans"]
    plan["arch_class_name"] = "ResidualEncoderUNet"
    plan["arch_kwargs"] = hostile({"arch_kwargs": dict(plan["arch_kwargs"] or {})}, canary)["arch_kwargs"]
    plan["arch_kwargs_requiring_import"] = ["nonlin"]
    torch.save(content, path)
    main(["info", str(path)])
    assert "cannot be converted: the checkpoint names 'subprocess.Popen'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"names 'subprocess\.Popen'"):
        main(["convert", str(path), "-o", str(tmp_path / "out.pth")])
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network_class_name": "os.system"}, "names the network 'os.system'; legal: "),
        ({"_kw_requires_import": None}, "has missing or wrong entries"),
        ({"arch_kwargs": "text"}, "has missing or wrong entries"),
        ({"arch_kwargs": {"nonlin": "torch.nn.LeakyReLU.__dict__.update"}}, "as the nonlin"),
        ({"arch_kwargs": {"nonlin": {"a": "dict"}}}, "as the nonlin"),
        ({"arch_kwargs": {"conv_op": "torch.nn.modules.conv.Conv2d"}}, "legal: 3D networks"),
    ],
)
def test_an_unknown_network_or_layer_in_a_file_is_rejected(artifacts, change, message):
    architecture = read_artifact(artifacts["U-Net"])["vf"]["architecture"]
    require_known_architecture(architecture, "w.pth")
    with pytest.raises(UserError, match=f"w.pth .*{message}"):
        require_known_architecture({**architecture, **change}, "w.pth")


def test_all_networks_of_the_test_artifacts_are_known_and_can_be_planned(artifacts):
    for path in artifacts.values():
        architecture = read_artifact(path)["vf"]["architecture"]
        require_known_architecture(architecture, path)
        assert can_be_planned(architecture)
    assert not can_be_planned({"arch_kwargs": {"patch_embed_size": [8, 8, 8]}})
    assert not can_be_planned({"arch_kwargs": {"strides": [[1, 1], [2, 2]]}})


def test_a_path_in_a_checkpoint_is_not_opened(tmp_path, capsys):
    path = tmp_path / "odd.pth"
    arguments = {"plans": "/etc/passwd", "dataset_json": {}, "configuration": "3d_fullres", "fold": 0}
    torch.save({"network_weights": {}, "init_args": arguments, "trainer_name": "T"}, path)
    main(["info", str(path)])
    assert "unknown kind of file" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        {"network_weights": [1], "vf": {"architecture": {}, "num_input_channels": 1, "num_classes": 5}},
        {"network_weights": {}, "vf": {"architecture": "text", "num_input_channels": 1, "num_classes": 5}},
        {"network_weights": {}, "vf": 3},
        {"network_weights": {}, "vf": {"architecture": {"network_class_name": "x"}}},
    ],
)
def test_malformed_contents_are_reported_in_one_line(
    artifacts, two_epochs, copied_dataset, tmp_path, monkeypatch, content
):
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    for command in (["plan", "--like", str(path)], ["adapt", str(path), "-o", str(tmp_path / "out.pth")]):
        with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: "):
            main([*command, "-d", "7"])
    with pytest.raises(SystemExit, match="1"):
        main(["doctor", "-d", "7", "-w", str(path)])
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(path)])
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: "):
        get_trainer_from_args("7", "3d_fullres", 0, "VFFinetuneTrainer", device=torch.device("cpu"))


def test_malformed_settings_are_reported_in_one_line(artifacts, two_epochs, copied_dataset, tmp_path, monkeypatch):
    content = torch.load(artifacts["U-Net"], weights_only=True)
    content["vf"]["settings"] = None
    torch.save(content, tmp_path / "odd.pth")
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(tmp_path / "odd.pth")])
    with pytest.raises(SystemExit, match=r"^nnUNetv2_vf: error: .* has missing or wrong entries"):
        get_trainer_from_args("7", "3d_fullres", 0, "VFFinetuneTrainer", device=torch.device("cpu"))


def test_text_of_a_file_cannot_control_the_terminal(artifacts, tmp_path, capsys):
    content = torch.load(artifacts["U-Net"], weights_only=True)
    content["vf"]["dataset"] = "Dataset\n\x1b[2Kuse: anything else"
    torch.save(content, tmp_path / "odd.pth")
    main(["info", str(tmp_path / "odd.pth")])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert not any(line.startswith("use: anything") for line in out.splitlines())


def test_printable_makes_one_short_line_without_control_characters():
    assert printable("a\tb\n\nc \x1b[0m") == "a b c ?[0m"
    assert printable("ä" * 600) == "ä" * 497 + "..."


def test_errors_of_the_system_are_not_blamed_on_the_file():
    with pytest.raises(OSError, match="disk"), malformed_file_errors("w.pth"):
        raise OSError("disk")


def test_a_file_does_not_choose_which_plans_are_opened(artifacts, tmp_path):
    content = torch.load(artifacts["U-Net"], weights_only=True)
    content["vf"]["plans"] = "/dev/zero"
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="has missing or wrong entries: TypeError plans that are no dict"):
        read_pretrained(tmp_path / "w.pth")


def test_plans_without_the_recorded_configuration_are_refused_in_one_line(artifacts, tmp_path):
    content = torch.load(artifacts["U-Net"], weights_only=True)
    del content["vf"]["configuration"]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match="has missing or wrong entries: KeyError 'configuration'"):
        read_with_architecture(tmp_path / "w.pth")


def test_an_argument_that_the_network_lacks_is_named(artifacts):
    architecture = read_artifact(artifacts["U-Net"])["vf"]["architecture"]
    needs_more = {**architecture, "_kw_requires_import": [*architecture["_kw_requires_import"], "lost_op"]}
    with pytest.raises(UserError, match=r"w\.pth lacks the argument lost_op of its network"):
        require_known_architecture(needs_more, "w.pth")
    with pytest.raises(UserError, match="_kw_requires_import names 'lost_op', which is no argument"):
        build_network(needs_more, 1, 2)


def test_code_in_a_file_of_an_old_format_is_named(tmp_path):
    torch.save({"x": Path.cwd}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"loading it would run .*getattr"):
        load_safely(tmp_path / "old.pth")


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_a_file_that_was_cut_off_is_called_damaged(tmp_path, share):
    torch.save({"x": torch.zeros(30_000)}, tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="it is damaged or is no file of PyTorch"):
        load_safely(tmp_path / "cut.pth")
