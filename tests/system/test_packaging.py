"""What users install works: nnU-Net finds the trainers, the commands start, and the wheel is whole."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path

import numpy as np
import pytest
from image_files import write_image

from nnunet_confkd import cli, discovery, nnunet_commands
from nnunet_confkd.inference.model_folder import CONTENT

ROOT = Path(__file__).resolve().parents[2]
TRAINERS = ["ConfKDTrainer", "ConfKDTrainer_noEntropy", "ConfKDTrainer_noKL", "ConfKDTrainer_partialOnly",
            "ConfKDTrainer_MedIA2023", "ConfKDTrainer_1epoch", "ConfKDTrainer_5epochs", "ConfKDTrainer_50epochs",
            "ConfKDTrainer_100epochs", "ConfKDTrainer_250epochs"]
# Each trainer is looked up twice and compared with the package's own: a class that is defined in the folder would be
# another object at every lookup.
LOOKUP = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
import nnunet_confkd.trainers.confkd_trainers as ours
for name in {names}:
    found = find(name)
    assert found is find(name) is getattr(ours, name) is pickle.loads(pickle.dumps(found)), name
print("FOUND")
"""
WITHOUT_THE_VARIABLE = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
try:
    recursive_find_trainer_class_by_name("ConfKDTrainer")
except RuntimeError as error:
    assert "Could not find requested nnunet trainer" in str(error)
else:
    raise AssertionError("found")
import os
os.environ["nnUNet_extTrainer"] = {folder!r}
"""


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")} | environment
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("inside", [pytest.param(True, id="in the checkout", marks=pytest.mark.slow),
                                    pytest.param(False, id="elsewhere")])
def test_nnunets_lookup_finds_every_trainer_in_a_fresh_process_if_the_variable_is_set(inside, tmp_path):
    code = WITHOUT_THE_VARIABLE.format(folder=str(discovery.trainer_dir())) + LOOKUP.format(names=TRAINERS)
    result = run(sys.executable, "-c", code, cwd=ROOT if inside else tmp_path)
    assert result.stdout.endswith("FOUND\n"), result.stdout + result.stderr


def test_a_checkout_beside_an_installed_wheel_is_whole(tmp_path):
    """Python started in a clone imports the clone, whatever is installed."""
    for name in ("nnunet_confkd", "trainers", "dataset_conversion"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "import nnunet_confkd.trainers as t, nnunet_confkd.dataset_conversion as d; print(t.__file__, d.__file__)"
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    expected = [str(tmp_path / name / "__init__.py") for name in ("trainers", "dataset_conversion")]
    assert result.stdout.split() == expected, result.stderr


def test_trainer_dir_prints_the_path_and_nothing_else(tmp_path):
    result = run(Path(sys.executable).with_name("confkd"), "trainer-dir", cwd=tmp_path)
    assert result.stdout == f"{discovery.trainer_dir()}\n" and result.stderr == ""
    assert (discovery.trainer_dir() / "confkd_trainers.py").is_file()
    assert {f.name for f in discovery.trainer_dir().glob("*.py")} == {"__init__.py", "confkd_trainers.py"}


@pytest.mark.skipif(os.name == "nt", reason="the line is one of a Unix shell")
def test_the_export_line_keeps_what_the_variable_holds(tmp_path):
    line = run(Path(sys.executable).with_name("confkd"), "trainer-dir", "--export", cwd=tmp_path).stdout
    folder = str(discovery.trainer_dir())
    for held, expected in (("", folder), ("/mine:/theirs", f"{folder}:/mine:/theirs")):
        shell = run("sh", "-c", line + 'printf "%s" "$nnUNet_extTrainer"', cwd=tmp_path, nnUNet_extTrainer=held)
        assert shell.stdout == expected


def test_making_findable_keeps_what_is_there_and_adds_once(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/mine")
    discovery.make_findable()
    discovery.make_findable()
    assert os.environ["nnUNet_extTrainer"].split(os.pathsep) == ["/mine", str(discovery.trainer_dir())]


def test_every_console_script_resolves():
    ours = [e for e in entry_points(group="console_scripts") if e.value.startswith("nnunet_confkd")]
    assert [e.name for e in ours] == ["confkd"] and callable(ours[0].load())


def test_the_wheel_holds_one_top_level_name_and_its_trainers_are_found(tmp_path):
    """Built from a copy, so that no build folder is left in the checkout."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", ".venv", "demo_output", "*.egg-info", "build"))
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, source,
                cwd=tmp_path, PATH=os.environ["PATH"])
    assert built.returncode == 0, built.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as z:
        z.extractall(tmp_path / "site")
        names = {name for name in z.namelist() if ".dist-info/" not in name}
    modules = [file.relative_to(ROOT).as_posix() for folder in ("nnunet_confkd", "trainers", "dataset_conversion")
               for file in (ROOT / folder).rglob("*.py")]
    assert names == {"nnunet_confkd/" + name.removeprefix("nnunet_confkd/") for name in modules} | {
        "nnunet_confkd/py.typed"}
    # -P: not the checkout; the extracted wheel comes before the editable install
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n" \
           "from nnunet_confkd.discovery import make_findable, trainer_dir\n" \
           f"assert str(trainer_dir()).startswith({str(tmp_path)!r}), trainer_dir()\nmake_findable()"
    result = run(sys.executable, "-c", code + LOOKUP.format(names=TRAINERS), cwd=tmp_path)
    assert result.stdout.endswith("FOUND\n"), result.stdout + result.stderr


@pytest.mark.parametrize("installed", ("2.7.0", "2.9.0", "3.0", "28.0"))
def test_an_nnunet_that_does_not_fit_is_named_at_import(tmp_path, installed):
    about = tmp_path / f"nnunetv2-{installed}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nnunetv2\nVersion: {installed}\n")
    result = run(sys.executable, "-c", "import nnunet_confkd.training.trainer", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert result.returncode and f"works with nnunetv2 2.8, but {installed} is installed" in result.stderr
    about.rename(tmp_path / "nnunetv2-2.8.7.dist-info")
    (tmp_path / "nnunetv2-2.8.7.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: nnunetv2\nVersion: 2.8.7\n")
    assert run(sys.executable, "-c", "import nnunet_confkd", cwd=tmp_path, PYTHONPATH=str(tmp_path)).returncode == 0


def test_nnunet_is_pinned_and_torch_is_not():
    requirements = {r.split(";")[0].strip() for r in distribution("nnunet-confkd").requires}
    assert any(r.startswith("nnunetv2") and ">=2.8" in r and "<2.9" in r for r in requirements)
    assert "torch>=2.6" in requirements  # no upper limit, no build


# ---- the command line ----------------------------------------------------------------------------------------------

def test_unknown_commands_and_help(capsys):
    assert cli.main(["--help"]) == 0 and "trainer-dir" in capsys.readouterr().out
    assert cli.main(["explode"]) == 2 and "there is no command 'explode'" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are those of libgomp on Linux alone")
@pytest.mark.parametrize("given, spins", [
    ({}, "0"), pytest.param({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000", marks=pytest.mark.slow)])
def test_threads_on_the_cpu_wait_without_spinning(tmp_path, given, spins):
    """libgomp reads its settings, and prints them, when torch is imported. The command must have set them before."""
    (tmp_path / "model").mkdir()
    for name in CONTENT:
        (tmp_path / "model" / name).write_text("{}")
    code = "from nnunet_confkd import cli; cli.main(['report', '--model', 'model', '-device', 'cpu'])"
    result = run(sys.executable, "-c", code, cwd=tmp_path, OMP_DISPLAY_ENV="VERBOSE", **given)
    assert f"GOMP_SPINCOUNT = '{spins}'" in result.stderr and "confkd report: model" in result.stderr


@pytest.mark.parametrize("command, name, given, handed", [
    ("train", "nnUNetv2_train", ["4", "2d", "0", "--npz", "-p", "x", "-device", "cpu"],
     ["-tr", "ConfKDTrainer", "-device", "cpu"]),
    ("train", "nnUNetv2_train", ["4", "2d", "all", "-tr", "Mine", "-device=cpu"], ["-tr", "Mine", "-device", "cpu"]),
    ("predict", "nnUNetv2_predict", ["-o", "out", "-d", "4", "-c", "2d", "-f", "0", "1", "-p", "x", "-device", "cpu"],
     ["-tr", "ConfKDTrainer", "-device", "cpu"]),
    ("predict", "nnUNetv2_predict_from_modelfolder", ["-m", "model", "-o", "out", "--verbose", "-device", "cpu"],
     ["-device", "cpu"])])
def test_arguments_are_handed_on_and_defaults_are_added(monkeypatch, tmp_path, command, name, given, handed):
    seen = []
    # nnU-Net also takes this older name of the channels
    model = {"file_ending": ".nii.gz", "modality": {"0": "CT"}, "labels": {"background": 0, "organ": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps(model))
    write_image(tmp_path / "a_0000.nii.gz", np.zeros((2, 3, 4)))
    for check in ("check_training", "check_model"):
        monkeypatch.setattr(nnunet_commands, check, lambda args: tmp_path)
    monkeypatch.setattr(nnunet_commands, "run_as", lambda name, argv: seen.append((name, argv)))
    monkeypatch.setattr(nnunet_commands, "expected_training_time", lambda args: None)
    monkeypatch.setenv("nnUNet_extTrainer", "")
    images = ["-i", str(tmp_path)] if command == "predict" else []
    branch = ["--branch", "student"] if command == "predict" else []
    assert cli.main([command, *images, *given, *branch]) == 0
    assert seen == [(name, [*images, *given, *handed, *images])]
    assert str(discovery.trainer_dir()) in os.environ["nnUNet_extTrainer"]


def test_an_unknown_branch_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--branch", "both", "-i", "in"])
    assert "--branch" in capsys.readouterr().err
