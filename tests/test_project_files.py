"""Files for other machines: containers, GitHub's workflows, and the citation agree with the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

REPOSITORY = Path(__file__).parent.parent
CONTAINER = REPOSITORY / "docs" / "how-to" / "container"
WORKFLOWS = REPOSITORY / ".github" / "workflows"


def install(folder: Path, **variables: str) -> Path:
    """Install as the containers do, from a copy of the sources; return the new environment."""
    source, environment = folder / "source", folder / "environment"
    shutil.copytree(REPOSITORY, source, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache", "tests"))
    command = [source / "docs" / "how-to" / "container" / "install.sh", source, environment]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **variables})
    return environment


@pytest.mark.slow
def test_the_containers_install_the_commands_and_the_trainers(tmp_path):
    environment = install(tmp_path, PIP_NO_DEPS="1")
    assert (environment / "bin" / "nnUNetv2_vf").is_file()
    assert (environment / "trainers" / "vf_pretrain_trainer.py").is_file()


@pytest.mark.slow
def test_everything_is_installed_and_nnunet_finds_the_trainers(tmp_path):
    environment = install(tmp_path)
    folders = {f"nnUNet_{name}": str(tmp_path) for name in ("raw", "preprocessed", "results")}
    variables = {**os.environ, **folders, "nnUNet_extTrainer": str(environment / "trainers")}
    done = subprocess.run(
        [environment / "bin" / "nnUNetv2_vf", "doctor"], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VFPretrainTrainer" in done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_both_containers_run_the_script_and_name_the_trainers_it_links(name):
    text = (CONTAINER / name).read_text()
    assert "/source/docs/how-to/container/install.sh /source /opt/nnunetv2-vf" in text
    assert "nnUNet_extTrainer=/opt/nnunetv2-vf/trainers" in text
    assert "PATH=/opt/nnunetv2-vf/bin:$PATH" in text


def test_the_workflow_tests_every_supported_python():
    jobs = yaml.safe_load((WORKFLOWS / "ci.yml").read_text())["jobs"]
    project = (REPOSITORY / "pyproject.toml").read_text()
    supported = SpecifierSet(re.search(r'requires-python = "(.+)"', project)[1])
    assert jobs["test"]["strategy"]["matrix"]["python"] == [v for v in (f"3.{n}" for n in range(20)) if v in supported]


@pytest.mark.parametrize("workflow", ["ci.yml", "release.yml"])
def test_workflows_use_targets_of_the_makefile(workflow):
    jobs = yaml.safe_load((WORKFLOWS / workflow).read_text())["jobs"]
    makefile = (REPOSITORY / "Makefile").read_text()
    for step in (step for job in jobs.values() for step in job["steps"]):
        command = step.get("run", "")
        if command.startswith("make "):
            assert all(re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE) for target in command.split()[1:])


@pytest.mark.parametrize("workflow", ["ci.yml", "release.yml"])
def test_workflows_name_actions_by_commit(workflow):
    """Whoever owns an action can move its tags."""
    actions = re.findall(r"uses: (.+)", (WORKFLOWS / workflow).read_text())
    assert actions
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", action) for action in actions)
