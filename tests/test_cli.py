from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATASET_ID

from nnunetv2_vf.cli import main
from nnunetv2_vf.nnunet_commands import trainer_path

DOCS = Path(__file__).parents[1] / "docs"
SUBCOMMANDS = ("env", "import", "plan", "preview", "convert", "adapt", "push", "pull", "info", "doctor", "demo")


def printed(capsys, *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out.strip()


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [("nnUNetv2_vf pre", {"preprocess", "preview"}), ("nnUNetv2_vf plan --network ", {"PCTNet", "FMUNet"})],
)
def test_the_shell_completes_commands_and_choices(tmp_path, line, expected):
    variables = {
        **{"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"},
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "completions"),
    }
    subprocess.run([sys.executable, "-m", "nnunetv2_vf"], env={**os.environ, **variables}, check=True)
    assert {word.strip() for word in (tmp_path / "completions").read_text().split("\n")} == expected


# ---------------------------------------------------------------- env


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("present", ["", "/my trainers", "/a:/it's"])
def test_env_puts_the_trainers_in_front_of_the_current_value(monkeypatch, present):
    monkeypatch.setenv("nnUNet_extTrainer", present)
    line = subprocess.run([sys.executable, "-m", "nnunetv2_vf", "env"], capture_output=True, text=True, check=True)
    script = f'{line.stdout.strip()}\nprintf %s "$nnUNet_extTrainer"'
    value = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    trainers, *others = value.split(os.pathsep)
    assert (Path(trainers) / "vf_pretrain_trainer.py").is_file()
    assert others == [path for path in present.split(os.pathsep) if path]


def test_env_adds_the_folder_only_once():
    once = trainer_path("/mine")
    assert trainer_path(once) == once


def test_env_quotes_for_fish_and_powershell(capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/it's")
    assert printed(capsys, "env", "--shell", "fish").startswith("set -gx nnUNet_extTrainer '")
    assert printed(capsys, "env", "--shell", "fish").endswith(r"/it\'s'")
    assert printed(capsys, "env", "--shell", "powershell").startswith("$env:nnUNet_extTrainer = '")
    assert printed(capsys, "env", "--shell", "powershell").endswith("/it''s'")


# ---------------------------------------------------------------- help, errors in the arguments, imports


def test_help_lists_every_subcommand(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SUBCOMMANDS)
    for name in SUBCOMMANDS:
        with pytest.raises(SystemExit):
            main([name, "--help"])


@pytest.mark.parametrize("statement", ["import nnunetv2_vf", "from nnunetv2_vf.cli import make_parser; make_parser()"])
def test_importing_and_parsing_load_neither_torch_nor_nnunet(statement):
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "nnunetv2", "numpy", "matplotlib"} & set(done.stdout.split())


# ---------------------------------------------------------------- preview


@pytest.mark.pictures
def test_preview_draws_the_requested_number_of_samples(two_epochs, tmp_path, capsys):
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        assert printed(capsys, "preview", "-d", str(DATASET_ID), "-n", str(count), "-o", str(path)) == f"wrote {path}"
        assert path.read_bytes().startswith(b"\x89PNG")
    heights = [int.from_bytes((tmp_path / f"{count}.png").read_bytes()[20:24], "big") for count in (1, 2)]
    assert heights[1] > 1.5 * heights[0]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["-d", "99"], ["no dataset 99", "nnUNetv2_vf doctor"]),
        (["-d", "Dataset099_None"], ["no plans", "nnUNetv2_plan_and_preprocess"]),
        (["-d", "seven"], ["'seven' is not a dataset; legal: an id such as 7"]),
        (["-d", str(DATASET_ID), "-p", "OtherPlans"], ["no plans", "OtherPlans.json"]),
        (["-d", str(DATASET_ID), "-c", "2d"], ["cannot be used", "'2d'", "legal: 3d_fullres"]),
        (["-d", str(DATASET_ID), "-o", "."], ["cannot read or write", "directory"]),
        (["-d", str(DATASET_ID), "-o", "/nowhere/preview.png"], ["/nowhere", "does not exist"]),
    ],
)
def test_preview_errors_are_one_line(two_epochs, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["preview", *arguments])
    message = exit_info.value.code
    assert message.startswith("nnUNetv2_vf: error: ")
    assert "\n" not in message
    for part in parts:
        assert part in message
    assert not (tmp_path / "preview.png").exists()


def test_preview_refuses_plans_that_cannot_be_read(copied_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (copied_dataset / "nnUNetPlans.json").write_text('{"plans_name": "nnUNetPlans",}')
    with pytest.raises(SystemExit, match=r"nnUNetPlans.json.* cannot be read: JSONDecodeError.*; plan again"):
        main(["preview", "-d", str(DATASET_ID)])


@pytest.mark.parametrize("name", ["nnUNet_def_n_proc", "nnUNet_n_proc_DA"])
@pytest.mark.parametrize("value", ["", "many"])
def test_a_number_of_processes_that_nnunet_cannot_parse_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} = '{value}' is not a whole number; set it: export {name}=8"):
        main(["doctor"])


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch):
    def press_ctrl_c(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2_vf.demo.journey.demo", press_ctrl_c)
    with pytest.raises(SystemExit) as exit_info:
        main(["demo"])
    assert exit_info.value.code == 130


def test_preview_names_a_missing_variable(two_epochs, monkeypatch):
    monkeypatch.delenv("nnUNet_preprocessed")
    with pytest.raises(SystemExit, match="nnUNet_preprocessed is not set"):
        main(["preview", "-d", "7"])


@pytest.mark.parametrize("number", ["0", "-1", "x", "21"])
def test_an_illegal_number_is_refused_in_one_line_with_exit_status_2(number, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["preview", "-d", "7", "-n", number])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("nnUNetv2_vf preview: error: argument -n: ")
    assert number in message
    assert message.count("\n") == 1


def test_planning_refuses_zero_augmentation_processes(nnunet, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    with pytest.raises(SystemExit, match="nnUNet_n_proc_DA=0 is for training; nnU-Net's planning divides by it"):
        main(["plan", "-d", "7"])


def test_an_id_of_two_datasets_is_refused_with_their_names(two_epochs, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    (tmp_path / f"Dataset{DATASET_ID:03d}_Other").mkdir()
    with pytest.raises(
        SystemExit, match="several datasets have the id 7: Dataset007_Other, Dataset007_Phantoms; rename"
    ):
        main(["preview", "-d", str(DATASET_ID)])


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_the_documentation_lists_every_option(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    flags = set(re.findall(r"^  (--?\w[\w-]*)", capsys.readouterr().out, flags=re.MULTILINE)) - {"-h"}
    sections = (DOCS / "reference" / "command-line.md").read_text().split("\n## ")
    (section,) = [section for section in sections if section.startswith(f"{name}\n")]
    assert not [flag for flag in flags if f"`{flag}" not in section]
