"""The notebook of the documentation runs from its first to its last cell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tutorial.ipynb"


@pytest.mark.slow
def test_the_notebook_runs_and_predicts(tmp_path):
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": commands, "TMPDIR": str(tmp_path), "IPYTHONDIR": str(tmp_path / "ipython")}
    command = [sys.executable, "-m", "IPython", "--colors=NoColor", str(NOTEBOOK)]
    done = subprocess.run(command, env=variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "labels found: [0" in done.stdout, done.stdout + done.stderr
    (work,) = tmp_path.glob("vf_tutorial_*")
    assert len(list((work / "predictions").glob("*.nii.gz"))) == 2
