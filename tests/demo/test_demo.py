"""The demo: its data, and a run from beginning to end."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd import cli
from nnunet_confkd.demo.data import import_dataset
from nnunet_confkd.demo.picture import STORED
from nnunet_confkd.demo.synthetic import generate_dataset
from nnunet_confkd.errors import InputError


def write(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array, isVector=False)
    image.SetSpacing([0.5 + i for i in range(image.GetDimension())])
    sitk.WriteImage(image, str(file))


@pytest.fixture
def msd(tmp_path) -> Path:
    """An MSD task with 4-D images: two channels, the channel last in the file."""
    folder, rng = tmp_path / "Task99_Two", np.random.default_rng(0)
    for i in range(12):
        write(folder / "imagesTr" / f"case_{i:02d}.nii.gz", rng.normal(size=(2, 4, 9, 8)).astype(np.float32))
        label = np.zeros((4, 9, 8), np.uint8)
        label[:, 2:6, 2:6] = 1
        write(folder / "labelsTr" / f"case_{i:02d}.nii.gz", label)
    (folder / "labelsTr" / "._case_00.nii.gz").write_bytes(b"what macOS leaves behind")
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "T1", "1": "T2"}, "labels": {
        "0": "background", "1": "thing"}}))
    return folder


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """The folder of the data set that is written."""
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path / "raw" / "Dataset001_Small"


def test_an_msd_task_with_two_channels_becomes_a_mixed_data_set(msd, raw):
    roles = import_dataset(msd, 1, "Small")
    assert {role: len(cases) for role, cases in roles.items()} == {
        "test": 2, "validation": 2, "full": 5, "unlabelled": 0, "partial": 3}
    assert len({case for cases in roles.values() for case in cases}) == 12
    described = json.loads((raw / "dataset.json").read_text())
    assert described["labels"] == {"background": 0, "thing": 1, "ignore": 2} and len(described["channel_names"]) == 2
    case = roles["partial"][0]
    source = sitk.ReadImage(str(msd / "imagesTr" / f"{case}.nii.gz"))
    for c in range(2):
        image = sitk.ReadImage(str(raw / "imagesTr" / f"{case}_{c:04d}.nii.gz"))
        np.testing.assert_array_equal(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(source)[c])
        assert image.GetSpacing() == source.GetSpacing()[:3]
    assert 2 in sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{case}.nii.gz")))
    full = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / f"{roles['full'][0]}.nii.gz")))
    assert set(np.unique(full)) == {0, 1}


def test_mixed_nnunet_data_are_taken_as_they_are(tmp_path, raw):
    made = generate_dataset(tmp_path / "source", num_full=4, num_partial=3, num_unlabelled=2, num_validation=2,
                            num_test=0)
    roles = import_dataset(tmp_path / "source", 1, "Small")
    full = {case for role in ("full", "validation", "test") for case in roles[role]}
    assert full == set(made["full"] + made["validation"]) and len(roles["test"]) == len(roles["validation"]) == 1
    assert set(roles["partial"]) == set(made["partial"]) and set(roles["unlabelled"]) == set(made["unlabelled"])
    for case in roles["partial"] + roles["unlabelled"]:
        name = f"labelsTr/{case}.nii.gz"
        assert (raw / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_real_hippocampus_without_its_dataset_json(test_data, raw):
    limits = {"test": 2, "validation": 1, "full": 1, "unlabelled": 1, "partial": 1}
    import_dataset(test_data / "hippocampus", 1, "Small", limits=limits)
    labels = json.loads((raw / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "label_1": 1, "label_2": 2, "ignore": 3}


@pytest.mark.parametrize("missing, text", [
    ("imagesTr", "has no folder imagesTr"), ("labelsTr", "has no folder labelsTr")])
def test_another_layout_is_one_clear_error(msd, tmp_path, missing, text, capsys):
    (msd / missing).rename(msd / "elsewhere")
    assert cli.main(["demo", "--data", str(msd), "--output", str(tmp_path / "out")]) == 1
    assert text in capsys.readouterr().err


def test_too_few_full_cases_are_refused(tmp_path, raw):
    generate_dataset(tmp_path / "source", num_full=1, num_partial=1, num_unlabelled=1, num_validation=1, num_test=0)
    with pytest.raises(InputError, match="2 fully annotated cases"):
        import_dataset(tmp_path / "source", 1, "Small")


def test_a_demo_of_a_few_hearts_predicts_with_both_branches_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    """In this process, with threads in place of nnU-Net's pools."""
    few = {"num_full": 2, "num_partial": 1, "num_unlabelled": 1, "num_validation": 1, "num_test": 1}
    monkeypatch.setattr("nnunet_confkd.demo.synthetic.generate_dataset", partial(generate_dataset, **few, dimensions=2))
    for module in ("experiment_planning.dataset_fingerprint.fingerprint_extractor",
                   "experiment_planning.verify_dataset_integrity", "preprocessing.preprocessors.default_preprocessor",
                   "evaluation.evaluate_predictions"):
        monkeypatch.setattr(import_module(f"nnunetv2.{module}"), "multiprocessing",
                            SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool)))
    monkeypatch.setattr("nnunet_confkd.training.validation.ProcessPoolExecutor",
                        lambda number, context: ThreadPoolExecutor(number))
    for variable in ("OMP_WAIT_POLICY", "nnUNet_def_n_proc", "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(variable, os.environ.get(variable, "1"))
    assert cli.main(["demo", "--output", str(tmp_path), "--epochs", "1", "--iterations", "1"]) == 0
    folder = tmp_path / "run_001"
    results = json.loads((folder / "results.json").read_text())
    assert set(results["dice"]) == {"student", "teacher"} and all(0 <= dice <= 1 for dice in results["dice"].values())
    for branch in ("student", "teacher"):
        assert len(list((folder / branch).glob("*.nii.gz"))) == 1
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    for title, value in STORED.items():
        assert f"{title} Dice {value:.3f} (stored)\n" in out


@pytest.mark.slow
def test_the_whole_demo_in_short_ends_with_the_figures_and_the_paths(tmp_path):
    """In a fresh process, elsewhere, without any variable of nnU-Net's; a second run overwrites nothing."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
    (tmp_path / "demo_output" / "run_001").mkdir(parents=True)
    result = subprocess.run([Path(sys.executable).with_name("confkd"), "demo", "--epochs", "1", "--iterations", "2"],
                            cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    *_, student, teacher, figures, model, predictions, picture = result.stdout.splitlines()
    assert re.fullmatch(r"student Dice \d\.\d{3}", student) and re.fullmatch(r"teacher Dice \d\.\d{3}", teacher)
    folder = tmp_path / "demo_output" / "run_002"
    for path in (figures, model, predictions, picture):
        assert Path(path).exists() and folder in Path(path).parents
    dice = json.loads(Path(figures).read_text())["dice"]
    summary = json.loads((Path(predictions) / "summary.json").read_text())
    assert student == f"student Dice {summary['foreground_mean']['Dice']:.3f}" == f"student Dice {dice['student']:.3f}"
    assert len(list(Path(predictions).glob("*.nii.gz"))) == 6
    assert [f.name for f in tmp_path.iterdir()] == ["demo_output"]
    assert not list((tmp_path / "demo_output" / "run_001").iterdir())
