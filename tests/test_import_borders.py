"""`make lint` refuses imports that cross the borders between the parts of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def package_as_installed(folder: Path) -> Path:
    """Copy the package, with trainers and planners inside it as in the wheel; return its folder."""
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    package = folder / "nnunetv2_vf"
    ignore = shutil.ignore_patterns("__pycache__", "trainers", "planners")
    shutil.copytree(REPOSITORY / "nnunetv2_vf", package, ignore=ignore)
    for name in ("trainers", "planners"):
        shutil.copytree(REPOSITORY / name, package / name)
    return package


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("transfer/info.py", "import nnunetv2_vf.trainers.vf_pretrain_trainer"),
        ("transfer/info.py", "from nnunetv2_vf.planners.like_planner import plan_like"),
        ("training/step.py", "from nnunetv2_vf.transfer import artifact"),
        ("pretext/fusion.py", "from nnunetv2.paths import nnUNet_raw"),
        ("importing/sources.py", "import torch"),
        ("cli.py", "from nnunetv2_vf.trainers.vf_pretrain_trainer import VFPretrainTrainer"),
    ],
)
def test_a_forbidden_import_is_refused(tmp_path, module, line):
    package = package_as_installed(tmp_path)
    with (package / module).open("a") as file:
        file.write(f"\n{line}\n")
    lint = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": ".", "PYTHONUTF8": "1"}
    done = subprocess.run(lint, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
