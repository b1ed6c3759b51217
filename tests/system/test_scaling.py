"""The SLURM scripts of docs/slurm work, as far as they can be run without SLURM."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HIPPOCAMPUS = "Dataset004_Hippocampus"
SCRIPTS = Path(__file__).resolve().parents[2] / "docs" / "slurm"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="SLURM and its scripts are for Linux")
each_script = pytest.mark.parametrize("script", ("prepare.sbatch", "train.sbatch"))


def run(script: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "nnUNet_n_proc_DA": "1",
                   "nnUNet_compile": "false", **variables}
    return subprocess.run(["bash", str(SCRIPTS / script), *args], env=environment, capture_output=True, text=True,
                          timeout=600)


@each_script
def test_the_syntax_is_right_and_missing_arguments_are_named(script):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / script)]).returncode == 0
    done = run(script)
    assert done.returncode != 0 and "the id of the data set is missing" in done.stderr


def test_a_task_without_array_or_line_is_refused(tmp_path):
    runs = tmp_path / "runs.txt"
    runs.write_text("ConfKDTrainer 2d\n")
    assert "--array=1-N" in run("train.sbatch", "4", str(runs)).stderr
    for task in ("1", "2"):  # the first line has no fold, and there is no second one
        refused = run("train.sbatch", "4", str(runs), SLURM_ARRAY_TASK_ID=task)
        assert "is not \"TRAINER CONFIGURATION FOLD\"" in refused.stderr


@pytest.mark.slow  # two runs of the command in fresh processes
def test_a_task_of_the_array_trains_its_line_and_goes_on_when_submitted_again(nnunet, hippocampus, tmp_path):
    nnunet.configure(HIPPOCAMPUS, "2d_slurm", "2d", {"epochs": 1, "iterations_per_epoch": 3, "seed": 0})
    runs = tmp_path / "runs.txt"
    runs.write_text("NoSuchTrainer 2d_slurm 0\nConfKDTrainer 2d_slurm 0\n")
    command = ("train.sbatch", "4", str(runs), "-device", "cpu")
    variables = {"SLURM_ARRAY_TASK_ID": "2", "STAGE": "1", "TMPDIR": str(tmp_path)}
    first = run(*command, **variables)
    assert first.returncode == 0, first.stdout + first.stderr
    fold = nnunet.model(HIPPOCAMPUS, "2d_slurm") / "fold_0"
    (first_log,) = fold.glob("training_log_*.txt")
    assert first_log.read_text().count("Epoch time") == 1
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 5
    assert str(tmp_path / "preprocessed") in (fold / "debug.json").read_text()  # the staged copy was read
    again = run(*command, **variables)
    assert again.returncode == 0, again.stdout + again.stderr
    (second_log,) = set(fold.glob("training_log_*.txt")) - {first_log}
    assert "Epoch time" not in second_log.read_text(), "it trained anew"
