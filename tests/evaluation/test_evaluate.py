from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation import evaluate
from nnunet_confkd.evaluation.evaluate import compare, evaluate_folders
from nnunet_confkd.evaluation.metrics import MEASURES, measure_case

SPACING = (0.5, 1.5, 3.0)  # x, y, z


def save(file: Path, labels: np.ndarray, spacing=SPACING, origin=(0.0, 0.0, 0.0)) -> None:
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing(spacing[:labels.ndim])
    image.SetOrigin(origin[:labels.ndim])
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def label_map(shift=0, classes=(1, 2)):
    labels = np.zeros((8, 20, 20), np.uint8)
    for i, c in enumerate(classes):
        labels[2:6, 4 + shift:10 + shift, 2 + 8 * i:8 + 8 * i] = c
    return labels


@pytest.fixture
def folders(tmp_path):
    """Truth, predictions that are shifted by 0, 1 and 2 rows, and others that are always shifted by 3."""
    for i in range(3):
        save(tmp_path / "truth" / f"case{i}.nii.gz", label_map())
        save(tmp_path / "prediction" / f"case{i}.nii.gz", label_map(shift=i))
        save(tmp_path / "worse" / f"case{i}.nii.gz", label_map(shift=3))
    return tmp_path


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Data set 27 with labels, or regions, of our choice."""
    def make(labels):
        raw = tmp_path / "raw" / "Dataset027_Cubes"
        raw.mkdir(parents=True, exist_ok=True)
        (raw / "dataset.json").write_text(json.dumps({"labels": labels}))
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
        return 27
    return make


def run(*argv) -> int:
    return cli.main(["evaluate", *map(str, argv), "--processes", "1"])


def test_the_command_writes_what_it_measures(folders, capsys):
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--labels", 1, 2, "--tolerance", 1.6) == 0
    screen = capsys.readouterr().out
    found = json.loads((folders / "prediction" / "metrics.json").read_text())
    assert list(found["cases"]) == ["case0", "case1", "case2"] and list(found["cases"]["case1"]) == ["1", "2"]
    # blocks of 4 x 6 x 6 voxels, shifted by i rows of 1.5 mm: 6 - i of 6 rows overlap
    for i in range(3):
        for c in "12":
            of = found["cases"][f"case{i}"][c]
            assert set(of) == set(MEASURES)
            assert of["Dice"] == pytest.approx((6 - i) / 6) and of["IoU"] == pytest.approx((6 - i) / (6 + i))
            assert of["HD95_mm"] == pytest.approx(1.5 * i) and of["volume_difference_ml"] == 0
            assert (of["NSD"] == 1) == (i < 2)
    assert found["mean"]["1"]["Dice"] == pytest.approx(5 / 6) and found["statistics"]["1"]["Dice"]["n"] == 3
    assert found["statistics"]["2"]["Dice"]["sd"] == pytest.approx(1 / 6) and found["mean"]["foreground"]["Dice"] == pytest.approx(5 / 6)
    assert found["tolerance_mm"] == 1.6 and "0.833 [0.667, 1.000]" in screen and "NSD at 1.6 mm" in screen
    with open(folders / "prediction" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and float(rows[2]["Dice"]) == found["cases"]["case1"]["1"]["Dice"] and rows[2]["case"] == "case1"


def test_the_summary_is_nnunets(folders):
    """nnU-Net's own evaluation of the same folders, read back by nnU-Net's own function, tells the same."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--labels", 1, 2, "1,2", "--output", folders / "out") == 0
    ours = load_summary_json(str(folders / "out" / "summary.json"))
    nnunets = compute_metrics_on_folder(str(folders / "truth"), str(folders / "prediction"), str(folders / "theirs.json"), SimpleITKIO(),
                                        ".nii.gz", [1, 2, (1, 2)], None, 1)
    theirs = load_summary_json(str(folders / "theirs.json"))
    assert nnunets and set(ours) == set(theirs) and set(ours["mean"]) == set(theirs["mean"]) == {1, 2, (1, 2)}
    for of, expected in [(ours["foreground_mean"], theirs["foreground_mean"]), *((ours["mean"][k], theirs["mean"][k]) for k in ours["mean"]),
                         *((a["metrics"][k], b["metrics"][k]) for a, b in zip(ours["metric_per_case"], theirs["metric_per_case"])
                           for k in ours["mean"])]:
        assert of == pytest.approx(expected)


def test_regions_and_the_ignore_label_come_from_the_data_set(folders, dataset):
    save(folders / "truth" / "case2.nii.gz", np.where(np.arange(20)[:, None] >= 10, np.uint8(3), label_map()))
    evaluation = evaluate_folders(folders / "truth", folders / "prediction", processes=1,
                                  dataset=dataset({"background": 0, "whole": [1, 2], "part": 2, "ignore": 3}))
    # the two rows beyond row 10 are ignored: 4 of 6 rows are predicted, and nothing else counts
    assert evaluation.cases["case2"]["whole"]["Dice"] == pytest.approx(2 * 4 / 10)
    assert evaluation.ignore_label == 3 and list(evaluation.cases["case2"]) == ["whole", "part"]
    expected = measure_case(label_map(), label_map(1), {"whole": (1, 2), "part": (2,)}, SPACING[::-1])
    assert evaluation.cases["case1"] == expected
    # labels beside the data set: its ignore label, and only what was asked for
    some = evaluate_folders(folders / "truth", folders / "prediction", processes=1, dataset=27, labels=[2])
    assert {case: {"part": of["2"]} for case, of in some.cases.items()} == {
        case: {"part": of["part"]} for case, of in evaluation.cases.items()}
    with pytest.raises(InputError, match="data set 27 has no 4; it has 1, 2"):
        evaluate_folders(folders / "truth", folders / "prediction", processes=1, dataset=27, labels=[4])


def test_labels_that_occur_are_measured_where_none_are_named(folders):
    evaluation = evaluate_folders(folders / "truth", folders / "prediction", processes=2)  # in two processes
    assert list(evaluation.classes) == ["1", "2"] and evaluation.cases["case1"] == measure_case(
        label_map(), label_map(1), {"1": (1,), "2": (2,)}, SPACING[::-1])


def test_empty_classes_are_left_out_and_counted(folders, capsys):
    save(folders / "truth" / "case0.nii.gz", label_map(classes=(1,)))
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1,)))  # 2 in neither
    save(folders / "prediction" / "case1.nii.gz", label_map(classes=(1,)))  # 2 in the truth alone
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--labels", 1, 2) == 0
    text = (folders / "prediction" / "metrics.json").read_text()
    found = json.loads(text)
    assert "NaN" not in text and set(found["cases"]["case0"]["2"].values()) == {None}
    assert found["cases"]["case1"]["2"] | {"volume_difference_ml": 0} == {"Dice": 0, "IoU": 0, "NSD": 0, "HD95_mm": None, "ASSD_mm": None,
                                                                        "volume_difference_ml": 0}
    assert found["statistics"]["2"]["Dice"]["n"] == 2 and found["statistics"]["2"]["HD95_mm"]["n"] == 1 and found["one_empty"] == {"1": 0, "2": 1}
    assert found["mean"]["2"]["Dice"] == pytest.approx((0 + 4 / 6) / 2)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("2 "))
    assert line.split()[1] == "2" and line.split()[-1] == "1"


def test_two_folders_are_compared_case_by_case(folders, capsys):
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--against", folders / "worse", "--labels", 1, 2) == 0
    found = json.loads((folders / "prediction" / "metrics.json").read_text())["comparison"]["1"]["Dice"]
    # Dice 1, 5/6, 4/6 against 3/6: differences of one sign, p = 2 / 2^3; 14 of the 18 rows have a p of 0.25, or none
    assert found["mean"] == pytest.approx(1 / 3) and found["p"] == pytest.approx(0.25) and found["p_holm"] == 1
    assert found["ci_low"] == pytest.approx(1 / 6) and found["ci_high"] == pytest.approx(1 / 2)
    assert "+0.333 [+0.167, +0.500]" in capsys.readouterr().out


def two_cases_of_each_patient(folders):
    """The same cases again as a second of the same patients: p0_a, p0_b, p1_a, ..."""
    for folder in ("truth", "prediction", "worse"):
        for i in range(3):
            file = folders / folder / f"case{i}.nii.gz"
            (folders / folder / f"p{i}_b.nii.gz").write_bytes(file.read_bytes())
            file.rename(folders / folder / f"p{i}_a.nii.gz")


def test_intervals_and_tests_are_by_patient(folders, dataset, capsys):
    options = ("--truth", folders / "truth", "--prediction", folders / "prediction", "--against", folders / "worse", "--labels", 1, 2)
    assert run(*options, "--output", folders / "once") == 0
    two_cases_of_each_patient(folders)
    capsys.readouterr()
    assert run(*options, "--output", folders / "twice", "--patient-pattern", r"(p\d)_") == 0
    screen = capsys.readouterr().out
    once, twice = (json.loads((folders / name / "metrics.json").read_text()) for name in ("once", "twice"))
    for of in ("statistics", "comparison"):
        first, second = once[of]["1"]["Dice"], twice[of]["1"]["Dice"]
        assert second | {"sd": None} == pytest.approx(first | {"n": 6, "sd": None}) and second["patients"] == 3
    assert "prediction: 6 cases of 3 patients; means" in screen and "paired, 6 cases of 3 patients; 95 %" in screen
    assert twice["patients"] == {f"p{i}_{c}": f"p{i}" for i in range(3) for c in "ab"}
    # the data set knows the pattern, too; the option wins
    described = dataset({"background": 0, "a": 1, "b": 2})
    file = folders / "raw" / "Dataset027_Cubes" / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"patient_pattern": r"(p\d)_"}))
    for options, count in (({}, "6 cases of 3 patients"), ({"patient_pattern": ".+"}, "6 cases, each taken as one patient")):
        assert count in evaluate_folders(folders / "truth", folders / "prediction", dataset=described, processes=1, **options).text()
    assert "does not match these cases; correct it: p0_a" in complaint(folders, patient_pattern="x")
    assert "--patient-pattern; '.+' takes every case" in complaint(folders, patient_pattern="x")


def test_partly_annotated_truths_are_named(folders, capsys):
    save(folders / "truth" / "case2.nii.gz", np.where(np.arange(20)[:, None] >= 10, np.uint8(3), label_map()))
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--labels", 1, "--ignore", 3) == 0
    assert json.loads((folders / "prediction" / "metrics.json").read_text())["partly_annotated"] == ["case2"]
    assert "WARNING: the truth of 1 of the 3 cases is only partly annotated" in capsys.readouterr().out
    assert "WARNING" not in evaluate_folders(folders / "truth", folders / "prediction", labels=[1], processes=1).text()


def test_json_alone_is_printed_on_request(folders, capsys):
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--json") == 0
    assert json.loads(capsys.readouterr().out)["made_by"] == "confkd evaluate"


def test_images_without_spacing_have_no_distances(tmp_path):
    for folder, shift in (("truth", 0), ("prediction", 2)):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(label_map(shift)[3]), str(tmp_path / folder / "a.png"))
    evaluation = evaluate_folders(tmp_path / "truth", tmp_path / "prediction", processes=1)
    assert evaluation.cases["a"]["1"]["Dice"] == pytest.approx(4 / 6) and math.isnan(evaluation.cases["a"]["1"]["HD95_mm"])
    assert evaluation.one_empty("1") == 0 and "1 images have no spacing" in evaluation.text()


def test_real_labels_through_the_installed_command(test_data, tmp_path):
    """Predictions: real labels eroded, one case moved by a voxel, in a process of its own, with two workers."""
    from scipy import ndimage
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[:4]
    for i, file in enumerate(files):
        image = sitk.ReadImage(str(file))
        labels = np.round(sitk.GetArrayFromImage(image)).astype(np.uint8)
        changed = np.roll(labels, 1, 2) if i == 0 else np.where(ndimage.binary_erosion(labels > 0), labels, 0).astype(np.uint8)
        for folder, values in (("truth", labels), ("prediction", changed)):
            out = sitk.GetImageFromArray(values)
            out.CopyInformation(image)
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(out, str(tmp_path / folder / file.name))
    subprocess.run([sys.executable, "-m", "nnunet_confkd.cli", "evaluate", "--truth", str(tmp_path / "truth"), "--prediction",
                    str(tmp_path / "prediction"), "--processes", "2"], check=True, timeout=300, env=os.environ)
    found = json.loads((tmp_path / "prediction" / "metrics.json").read_text())
    moved, *eroded = (found["cases"][file.name.removesuffix(".nii.gz")] for file in files)
    assert moved["1"]["HD95_mm"] == pytest.approx(1.0) and abs(moved["1"]["volume_difference_ml"]) < 1e-9
    for of in eroded:
        assert 0.4 < of["1"]["Dice"] < 0.95 and of["1"]["volume_difference_ml"] < 0 and 0.9 < of["1"]["HD95_mm"] < 4


# ---- bad input ------------------------------------------------------------------------------------------------------------

def complaint(folders, **options) -> str:
    with pytest.raises(InputError) as error:
        evaluate_folders(folders / "truth", folders / "prediction", **{"processes": 1, **options})
    return str(error.value)


def test_missing_files_are_all_named(folders):
    (folders / "truth" / "case0.nii.gz").unlink()
    (folders / "prediction" / "case1.nii.gz").unlink()
    text = complaint(folders)
    assert "holds no case0" in text and "holds no case1" in text
    assert "case0" in complaint(folders, subset=True) and "case1" not in complaint(folders, subset=True)
    save(folders / "truth" / "case0.nii.gz", label_map())
    assert list(evaluate_folders(folders / "truth", folders / "prediction", subset=True, processes=1).cases) == ["case0", "case2"]


@pytest.mark.parametrize("change, expected", [
    (lambda f: save(f, label_map()[:-1]), "size"), (lambda f: save(f, label_map(), spacing=(1, 1.5, 3)), "spacing"),
    (lambda f: save(f, label_map(), origin=(9, 0, 0)), "origin"), (lambda f: f.write_bytes(b"no image"), "cannot be read as an image"),
    (lambda f: f.write_bytes(f.read_bytes()[:-40]), "cannot be read as an image"),
    (lambda f: save(f, label_map() * np.float32(0.5)), "no labels, e.g. 0.5")])
def test_a_bad_prediction_is_named_with_every_other(folders, change, expected):
    for i in (0, 2):
        change(folders / "prediction" / f"case{i}.nii.gz")
    text = complaint(folders)
    assert expected in text and "case0.nii.gz" in text and "case2.nii.gz" in text and "case1" not in text
    assert not (folders / "prediction" / "metrics.json").exists()


def test_unknown_labels_of_either_folder_are_named(folders, dataset):
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1, 7)))
    save(folders / "truth" / "case1.nii.gz", label_map(classes=(1, 9)))
    text = complaint(folders, dataset=dataset({"background": 0, "a": 1, "b": 2}))
    assert "case0.nii.gz: holds labels that the data set does not have: 7" in text and "have: 9" in text
    # the ignore label is for the truth alone
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1, 3)))
    assert "have: 3" in complaint(folders, dataset=dataset({"background": 0, "a": 1, "b": 2, "ignore": 3}))


@pytest.mark.parametrize("labels, expected", [(("x",), "--labels x"), (("0",), "whole numbers from 1"), (("1,,2",), "1,,2"), (("-1",), "-1")])
def test_labels_that_are_none(folders, labels, expected):
    assert expected in complaint(folders, labels=labels)


def test_a_label_that_occurs_nowhere_is_refused(folders, capsys):
    assert run("--truth", folders / "truth", "--prediction", folders / "prediction", "--labels", 1, 5) == 1
    assert "holds 5; they hold 0, 1, 2" in capsys.readouterr().err


def test_folders_that_are_none_or_empty(folders, tmp_path):
    with pytest.raises(InputError, match="nowhere: there is no such folder"):
        evaluate_folders(tmp_path / "nowhere", folders / "prediction")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: holds no image"):
        evaluate_folders(folders / "truth", tmp_path / "empty")
    save(folders / "truth" / "case0.mha", label_map())
    assert "holds case0 twice" in complaint(folders)


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf, "1"])
def test_a_tolerance_that_is_none(folders, tolerance):
    assert "tolerance" in complaint(folders, tolerance_mm=tolerance)


def test_unequal_cases_are_not_compared(folders):
    (folders / "worse" / "case1.nii.gz").unlink()
    ours, theirs = (evaluate_folders(folders / "truth", folders / f, subset=True, processes=1) for f in ("prediction", "worse"))
    with pytest.raises(InputError, match="do not hold the same cases: case1"):
        compare(ours, theirs)


def test_foreign_files_stay_and_our_own_are_replaced(folders):
    evaluation = evaluate_folders(folders / "truth", folders / "prediction", processes=1)
    out = folders / "out"
    out.mkdir()
    (out / "summary.json").write_text("nnU-Net's")
    evaluate.write(evaluation, out)
    evaluate.write(evaluation, out)  # again: these are our own
    assert (out / "summary.json").read_text() == "nnU-Net's"
    (out / "metrics.json").write_text('{"precious": 1}')
    with pytest.raises(InputError, match="of something else"):
        evaluate.write(evaluation, out)
    assert (out / "metrics.json").read_text() == '{"precious": 1}' and not [f for f in os.listdir(out) if f.startswith(".")]


def test_an_interrupted_write_leaves_the_former_file(folders, monkeypatch):
    evaluation = evaluate_folders(folders / "truth", folders / "prediction", processes=1)
    out = folders / "out"
    evaluate.write(evaluation, out)
    before = (out / "metrics.json").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate.write(evaluation, out)
    assert (out / "metrics.json").read_bytes() == before and not [f for f in os.listdir(out) if f.startswith(".")]


def test_a_folder_that_cannot_be_written_to(folders):
    evaluation = evaluate_folders(folders / "truth", folders / "prediction", processes=1)
    (folders / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        evaluate.write(evaluation, folders / "file" / "out")
