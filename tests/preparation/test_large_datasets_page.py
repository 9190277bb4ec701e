"""The SLURM script of ``docs/how-to/large-datasets.md`` runs, with an ``sbatch`` that runs the jobs at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_vf.demo.phantoms import write_images

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "large-datasets.md"
FAKE_SBATCH = """#!{python}
import os, re, subprocess, sys
arguments = sys.argv[1:]
flags = dict(re.fullmatch(r"--([a-z-]+)=?(.*)", argument).groups() for argument in arguments if argument[:2] == "--")
command = arguments[arguments.index("--wrap") + 1]
with open("{log}", "a+") as log:
    log.seek(0)
    job = 100 + len(log.readlines())
    print(job, flags.get("dependency", ""), command, file=log)
first, last = map(int, flags.get("array", "0-0").split("-"))
for task in range(first, last + 1):
    variables = {{**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}}
    subprocess.run(["bash", "-c", command], check=True, stdout=sys.stderr, env=variables)
print(job)
"""


@pytest.mark.slow
def test_the_script_prepares_a_dataset_and_submits_the_training_last(tmp_path):
    write_images(tmp_path / "ct", range(4), spacing=10)
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    for words, fewer in (
        ("/data/ct", tmp_path / "ct"),
        ("0-7", "0-1"),
        ("-np 16", "-np 1"),
        ("-num_parts 8", "-num_parts 2"),
        ("nnUNetv2_train ", "echo nnUNetv2_train "),
    ):
        assert words in script
        script = script.replace(words, str(fewer))
    log = tmp_path / "log"
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(FAKE_SBATCH.format(python=sys.executable, log=log))
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    folders = {name: str(tmp_path / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir()
    subprocess.run(["bash", "-c", script], check=True, env={**os.environ, **folders, "PATH": path})

    jobs = [line.split(" ", 2) for line in log.read_text().splitlines()]
    assert [job for job, _, _ in jobs] == ["100", "101", "102", "103", "104"]
    assert [dependency for _, dependency, _ in jobs] == ["", *(f"afterok:{job}" for job, _, _ in jobs[:-1])]
    assert jobs[-1][2] == "echo nnUNetv2_train 100 3d_fullres all -tr VFPretrainTrainer"
    preprocessed = tmp_path / "nnUNet_preprocessed" / "Dataset100_LungCT"
    assert len(json.loads((preprocessed / "dataset_fingerprint.json").read_text())["spacings"]) == 4
    assert len(list((preprocessed / "nnUNetPlans_3d_fullres").glob("*.pkl"))) == 4
