"""`confkd evaluate`: folders against folders, what it writes, and what it refuses."""
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
from nnunet_confkd.evaluation.evaluate import Evaluation, compare, evaluate_folders
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


def ignored_below(row):
    """A ground truth whose rows from `row` on are not annotated (label 3)."""
    return np.where(np.arange(20)[:, None] >= row, np.uint8(3), label_map())


@pytest.fixture
def folders(tmp_path):
    """The ground truth, predictions that are shifted by 0, 1 and 2 rows, and others that are always shifted by 3."""
    for i in range(3):
        save(tmp_path / "truth" / f"case{i}.nii.gz", label_map())
        save(tmp_path / "prediction" / f"case{i}.nii.gz", label_map(shift=i))
        save(tmp_path / "worse" / f"case{i}.nii.gz", label_map(shift=3))
    return tmp_path


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Makes data set 27 with the given labels or regions."""
    def make(labels, **more):
        raw = tmp_path / "raw" / "Dataset027_Cubes"
        raw.mkdir(parents=True, exist_ok=True)
        (raw / "dataset.json").write_text(json.dumps({"labels": labels, **more}))
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
        return 27
    return make


def run(folders: Path, *options) -> int:
    """The command, on the folders `truth` and `prediction`."""
    given = ("--truth", folders / "truth", "--prediction", folders / "prediction", "--processes", 1, *options)
    return cli.main(["evaluate", *map(str, given)])


def measured(folders: Path, prediction="prediction", **options) -> Evaluation:
    return evaluate_folders(folders / "truth", folders / prediction, **{"processes": 1, **options})


def test_other_values_in_one_of_the_folders_are_told(folders, dataset):
    assert "same values" not in measured(folders).text()
    for case in range(3):
        save(folders / "exchanged" / f"case{case}.nii.gz", label_map(classes=(2, 1)))
        save(folders / "wide" / f"case{case}.nii.gz", label_map(classes=(1, 255)))
    text = measured(folders, "exchanged", dataset=dataset({"background": 0, "a": 1, "b": 2})).text()
    assert "the class 'a' of the ground truths mostly is the class 'b' of the predictions; do both" in text
    text = measured(folders, "wide").text()
    assert "WARNING: no ground truth has a voxel of the class '255'" in text
    assert "WARNING: no prediction has a voxel of the class '2'" in text
    regions = dataset({"background": 0, "whole": [1, 2], "b": 2}, regions_class_order=[1, 2])
    assert "same values" not in measured(folders, dataset=regions).text(), "a region holds another one's voxels"


def test_segments_are_read_by_their_names(folders, dataset, tmp_path):
    for case, (first, second) in enumerate([("A", "b"), ("b", "A"), ("A", "b")]):  # the order says nothing
        labels = label_map(shift=0, classes=(1, 2) if first == "A" else (2, 1))
        image = sitk.GetImageFromArray(labels)
        image.SetSpacing(SPACING)
        for number, name in enumerate((first, second)):
            for key, value in (("Name", name), ("LabelValue", str(number + 1)), ("Layer", "0")):
                image.SetMetaData(f"Segment{number}_{key}", value)
        (folders / "named").mkdir(exist_ok=True)
        sitk.WriteImage(image, str(folders / "named" / f"case{case}.seg.nrrd"))
        save(folders / "predicted" / f"case{case}.nii.gz", label_map())
    options = {"processes": 1, "dataset": dataset({"background": 0, "a": 1, "b": 2})}
    found = evaluate_folders(folders / "named", folders / "predicted", **options)
    assert all(of["Dice"] == 1 for measures in found.cases.values() for of in measures.values())
    with pytest.raises(InputError, match="case0.seg.nrrd: its segments have names.*with -d"):
        evaluate_folders(folders / "named", folders / "predicted", processes=1)
    with pytest.raises(InputError, match="holds the segments A, which the data set does not have; it has back"):
        evaluate_folders(folders / "named", folders / "predicted", processes=1,
                         dataset=dataset({"background": 0, "c": 1, "b": 2}))


def test_segments_may_be_cut_to_a_part_of_the_image(folders, dataset):
    """3D Slicer writes them so. Where the grids do not fit, the remedy keeps the names of the segments."""
    labels, options = label_map(), {"processes": 1, "dataset": dataset({"background": 0, "a": 1, "b": 2})}
    (folders / "named").mkdir()
    for origin, error in ((SPACING[1] * 2, None), (SPACING[1] * 2.5, "export the segments in 3D Slicer on the grid")):
        for case in range(3):
            image = sitk.GetImageFromArray(labels[:, 2:])
            image.SetSpacing(SPACING)
            image.SetOrigin((0, origin, 0))
            for number, name in enumerate("ab"):
                for key, value in (("Name", name), ("LabelValue", str(number + 1)), ("Layer", "0")):
                    image.SetMetaData(f"Segment{number}_{key}", value)
            sitk.WriteImage(image, str(folders / "named" / f"case{case}.seg.nrrd"))
        if error:
            with pytest.raises(InputError, match=error):
                evaluate_folders(folders / "named", folders / "prediction", **options)
        else:
            found = evaluate_folders(folders / "named", folders / "prediction", **options)
            assert found.cases == evaluate_folders(folders / "truth", folders / "prediction", **options).cases


def complaint(folders: Path, **options) -> str:
    with pytest.raises(InputError) as error:
        measured(folders, **options)
    return str(error.value)


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def test_the_command_writes_what_it_measures(folders, capsys):
    assert run(folders, "--labels", 1, 2, "--tolerance", 1.6) == 0
    screen = capsys.readouterr().out
    found = read_metrics(folders / "prediction")
    assert list(found["cases"]) == ["case0", "case1", "case2"] and list(found["cases"]["case1"]) == ["1", "2"]
    # blocks of 4 x 6 x 6 voxels, shifted by i rows of 1.5 mm: 6 - i of 6 rows overlap
    for i in range(3):
        for c in "12":
            measures = found["cases"][f"case{i}"][c]
            assert set(measures) == set(MEASURES)
            assert measures["Dice"] == pytest.approx((6 - i) / 6)
            assert measures["IoU"] == pytest.approx((6 - i) / (6 + i))
            assert measures["HD95_mm"] == pytest.approx(1.5 * i) and measures["volume_difference_ml"] == 0
            assert (measures["NSD"] == 1) == (i < 2)
    assert found["mean"]["1"]["Dice"] == found["mean"]["foreground"]["Dice"] == pytest.approx(5 / 6)
    assert found["statistics"]["1"]["Dice"]["n"] == 3 and found["statistics"]["2"]["Dice"]["sd"] == pytest.approx(1 / 6)
    assert found["tolerance_mm"] == 1.6 and "tolerance of 1.6 mm" in screen and "0.833 [0.667, 1.000]" in screen
    with open(folders / "prediction" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and rows[2]["case"] == "case1"
    assert float(rows[2]["Dice"]) == found["cases"]["case1"]["1"]["Dice"]


def test_the_summary_is_nnunets(folders):
    """nnU-Net's own evaluation of the same folders, read back by nnU-Net's own function, finds the same."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1,)))
    save(folders / "truth" / "case0.nii.gz", label_map(classes=(1,)))  # class 2 is in neither
    assert run(folders, "--labels", 1, 2, "1,2", "--output", folders / "out") == 0
    ours = load_summary_json(str(folders / "out" / "summary.json"))
    compute_metrics_on_folder(str(folders / "truth"), str(folders / "prediction"), str(folders / "theirs.json"),
                              SimpleITKIO(), ".nii.gz", [1, 2, (1, 2)], None, 1)
    theirs = load_summary_json(str(folders / "theirs.json"))
    assert set(ours) == set(theirs) and set(ours["mean"]) == set(theirs["mean"]) == {1, 2, (1, 2)}
    assert ours["foreground_mean"] == pytest.approx(theirs["foreground_mean"])
    for key in ours["mean"]:
        assert ours["mean"][key] == pytest.approx(theirs["mean"][key])
        for a, b in zip(ours["metric_per_case"], theirs["metric_per_case"], strict=True):
            assert a["metrics"][key] == pytest.approx(b["metrics"][key], nan_ok=True)


def test_without_given_labels_every_case_has_every_label_that_occurs_in_any(folders):
    """The files are read once, when it is not yet known which labels other cases hold."""
    save(folders / "truth" / "case0.nii.gz", label_map(classes=(1,)))
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1,)))
    save(folders / "prediction" / "case1.nii.gz", label_map(classes=(1, 7)))
    found, given = measured(folders), measured(folders, labels=[1, 2, 7])
    assert list(found.classes) == ["1", "2", "7"] and found.classes == given.classes
    assert found.table() == given.table() and found.counts == given.counts
    assert found.counts["case0"]["7"]["TN"] == 8 * 20 * 20 and found.as_dict() == given.as_dict()


def test_an_ignore_label_beside_a_data_set_is_that_of_the_data_set_or_taken_if_it_has_none(folders, dataset):
    save(folders / "truth" / "case2.nii.gz", ignored_below(10))
    labels = {"background": 0, "organ": 1, "tumour": 2}
    with_ignore = dataset(labels | {"ignore": 3})
    assert "--ignore 2: the ignore label of data set 27 is 3" in complaint(folders, dataset=with_ignore, ignore_label=2)
    expected = measured(folders, dataset=with_ignore).cases
    assert measured(folders, dataset=with_ignore, ignore_label=3).cases == expected
    assert measured(folders, dataset=dataset(labels), ignore_label=3).cases == expected


def test_regions_and_the_ignore_label_come_from_the_data_set(folders, dataset):
    save(folders / "truth" / "case2.nii.gz", ignored_below(10))
    regions = dataset({"background": 0, "whole": [1, 2], "part": 2, "ignore": 3})
    evaluation = measured(folders, dataset=regions)
    # the prediction's two rows from row 10 on are ignored: 4 of 6 rows are predicted, and nothing else counts
    assert evaluation.cases["case2"]["whole"]["Dice"] == pytest.approx(2 * 4 / 10)
    assert evaluation.ignore_label == 3 and list(evaluation.cases["case2"]) == ["whole", "part"]
    expected = measure_case(label_map(), label_map(1), {"whole": (1, 2), "part": (2,)}, SPACING[::-1])
    assert evaluation.cases["case1"] == expected
    # labels beside the data set: its ignore label, and only what was asked for
    some = measured(folders, dataset=regions, labels=[2])
    assert {case: measures["2"] for case, measures in some.cases.items()} == {
        case: measures["part"] for case, measures in evaluation.cases.items()}
    assert "data set 27 has no 4; it has 1, 2" in complaint(folders, dataset=regions, labels=[4])


@pytest.mark.parametrize("labels, unlisted", [(None, "b"), ((1, 2), "2")])
def test_a_class_counts_only_in_cases_that_are_annotated_for_it(folders, dataset, labels, unlisted):
    """case1 is annotated for a alone: what is predicted of b there may be right."""
    save(folders / "truth" / "case1.nii.gz", label_map(classes=(1, 0)))
    options = {"dataset": dataset({"background": 0, "a": 1, "b": 2}, annotated_classes={"case1": ["a"]}),
               "labels": labels}
    evaluation = measured(folders, **options)
    dice = {case: of[unlisted]["Dice"] for case, of in evaluation.cases.items()}
    assert dice["case0"] == 1 and math.isnan(dice["case1"]) and dice["case2"] > 0
    assert all(of["a" if labels is None else "1"]["Dice"] > 0 for of in evaluation.cases.values())
    assert evaluation.counts["case1"][unlisted]["n_pred"] == 0
    without = measured(folders, **options | {"dataset": dataset({"background": 0, "a": 1, "b": 2})})
    assert without.cases["case1"][unlisted]["Dice"] == 0


def test_given_labels_of_nested_regions_count_only_where_a_case_tells_them_apart(folders, dataset):
    """case1 is annotated for the whole alone, so nobody said where in it the core lies."""
    save(folders / "truth" / "case1.nii.gz", np.minimum(label_map(), 1))
    lists = {"annotated_classes": {"case1": ["whole"]}}
    number = dataset({"background": 0, "whole": [1, 2], "core": 2}, regions_class_order=[1, 2], **lists)
    by_name, given = measured(folders, dataset=number), measured(folders, dataset=number, labels=[2])
    for evaluation, name in ((by_name, "core"), (given, "2")):
        dice = {case: of[name]["Dice"] for case, of in evaluation.cases.items()}
        assert dice["case0"] == 1 and math.isnan(dice["case1"])
    assert by_name.cases["case1"]["whole"]["Dice"] > 0.5


def test_unknown_annotated_classes_are_named(folders, dataset):
    lists = {"case1": ["liver"]}
    text = complaint(folders, dataset=dataset({"background": 0, "a": 1, "b": 2}, annotated_classes=lists))
    assert '"annotated_classes" names liver' in text and "dataset.json" in text


def test_labels_that_occur_are_measured_where_none_are_named(folders):
    evaluation = measured(folders)
    assert list(evaluation.classes) == ["1", "2"]
    assert evaluation.cases["case1"] == measure_case(label_map(), label_map(1), {"1": (1,), "2": (2,)}, SPACING[::-1])


def test_empty_classes_are_left_out_and_counted(folders, capsys):
    save(folders / "truth" / "case0.nii.gz", label_map(classes=(1,)))
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1,)))  # class 2 is in neither
    save(folders / "prediction" / "case1.nii.gz", label_map(classes=(1,)))  # class 2 is in the ground truth only
    assert run(folders, "--labels", 1, 2) == 0
    found = read_metrics(folders / "prediction")
    assert "NaN" not in (folders / "prediction" / "metrics.json").read_text()
    assert set(found["cases"]["case0"]["2"].values()) == {None}
    missed = dict(found["cases"]["case1"]["2"])
    assert missed.pop("volume_difference_ml") < 0
    assert missed == {"Dice": 0, "IoU": 0, "NSD": 0, "HD95_mm": None, "ASSD_mm": None}
    assert {m: found["statistics"]["2"][m]["n"] for m in ("Dice", "HD95_mm")} == {"Dice": 2, "HD95_mm": 1}
    assert found["one_empty"] == {"1": 0, "2": 1} and found["mean"]["2"]["Dice"] == pytest.approx((0 + 4 / 6) / 2)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("2 "))
    assert line.split()[1] == "2" and line.split()[-1] == "1"


def test_two_folders_are_compared_case_by_case(folders, capsys):
    assert run(folders, "--against", folders / "worse", "--labels", 1, 2) == 0
    found = read_metrics(folders / "prediction")["comparison"]["1"]["Dice"]
    # Dice 1, 5/6, 4/6 against 3/6: differences of one sign, p = 2 / 2^3; 14 of the 18 rows have a p of 0.25, or none
    assert found["mean"] == pytest.approx(1 / 3) and found["p"] == pytest.approx(0.25) and found["p_holm"] == 1
    assert found["ci_low"] == pytest.approx(1 / 6) and found["ci_high"] == pytest.approx(1 / 2)
    assert "+0.333 [+0.167, +0.500]" in capsys.readouterr().out


@pytest.mark.parametrize("first, second", [("prediction", "worse"), ("worse", "prediction")])
def test_a_label_of_one_of_two_folders_is_measured_in_both(folders, capsys, first, second):
    """Neither the ground truth nor the other folder has it, and no option names it."""
    save(folders / "worse" / "case0.nii.gz", label_map(classes=(1, 7)))
    assert run(folders, "--prediction", folders / first, "--against", folders / second) == 0
    found = read_metrics(folders / first)
    assert set(found["comparison"]) - {"foreground"} == {"1", "2", "7"} == set(found["labels"])
    assert found["comparison"]["7"]["Dice"]["n"] == 0, "it is absent from the ground truth and one of the folders"
    with pytest.raises(InputError, match="not measured for the same classes: 7"):
        compare(measured(folders, "prediction", labels=[1, 2]), measured(folders, "worse", labels=[1, 2, 7]))


def test_the_foreground_is_compared_class_by_class(folders):
    """Ours misses class 2, which is the difficult one, and its volumes are wrong in both directions."""
    truth, ours, theirs = label_map(), label_map(1, classes=(1, 0)), label_map(1)
    theirs[2:6, 8:19, 10:12] = 2
    for i in range(3):
        save(folders / "truth" / f"case{i}.nii.gz", truth)
        save(folders / "prediction" / f"case{i}.nii.gz", ours)
        save(folders / "worse" / f"case{i}.nii.gz", theirs)
    found = compare(measured(folders), measured(folders, "worse"))
    for measure in ("HD95_mm", "ASSD_mm"):
        assert found["foreground"][measure]["mean"] == found["1"][measure]["mean"] == 0
        assert math.isnan(found["2"][measure]["mean"])
    volumes = [found[name]["volume_difference_ml"]["mean"] for name in ("1", "2", "foreground")]
    assert volumes[2] == pytest.approx(np.mean(volumes[:2])) and volumes[1] > 0


def test_volumes_that_are_wrong_in_both_directions_do_not_cancel(folders):
    for i in range(3):
        one = label_map()
        one[2:6, 4:6, 2:8], one[2:6, 10:12, 10:16] = 0, 2  # a third of class 1 less, and of class 2 more
        save(folders / "prediction" / f"case{i}.nii.gz", one)
        save(folders / "worse" / f"case{i}.nii.gz", label_map())
    found = compare(measured(folders), measured(folders, "worse"))
    assert found["foreground"]["volume_difference_ml"]["mean"] > 0


def two_cases_of_each_patient(folders):
    """Add the same cases again as a second one of each patient: p0_a, p0_b, p1_a, ..."""
    for folder in ("truth", "prediction", "worse"):
        for i in range(3):
            file = folders / folder / f"case{i}.nii.gz"
            (folders / folder / f"p{i}_b.nii.gz").write_bytes(file.read_bytes())
            file.rename(folders / folder / f"p{i}_a.nii.gz")


def test_intervals_and_tests_are_by_patient(folders, capsys):
    options = ("--against", folders / "worse", "--labels", 1, 2)
    assert run(folders, *options, "--output", folders / "once") == 0
    two_cases_of_each_patient(folders)
    capsys.readouterr()
    assert run(folders, *options, "--output", folders / "twice", "--patient-pattern", r"(p\d)_") == 0
    screen = capsys.readouterr().out
    once, twice = (read_metrics(folders / name) for name in ("once", "twice"))
    for key in ("statistics", "comparison"):
        first, second = once[key]["1"]["Dice"], twice[key]["1"]["Dice"]
        assert second | {"sd": None} == pytest.approx(first | {"n": 6, "sd": None}) and second["patients"] == 3
    assert screen.count("6 cases of 3 patients") == 2
    assert twice["patients"] == {f"p{i}_{c}": f"p{i}" for i in range(3) for c in "ab"}


def test_the_patient_pattern_of_the_data_set_is_the_default(folders, dataset):
    two_cases_of_each_patient(folders)
    with_pattern = dataset({"background": 0, "a": 1, "b": 2}, patient_pattern=r"(p\d)_")
    assert measured(folders, dataset=with_pattern).cases_text() == "6 cases of 3 patients"
    all_patients = measured(folders, dataset=with_pattern, patient_pattern=".+")
    assert all_patients.cases_text() == "6 cases, each taken as one patient"
    text = complaint(folders, patient_pattern="x")
    assert "'x' does not match" in text and "p0_a" in text and "--patient-pattern" in text


def test_partially_annotated_cases_are_named(folders, capsys):
    save(folders / "truth" / "case2.nii.gz", ignored_below(10))
    assert run(folders, "--labels", 1, "--ignore", 3) == 0
    assert read_metrics(folders / "prediction")["partly_annotated"] == ["case2"]
    assert "WARNING: 1 of the 3 cases are only partially annotated" in capsys.readouterr().out
    assert "WARNING" not in measured(folders, labels=[1]).text()


def test_json_alone_is_printed_on_request(folders, capsys):
    assert run(folders, "--json") == 0
    assert json.loads(capsys.readouterr().out)["made_by"] == "confkd evaluate"


def test_images_without_spacing_have_no_distances(tmp_path):
    for folder, shift in (("truth", 0), ("prediction", 2)):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(label_map(shift)[3]), str(tmp_path / folder / "a.png"))
    evaluation = measured(tmp_path)
    assert evaluation.cases["a"]["1"]["Dice"] == pytest.approx(4 / 6)
    assert math.isnan(evaluation.cases["a"]["1"]["HD95_mm"])
    assert evaluation.one_empty("1") == 0 and "1 images have no spacing" in evaluation.text()


def test_a_missed_class_of_a_picture_is_counted_and_a_json_of_another_program_is_no_spacing(tmp_path):
    for folder, labels in (("truth", label_map()[3]), ("prediction", 0 * label_map()[3])):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(labels), str(tmp_path / folder / "a.png"))
    (tmp_path / "truth" / "a.json").write_text('{"shapes": []}')  # as labelme writes it
    evaluation = measured(tmp_path)
    assert evaluation.no_spacing == ["a"] and math.isnan(evaluation.cases["a"]["1"]["volume_difference_ml"])
    assert evaluation.one_empty("1") == 1


def test_of_tiff_the_spacing_of_one_of_the_files_suffices(tmp_path):
    from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
    for folder, shift in (("truth", 0), ("prediction", 1)):
        (tmp_path / folder).mkdir()
        Tiff3DIO().write_seg(label_map(shift), str(tmp_path / folder / "a.tif"), {"spacing": SPACING[::-1]})
    both = measured(tmp_path)
    (tmp_path / "truth" / "a.json").unlink()  # nnU-Net copies the labels to gt_segmentations without it
    assert measured(tmp_path).cases == both.cases and both.cases["a"]["1"]["HD95_mm"] == 1.5
    (tmp_path / "prediction" / "a.json").unlink()
    assert measured(tmp_path).no_spacing == ["a"]


def test_of_a_two_dimensional_tiff_there_is_no_spacing(tmp_path):
    """nnU-Net reads none, whatever lies beside it."""
    for folder, shift in (("truth", 0), ("prediction", 5)):
        (tmp_path / folder).mkdir()
        sitk.WriteImage(sitk.GetImageFromArray(label_map(shift)[3]), str(tmp_path / folder / "a.tif"))
        (tmp_path / folder / "a.json").write_text('{"spacing": [999, 0.1, 0.1]}')
    evaluation = measured(tmp_path)
    assert evaluation.no_spacing == ["a"] and math.isnan(evaluation.cases["a"]["1"]["HD95_mm"])


@pytest.mark.parametrize("shape", [(20, 20), (1, 20, 20)])
def test_a_slice_with_the_thickness_of_nnunet_is_two_dimensional(tmp_path, shape):
    for folder, rows in (("truth", 5), ("prediction", 9)):
        labels = np.zeros((20, 20), np.uint8)
        labels[2:2 + rows, 2:12] = 1
        save(tmp_path / folder / "a.nii.gz", labels.reshape(shape), spacing=(1.0, 1.0, 999.0))
    assert measured(tmp_path).cases["a"]["1"]["volume_difference_ml"] == pytest.approx(0.04)


@pytest.fixture
def real(test_data, tmp_path):
    """Real labels as the ground truth. Predictions: the first moved by a voxel, the others eroded."""
    from scipy import ndimage
    for i, file in enumerate(sorted((test_data / "hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[:3]):
        image = sitk.ReadImage(str(file))
        labels = np.round(sitk.GetArrayFromImage(image)).astype(np.uint8)
        eroded = np.where(ndimage.binary_erosion(labels > 0), labels, 0).astype(np.uint8)
        for folder, values in (("truth", labels), ("prediction", eroded if i else np.roll(labels, 1, 2))):
            out = sitk.GetImageFromArray(values)
            out.CopyInformation(image)
            (tmp_path / folder).mkdir(exist_ok=True)
            sitk.WriteImage(out, str(tmp_path / folder / file.name))
    return tmp_path


def check_real(folder):
    moved, *eroded = read_metrics(folder / "prediction")["cases"].values()
    assert moved["1"]["HD95_mm"] == pytest.approx(1.0) and abs(moved["1"]["volume_difference_ml"]) < 1e-9
    for measures in eroded:
        assert 0.4 < measures["1"]["Dice"] < 0.95 and measures["1"]["volume_difference_ml"] < 0
        assert 0.9 < measures["1"]["HD95_mm"] < 4


def test_real_labels(real):
    assert run(real) == 0
    check_real(real)


@pytest.mark.slow  # a fresh process that starts two workers, each of which imports the package
def test_real_labels_through_the_installed_command(real):
    subprocess.run([sys.executable, "-m", "nnunet_confkd.cli", "evaluate", "--truth", real / "truth",
                    "--prediction", real / "prediction", "--processes", "2"], check=True, timeout=300, env=os.environ)
    check_real(real)


# ---- bad input ------------------------------------------------------------------------------------------------------

def test_missing_files_are_all_named(folders):
    (folders / "truth" / "case0.nii.gz").unlink()
    (folders / "prediction" / "case1.nii.gz").unlink()
    text = complaint(folders)
    assert "holds no case0" in text and "holds no case1" in text
    assert "case0" in complaint(folders, subset=True) and "case1" not in complaint(folders, subset=True)
    save(folders / "truth" / "case0.nii.gz", label_map())
    assert list(measured(folders, subset=True).cases) == ["case0", "case2"]


def test_subset_is_advised_only_where_it_helps(folders):
    (folders / "prediction" / "case1.nii.gz").unlink()
    assert "(--subset measures only what is predicted)" in complaint(folders)
    (folders / "truth" / "case0.nii.gz").unlink()
    text = complaint(folders)
    assert "--subset" not in text and "needs the name of its ground truth, which may have a suffix such as _gt" in text


def test_the_ground_truth_may_have_a_suffix_of_annotation_tools(folders):
    expected = measured(folders).cases
    for i, name in enumerate(("case0_gt", "case1-mask", "case2.seg")):
        (folders / "truth" / f"case{i}.nii.gz").rename(folders / "truth" / f"{name}.nii.gz")
    assert measured(folders).cases == expected
    save(folders / "truth" / "case0_seg.nii.gz", label_map())
    assert "case0.nii.gz: two ground truths fit it" in complaint(folders, subset=True)
    (folders / "truth" / "case0_seg.nii.gz").rename(folders / "truth" / "case0.nii.gz")  # its own name is nearer
    assert measured(folders, subset=True).files["case0"][0].name == "case0.nii.gz"
    assert "holds no case0_gt" in complaint(folders)


@pytest.mark.parametrize("change, expected", [
    (lambda f: save(f, label_map()[:-1]), "size"),
    (lambda f: save(f, label_map(), spacing=(1, 1.5, 3)), "spacing"),
    (lambda f: save(f, label_map(), origin=(9, 0, 0)), "origin"),
    (lambda f: f.write_bytes(b"no image"), "cannot be read as an image"),
    (lambda f: f.write_bytes(f.read_bytes()[:-40]), "cannot be read as an image"),
    (lambda f: save(f, label_map() * np.float32(0.5)), "no labels, e.g. 0.5")])
def test_a_bad_prediction_is_named_with_every_other(folders, change, expected):
    for i in (0, 2):
        change(folders / "prediction" / f"case{i}.nii.gz")
    text = complaint(folders)
    assert expected in text and "case0.nii.gz" in text and "case2.nii.gz" in text and "case1" not in text
    assert not (folders / "prediction" / "metrics.json").exists()


def test_a_truth_of_another_orientation_is_measured_once_it_is_resampled_as_the_error_says(folders):
    for i in range(3):
        file = folders / "truth" / f"case{i}.nii.gz"
        prediction = sitk.ReadImage(str(folders / "prediction" / file.name))
        sitk.WriteImage(sitk.DICOMOrient(prediction, "RPI"), str(file))
    text = complaint(folders)
    assert "direction" in text and (advice := "SimpleITK.Resample(truth, prediction, SimpleITK.Transform(), "
                                              "SimpleITK.sitkNearestNeighbor)") in text
    for i in range(3):
        file = folders / "truth" / f"case{i}.nii.gz"
        images = {"truth": sitk.ReadImage(str(file)), "SimpleITK": sitk,
                  "prediction": sitk.ReadImage(str(folders / "prediction" / file.name))}
        sitk.WriteImage(eval(advice, images), str(file))
    assert all(of["Dice"] == 1 for case in measured(folders).cases.values() for of in case.values())


def test_unknown_labels_of_either_folder_are_named(folders, dataset):
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1, 7)))
    save(folders / "truth" / "case1.nii.gz", label_map(classes=(1, 9)))
    text = complaint(folders, dataset=dataset({"background": 0, "a": 1, "b": 2}))
    assert "case0.nii.gz: holds labels that the data set does not have: 7" in text and "have: 9" in text
    # the ignore label is for the ground truth alone
    save(folders / "prediction" / "case0.nii.gz", label_map(classes=(1, 3)))
    assert "have: 3" in complaint(folders, dataset=dataset({"background": 0, "a": 1, "b": 2, "ignore": 3}))


def test_an_image_in_the_place_of_a_label_is_told(folders, dataset):
    grey = np.arange(1200, dtype=np.int16).reshape(30, 40) % 300
    save(folders / "truth" / "case0.nii.gz", np.resize(grey, label_map().shape))
    text = complaint(folders)
    assert "case0.nii.gz: holds 300 values. It looks like an image: give the folder of the labels" in text
    text = complaint(folders, dataset=dataset({"background": 0, "a": 1, "b": 2}))
    assert "does not have: 3, 4, 5, 6, 7 and 292 more. It looks like an image" in text


@pytest.mark.parametrize("label", ["x", "0", "1,,2", "-1"])
def test_labels_that_are_none(folders, label):
    assert f"--labels {label}: give whole numbers from 1" in complaint(folders, labels=[label])


def test_a_label_that_occurs_nowhere_is_refused(folders, capsys):
    assert run(folders, "--labels", 1, 5) == 1
    assert "holds 5; they hold 0, 1, 2" in capsys.readouterr().err


def test_folders_that_are_none_or_empty(folders, tmp_path):
    assert "nowhere: there is no such folder" in complaint(folders, prediction="nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no image" in complaint(folders, prediction="empty")
    save(folders / "truth" / "case0.mha", label_map())
    assert "holds case0 twice" in complaint(folders)


@pytest.mark.parametrize("tolerance", [-1, math.nan, math.inf, "1"])
def test_a_tolerance_that_is_none(folders, tolerance):
    assert "tolerance" in complaint(folders, tolerance_mm=tolerance)


def test_unequal_cases_are_not_compared(folders):
    (folders / "worse" / "case1.nii.gz").unlink()
    with pytest.raises(InputError, match="do not hold the same cases: case1"):
        compare(measured(folders), measured(folders, "worse", subset=True))


def test_foreign_files_stay_and_our_own_are_replaced(folders):
    evaluation, out = measured(folders), folders / "out"
    out.mkdir()
    (out / "summary.json").write_text("nnU-Net's")
    for _ in range(2):  # the second time, the files are our own
        assert [file.name for file in evaluate.write(evaluation, out)] == ["metrics.json", "metrics.csv"]
    assert (out / "summary.json").read_text() == "nnU-Net's"
    (out / "metrics.json").write_text('{"precious": 1}')
    with pytest.raises(InputError, match="has not written"):
        evaluate.write(evaluation, out)
    assert (out / "metrics.json").read_text() == '{"precious": 1}'


def test_the_summary_follows_predictions_that_have_changed(folders, capsys):
    """As long as it is that of an earlier evaluation, and not of nnU-Net."""
    def means():
        assert run(folders, "--labels", 1, 2) == 0
        summary = json.loads((folders / "prediction" / "summary.json").read_text())
        return summary["mean"]["1"]["Dice"], read_metrics(folders / "prediction")["mean"]["1"]["Dice"]

    first = means()
    save(folders / "prediction" / "case0.nii.gz", label_map(shift=3))
    second = means()
    assert first[0] == pytest.approx(first[1]) != second[0] and second[0] == pytest.approx(second[1])
    assert "kept: " not in capsys.readouterr().out
    summary = folders / "prediction" / "summary.json"
    written = summary.read_text()
    summary.write_text(json.dumps({"mean": {"1": {"Dice": 0.5}}}))
    assert means() == (0.5, second[1]), "nnU-Net has written it since"
    assert f"kept: {summary}" in capsys.readouterr().out
    summary.write_text(written)
    (folders / "prediction" / "metrics.json").unlink()
    (folders / "prediction" / "metrics.csv").unlink()
    save(folders / "prediction" / "case0.nii.gz", label_map())
    for _ in range(2):
        assert means() == pytest.approx((second[0], first[1])), "nobody knows whose it is"
        assert f"kept: {folders / 'prediction' / 'summary.json'}, which confkd evaluate has not written" in (
            capsys.readouterr().out)
