"""Install as a wheel and editable: nnU-Net's own lookup must find the trainers."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LOOKUP = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
import nnunetv2_vf
print(nnunetv2_vf.__file__, *(find(name).__name__ for name in sys.argv[1:]), sep="|")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, because builds write into the source folder."""
    copy = tmp_path_factory.mktemp("source") / "nnunetv2-vf"
    shutil.copytree(
        REPOSITORY, copy, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", ".*_cache", "tests")
    )
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    return next(folder.glob("*.whl"))


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture
def environment(tmp_path) -> Path:
    """A virtual environment that sees this one's packages, but not its nnunetv2_vf; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    show = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([str(python), "-c", show], capture_output=True, text=True, check=True).stdout.strip()
    # a path in a .pth file is searched for packages, but the .pth files in it (editable installs) are not run
    (Path(site) / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("kind", ["wheel", pytest.param("editable", marks=pytest.mark.slow)])
def test_stock_nnunet_finds_both_trainers(kind, wheel, source, environment):
    what = [wheel] if kind == "wheel" else ["--editable", source]
    pip("--python", environment, "install", "--no-deps", "--no-build-isolation", "--ignore-installed", *what)
    script = (
        f'eval "$("{environment.parent}/nnUNetv2_vf" env)"\n'
        f"\"{environment}\" -c '{LOOKUP}' VFPretrainTrainer VFFinetuneTrainer"
    )
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, cwd=environment.parent)
    package, *trainers = done.stdout.strip().splitlines()[-1].split("|")
    assert trainers == ["VFPretrainTrainer", "VFFinetuneTrainer"]
    home = source if kind == "editable" else environment.parent.parent
    assert Path(package).resolve().is_relative_to(home.resolve())


def test_the_wheel_holds_only_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "nnunetv2_vf/trainers/vf_pretrain_trainer.py" in names
    assert "nnunetv2_vf/planners/__init__.py" in names
    assert "nnunetv2_vf/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.partition("/")[0] for name in names} == {
        "nnunetv2_vf",
        next(name for name in names if ".dist-info/" in name).partition("/")[0],
    }


def test_trainer_modules_have_names_of_their_own():
    """nnU-Net imports them as top-level modules, so their names must not hide other modules."""
    for path in (REPOSITORY / "trainers").glob("vf_*.py"):
        assert path.stem not in sys.stdlib_module_names
        assert path.stem.startswith("vf_")


def test_no_file_names_a_registry_host():
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", "README.md"):
        text = (REPOSITORY / name).read_text()
        assert "--index-url" not in text
        assert "pypi.org" not in text
