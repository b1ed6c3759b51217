from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.compare import compare_models, comparison_text

LABELS = {"background": 0, "whole": [1, 2], "part": 2, "ignore": 3}


def save(file, shift):
    labels = np.zeros((6, 16, 16), np.uint8)
    labels[2:5, 2 + shift:10 + shift, 2:8], labels[2:5, 2 + shift:10 + shift, 8:12] = 1, 2
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(file))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Two models as nnU-Net leaves them.

    The model of ConfKD has two folds; its student is off by one row, its teacher by two. The stock model has one fold
    and is off by four rows.
    """
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
    assert [(row["name"], row["branch"]) for row in rows] == [
        ("ConfKDTrainer", "student"), ("ConfKDTrainer", "teacher"), ("nnUNetTrainer", "student")]
    # of 8 rows, 7, 6 and 4 overlap
    for row, dice, n in zip(rows, (7 / 8, 6 / 8, 4 / 8), (4, 4, 3)):
        assert row["statistics"]["whole"]["Dice"]["mean"] == pytest.approx(dice) and row["n"] == n
        assert row["statistics"]["foreground"]["Dice"]["n"] == 3
    assert rows[2]["difference"]["n"] == 3 and rows[2]["difference"]["mean"] == pytest.approx(-3 / 8)
    assert "difference" not in rows[0]
    text = capsys.readouterr().out
    assert "-0.375 [-0.375, -0.375]" in text and (tmp_path / "out" / "comparison.txt").read_text().strip() in text
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 5000


def test_fold_all_does_not_count_beside_others(models):
    expected = compare_models(models, processes=1)
    shutil.copytree(models[0] / "fold_0", models[0] / "fold_all")
    for i in range(4):
        save(models[0] / "fold_all" / "validation" / f"case{i}.nii.gz", 0)
    found = compare_models(models, processes=1)
    assert [row["statistics"] for row in found["rows"]] == [row["statistics"] for row in expected["rows"]]
    assert any("fold_all is left out" in note for note in found["notes"])


@pytest.mark.parametrize("shift, told", [(0, False), (1, True)])
def test_other_patients_of_the_same_names_are_told(models, tmp_path, shift, told):
    other = shutil.copytree(models[1], tmp_path / "results" / "Dataset028_Other" / models[1].name)
    for i in range(4):
        save(tmp_path / "preprocessed" / "Dataset028_Other" / "gt_segmentations" / f"case{i}.nii.gz", shift * (i == 2))
    notes = compare_models([models[0], other], processes=1)["notes"]
    assert any("the ground truths of 1 of the 3 common cases differ between" in note and "case2" in note
               for note in notes) == told


def test_a_class_counts_only_in_cases_that_are_annotated_for_it(models):
    """Of the stock model, the part is far off in case 1, which is not annotated for it, and in case 2, which is."""
    whole = compare_models(models, processes=1)
    assert "Dice of each class" not in comparison_text(whole)
    file = models[0] / "dataset.json"  # it counts for the other model, too: both rows need the same cases
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotated_classes": {"case1": ["whole"],
                                                                                     "case2": ["whole", "part"]}}))
    found = compare_models(models, processes=1)
    for row, before in zip(found["rows"], whole["rows"]):
        assert [row["statistics"][name]["Dice"]["n"] for name in ("whole", "part")] == [3, 2]
        assert row["cases"]["case1"]["whole"] == before["cases"]["case1"]["whole"]
        assert np.isnan(row["cases"]["case1"]["part"]["Dice"]) != np.isnan(before["cases"]["case1"]["part"]["Dice"])
        assert row["foreground"]["case1"]["Dice"] == row["cases"]["case1"]["whole"]["Dice"]
    assert found["not_annotated"] == {"case1": ["part"]}
    text = comparison_text(found)
    assert "Dice of each class. 1 of the 3 cases are not annotated" in text
    assert [line.split()[-1] for line in text.split("Dice of each class")[1].splitlines()[3:6]] == ["2", "2", "2"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotated_classes": {"case1": ["liver"]}}))
    with pytest.raises(InputError, match='dataset.json: "annotated_classes" names liver, which "labels" do not have'):
        compare_models(models, processes=1)


def record(fold, training, validation):
    """Write confkd.json as the trainer does."""
    content = {"supervision": dict.fromkeys(training, "full"), "pseudo_dice_on": validation}
    (fold / "confkd.json").write_text(json.dumps(content))


def split(models, *folds):
    file = models[0].parents[2] / "preprocessed" / models[0].parent.name / "splits_final.json"
    file.write_text(json.dumps([{"train": train, "val": val} for train, val in folds]))


def test_every_figure_is_over_the_cases_that_all_rows_have(models):
    """Case 3, which the stock model has not, is the only one that the other segments badly."""
    for branch in ("validation", "validation_teacher"):
        save(models[0] / "fold_1" / branch / "case3.nii.gz", 8)
    found = compare_models(models, processes=1)
    assert [row["n"] for row in found["rows"]] == [4, 4, 3] and list(found["patients"]) == ["case0", "case1", "case2"]
    assert found["rows"][0]["statistics"]["whole"]["Dice"]["mean"] == pytest.approx(7 / 8)
    assert found["notes"][0] == "the rows do not have the same cases; every figure is over the 3 that all of them have"
    header, _, head, *lines = comparison_text(found).splitlines()
    assert "Means over the 3 cases, each taken as one patient, that all rows have in common" in header
    assert "n  n in common  Dice" in head
    assert [line.split()[2:4] for line in lines[:3]] == [["4", "3"], ["4", "3"], ["3", "3"]]
    assert lines[3] == f"WARNING: {found['notes'][0]}."
    record(models[0] / "fold_0", ["case2"], ["case0", "case1"])
    record(models[0] / "fold_1", ["case0"], ["case2", "case3"])
    assert "WARNING" not in comparison_text(compare_models(models[:1], processes=1))


def test_models_without_a_common_case_are_not_compared(models):
    for name in ("case0", "case1", "case2"):
        (models[1] / "fold_0" / "validation" / f"{name}.nii.gz").unlink()
    save(models[1].parents[2] / "preprocessed" / models[1].parent.name / "gt_segmentations" / "case9.nii.gz", 0)
    save(models[1] / "fold_0" / "validation" / "case9.nii.gz", 4)
    with pytest.raises(InputError, match="no validation case is common to all .*nnUNetTrainer, student: case9"):
        compare_models(models, processes=1)


def test_the_record_of_the_training_decides_which_cases_count(models):
    """Fold 0 was trained on case 0, which an earlier validation of another split has left in its folder."""
    record(models[0] / "fold_0", ["case0", "case2", "case3"], ["case1"])
    record(models[0] / "fold_1", ["case0", "case1"], ["case2", "case3"])
    found = compare_models(models[:1], processes=1)
    assert set(found["patients"]) == {"case1", "case2", "case3"}
    assert [note.partition(", ")[2] for note in found["notes"]] == [
        f"fold_0/{folder}: 1 predictions of other cases than the fully annotated ones that this fold validates are "
        "excluded: case0"
        for folder in ("validation", "validation_teacher")]
    record(models[0] / "fold_0", ["case1", "case2"], ["case0", "case1", "case4"])
    assert {note.partition(": ")[2] for note in compare_models(models[:1], processes=1)["notes"]} == {
        "1 validation cases have no prediction: case4", "1 counted cases are training cases as well: case1"}
    record(models[0] / "fold_0", ["case0", "case1"], ["case4"])
    with pytest.raises(InputError, match="fold_0/validation: none of its 2 cases is a validation case .*--val"):
        compare_models(models[:1], processes=1)


@pytest.mark.parametrize("content", [
    {}, {"supervision": ["case0"], "pseudo_dice_on": []}, {"supervision": {}, "pseudo_dice_on": "case0"},
    {"supervision": {}, "pseudo_dice_on": [["case0"]]}])
def test_a_record_of_another_form_is_named(models, content):
    (models[0] / "fold_0" / "confkd.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match='fold_0/confkd.json: must hold "supervision"'):
        compare_models(models, processes=1)


def test_the_split_tells_the_cases_of_a_stock_model(models):
    split(models, (["case1", "case3"], ["case0", "case2"]))
    found = compare_models(models[1:], processes=1)
    assert set(found["patients"]) == {"case0", "case2"} and "are excluded: case1" in found["notes"][0]
    split(models)
    with pytest.raises(InputError, match="splits_final.json: is no list of folds"):
        compare_models(models[1:], processes=1)


def test_where_nobody_knows_the_cases_all_count_with_a_warning(models):
    found = compare_models(models[1:], processes=1)
    assert len(found["patients"]) == 3
    assert "fold_0: neither confkd.json nor splits_final.json names" in comparison_text(found).split("WARNING:")[1]
    (models[1] / "fold_0").rename(models[1] / "fold_all")
    assert "fold_all: stock nnU-Net validates its training cases" in compare_models(models[1:], processes=1)["notes"][0]


def test_partly_annotated_validation_cases_are_left_out(models):
    """Stock nnU-Net validates them like any other. In case 1 it is right in the annotated rows and wrong elsewhere."""
    truth = models[1].parents[2] / "preprocessed" / models[1].parent.name / "gt_segmentations"

    def hide(name):
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(truth / name)))
        labels[:, 6:] = 3
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(truth / name))
    hide("case1.nii.gz")
    found = compare_models(models[1:], processes=1)
    assert set(found["patients"]) == {"case0", "case2"}
    assert found["notes"][-1].endswith("1 validation cases are only partially annotated and excluded: case1")
    for name in ("case0.nii.gz", "case2.nii.gz", "case3.nii.gz"):
        hide(name)
    found = compare_models(models[1:], processes=1)
    assert len(found["patients"]) == 3 and found["notes"][-1].endswith("only the annotated voxels are measured")


def test_a_model_does_not_gain_in_distance_by_what_it_misses(models):
    """Case 1 is the one with the largest distance, and the second model finds nothing in it."""
    save(models[0] / "fold_0" / "validation" / "case1.nii.gz", 5)
    missed = models[1] / "fold_0" / "validation" / "case1.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 16, 16), np.uint8)), str(missed))
    found = compare_models(models, processes=1)
    for row in found["rows"]:
        of_class = row["statistics"]["whole"]
        assert of_class["Dice"]["n"] == 3 and of_class["HD95_mm"]["n"] == of_class["ASSD_mm"]["n"] == 2
    assert [row["statistics"]["foreground"]["HD95_mm"]["mean"] for row in found["rows"]] == [1, 2, 4]
    assert "HD95 and ASSD leave out 2 class(es) of case1 in all rows" in comparison_text(found)


def test_patients_are_drawn_and_tested_not_cases(models, tmp_path):
    """The three common cases are those of two patients."""
    for file in sorted(tmp_path.rglob("case*.nii.gz")):
        file.rename(file.with_name({"0": "p0_a", "1": "p0_b", "2": "p1_a", "3": "p1_b"}[file.name[4]] + ".nii.gz"))
    by_case = compare_models(models, processes=1)["rows"][2]["difference"]
    by_patient = compare_models(models, patient_pattern=r"(p\d)_", processes=1)
    assert by_patient["patients"] == {"p0_a": "p0", "p0_b": "p0", "p1_a": "p1"}
    assert "Means over the 3 cases of 2 patients, that" in comparison_text(by_patient)
    assert all(of["Dice"]["patients"] == 2 for row in by_patient["rows"] for of in row["statistics"].values())
    # all differences are of one sign: p is 2 of the 2^n signs
    assert by_case["p"] == pytest.approx(2 / 2 ** 3)
    assert by_patient["rows"][2]["difference"]["p"] == pytest.approx(2 / 2 ** 2)
    for model, pattern in zip(models, (r"(p\d)_", None)):
        described = json.loads((model / "dataset.json").read_text()) | {"patient_pattern": pattern}
        (model / "dataset.json").write_text(json.dumps(described))
    assert compare_models(models, processes=1)["rows"] == by_patient["rows"]
    (models[1] / "dataset.json").write_text(json.dumps(described | {"patient_pattern": ".+"}))
    with pytest.raises(InputError, match="name patients differently.*--patient-pattern"):
        compare_models(models, processes=1)


def test_seeds_in_folders_of_their_own_are_told_apart(models, tmp_path):
    again = tmp_path / "seed1" / "Dataset027_Cubes" / models[0].name
    again.parent.mkdir(parents=True)
    shutil.copytree(models[0], again)
    rows = compare_models([models[0], again], processes=1)["rows"]
    assert [row["name"] for row in rows] == ["results", "results", "seed1", "seed1"]


def test_one_model_alone_is_a_table_too(models):
    assert len(compare_models(models[1:], processes=1)["rows"]) == 1


def test_a_training_that_did_not_end_is_named(models):
    for file in (models[1] / "fold_0" / "validation").iterdir():
        file.unlink()
    (models[1] / "fold_0" / "validation").rmdir()
    with pytest.raises(InputError, match="fold_0/validation: there is no such folder: the training has not ended"):
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
    with pytest.raises(InputError, match="segments all, and .* whole, part; only models of the same classes"):
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
