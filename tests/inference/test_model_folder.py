"""What is said of a path that is no model."""
from __future__ import annotations

import re

import pytest

from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.model_folder import require_model

MODEL = "ConfKDTrainer__nnUNetPlans__2d_quick"


@pytest.fixture
def results(tmp_path, monkeypatch):
    """nnUNet_results with a model of data set 27, and a folder that is none."""
    folder = tmp_path / "Dataset027_Heart"
    for name in ("plans.json", "dataset.json"):
        (folder / MODEL).mkdir(parents=True, exist_ok=True)
        (folder / MODEL / name).touch()
    (folder / "empty__nnUNetPlans__2d").mkdir()
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return tmp_path


def complaint(path) -> str:
    with pytest.raises(InputError) as error:
        require_model(path)
    return str(error.value)


def test_a_model_is_one(results):
    require_model(results / "Dataset027_Heart" / MODEL)


@pytest.mark.parametrize("given", ["27", "027", "Dataset027_Heart"])
def test_the_models_of_a_data_set_are_named(results, given):
    assert re.search(rf"^{given}: there is no such folder\. .*Dataset027_Heart holds: {MODEL}$", complaint(given))


def test_the_models_in_a_folder_are_named(results):
    folder = results / "Dataset027_Heart"
    assert complaint(folder).startswith(f"{folder}: is no trained model: plans.json and dataset.json missing. Give ")
    assert complaint(folder).endswith(f"it holds: {MODEL}")


@pytest.mark.parametrize("given", ["28", "nowhere", "Dataset028_Heart"])
def test_without_models_the_form_of_the_folder_is_told(results, monkeypatch, given):
    text = f"{given}: there is no such folder. Give the folder TRAINER__PLANS__CONFIGURATION under nnUNet_results"
    assert complaint(given) == text
    monkeypatch.delenv("nnUNet_results")
    assert complaint(given) == text
