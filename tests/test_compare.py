from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd import cli
from nnunet_confkd.compare import compare_models
from nnunet_confkd.errors import InputError

LABELS = {"background": 0, "whole": [1, 2], "part": 2, "ignore": 3}


def save(file, shift):
    labels = np.zeros((6, 16, 16), np.uint8)
    labels[2:5, 2 + shift:10 + shift, 2:8], labels[2:5, 2 + shift:10 + shift, 8:12] = 1, 2
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(file))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two models as nnU-Net leaves them: ConfKD of two folds, whose student is off by a row and whose teacher by two; a stock one of
    one fold, off by four."""
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    truth = tmp_path / "preprocessed" / "Dataset027_Cubes" / "gt_segmentations"
    for i in range(4):
        save(truth / f"case{i}.nii.gz", 0)

    def make(name, folds, **shifts):
        model = tmp_path / "results" / "Dataset027_Cubes" / name
        for fold, cases in enumerate(folds):
            for folder, shift in shifts.items():
                for case in cases:
                    save(model / f"fold_{fold}" / folder / f"case{case}.nii.gz", shift)
            (model / f"fold_{fold}" / "checkpoint_final.pth").touch()
        (model / "plans.json").write_text("{}")
        (model / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
        return model
    return (make("ConfKDTrainer__nnUNetPlans__2d", [(0, 1), (2, 3)], validation=1, validation_teacher=2),
            make("nnUNetTrainer__nnUNetPlans__2d", [(0, 1, 2)], validation=4))


def test_models_stand_side_by_side_with_both_branches(models, tmp_path, capsys):
    assert cli.main(["compare", *map(str, models), "--output", str(tmp_path / "out"), "--processes", "1"]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = found["rows"]
    assert [(r["name"], r["branch"]) for r in rows] == [("ConfKDTrainer", "student"), ("ConfKDTrainer", "teacher"), ("nnUNetTrainer", "student")]
    # of 8 rows, 7, 6 and 4 overlap
    for row, dice, n in zip(rows, (7 / 8, 6 / 8, 4 / 8), (4, 4, 3)):
        assert row["statistics"]["whole"]["Dice"]["mean"] == pytest.approx(dice)
        assert row["statistics"]["foreground"]["Dice"] | {"n": n} == row["statistics"]["foreground"]["Dice"]
    assert rows[2]["difference"]["n"] == 3 and rows[2]["difference"]["mean"] == pytest.approx(-3 / 8) and "difference" not in rows[0]
    text = capsys.readouterr().out
    assert "-0.375 [-0.375, -0.375]" in text and (tmp_path / "out" / "comparison.txt").read_text().strip() in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000


def test_seeds_in_folders_of_their_own_are_told_apart(models, tmp_path):
    again = tmp_path / "seed1" / "Dataset027_Cubes" / models[0].name
    again.parent.mkdir(parents=True)
    shutil.copytree(models[0], again)
    assert [row["name"] for row in compare_models([models[0], again], processes=1)["rows"]] == ["results", "results", "seed1", "seed1"]


def test_one_model_alone_is_a_table_too(models):
    assert len(compare_models(models[1:], processes=1)["rows"]) == 1


def test_a_training_that_did_not_end_is_named(models):
    for file in (models[1] / "fold_0" / "validation").iterdir():
        file.unlink()
    (models[1] / "fold_0" / "validation").rmdir()
    with pytest.raises(InputError, match="fold_0/validation: there is no such folder: the training did not end"):
        compare_models(models, processes=1)


def test_what_is_no_model_or_has_no_truth(models, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="is no trained model"):
        compare_models([tmp_path], processes=1)
    with pytest.raises(InputError, match="named twice"):
        compare_models([models[0], models[0]], processes=1)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "elsewhere"))
    with pytest.raises(InputError, match="gt_segmentations: there is no such folder"):
        compare_models(models, processes=1)


def test_models_of_other_classes_are_not_compared(models):
    described = json.loads((models[1] / "dataset.json").read_text())
    described["labels"] = {"background": 0, "all": 1}
    (models[1] / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="models of the same classes"):
        compare_models(models, processes=1)


def test_a_broken_prediction_is_named_with_its_model(models):
    (models[0] / "fold_1" / "validation_teacher" / "case2.nii.gz").write_bytes(b"broken")
    with pytest.raises(InputError, match="ConfKDTrainer.*fold_1/validation_teacher.*cannot be read as an image"):
        compare_models(models, processes=1)


def test_foreign_files_stay(models, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comparison.txt").write_text("precious")
    assert cli.main(["compare", str(models[1]), "--output", str(tmp_path / "out"), "--processes", "1"]) == 1
    assert (tmp_path / "out" / "comparison.txt").read_text() == "precious"
