from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunet_confkd.dataset_conversion import acdc
from skimage import io

from nnunet_confkd import cli
from nnunet_confkd.data.check import check_dataset
from nnunet_confkd.data.check_cases import CaseFiles, examine_case
from nnunet_confkd.data.check_report import Report, percent
from nnunet_confkd.data.patients import split_full_cases
from nnunet_confkd.errors import InputError

KINDS = {"p1_a": "full", "p1_b": "full", "p2_a": "full", "p2_b": "full", "p3_a": "partial", "p3_b": "partial",
         "p4_a": "unlabelled", "p5_a": "full"}
LABELS = {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}
REGIONS = {"background": 0, "whole": [1, 2], "tumour": 2, "ignore": 3}
FOLD = {"train": ["p1_a", "p1_b", "p3_a", "p3_b", "p4_a"], "val": ["p2_a", "p2_b", "p5_a"]}
SHAPE = (4, 6, 5)
NOWHERE = object()
# warnings that tests of other things meet
NO_SPLIT = r"splits_final.json: there is no split"
SINGLE = r"^fold \d.*: the validation is on a single patient, so the pseudo-Dice and the choice of .* are mostly noise"


class Data:
    """Data set 7: two channels, five full, two partial, one unlabelled case, a split by patients; nothing is wrong."""

    def __init__(self, folder, ending=".nii.gz", shape=SHAPE):
        self.folder, self.ending, self.shape = folder / "raw" / "Dataset007_Toy", ending, shape
        self.split_file = folder / "preprocessed" / "Dataset007_Toy" / "splits_final.json"
        self.split_file.parent.mkdir(parents=True)
        self.rng, self.labels = np.random.default_rng(0), {}
        for case, kind in KINDS.items():
            for channel in range(2):
                write(self.image(case, channel), self.rng.integers(0, 200, shape).astype(np.uint8))
            label = self.rng.integers(0, 3, shape).astype(np.uint8)
            if kind != "full":
                label[self.rng.random(shape) < (0.7 if kind == "partial" else 2)] = 3
            self.relabel(case, label)
        (self.folder / "dataset.json").write_text("{}")
        self.describe(channel_names={"0": "T1", "1": "T2"}, labels=LABELS, numTraining=8, file_ending=ending,
                      patient_pattern=r"(p\d+)_")
        self.split([FOLD])

    def image(self, case, channel=0, split="Tr"):
        return self.folder / f"images{split}" / f"{case}_{channel:04d}{self.ending}"

    def label(self, case, split="Tr"):
        return self.folder / f"labels{split}" / f"{case}{self.ending}"

    def relabel(self, case, label):
        self.labels[case] = label
        write(self.label(case), label)

    def describe(self, **entries):
        file = self.folder / "dataset.json"
        described = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({key: value for key, value in described.items() if value is not NOWHERE}))

    def split(self, folds):
        self.split_file.write_text(json.dumps(folds))

    def remove(self, *cases):
        for case in cases:
            for file in (self.image(case), self.image(case, 1), self.label(case)):
                file.unlink()
        left = [file.name[:-len(self.ending)] for file in (self.folder / "labelsTr").iterdir()]
        self.describe(numTraining=len(left))
        fold = {side: [case for case in FOLD[side] if case in left] for side in FOLD}
        self.split([fold])

    def add_test(self, case, label=None):
        for channel in range(2):
            write(self.image(case, channel, "Ts"), self.rng.random(self.shape).astype(np.float32))
        if label is not None:
            write(self.label(case, "Ts"), label)


def write(
    file, array, spacing=(1.5, 2.0, 3.0), origin=(-3.0, 10.0, 2.0), direction=(0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1)
):
    """An image of any format; spacing and so on in x, y, z, for those that carry it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".png":
        io.imsave(file, array, check_contrast=False)
    elif file.suffix == ".tif":
        tifffile.imwrite(file, array)
    else:
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(spacing[:array.ndim])
        image.SetOrigin(origin[:array.ndim])
        image.SetDirection(direction if array.ndim == 3 else np.eye(array.ndim).ravel())
        sitk.WriteImage(image, str(file), True)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.delenv("nnUNet_results", raising=False)
    return tmp_path


@pytest.fixture
def data(folders):
    return Data(folders)


@pytest.fixture
def check(capsys):
    """Run `confkd check --json`: exactly these errors and warnings (regular expressions, in this order), and the exit
    status. Returns the report."""
    def run(errors=(), warnings=(), *argv):
        status = cli.main(["check", "-d", "7", "--processes", "1", "--json", *argv])
        report = json.loads(capsys.readouterr().out)
        for found, wanted in ((report["errors"], errors), (report["warnings"], warnings)):
            assert len(found) == len(wanted), found
            for text, pattern in zip(found, wanted):
                assert re.search(pattern, text), f"{pattern}\n{text}"
        assert status == (1 if errors else 0)
        assert report["ok"] == (not errors)
        return report
    return run


def counted(label):
    """{class: voxels} of the toy labels, another way than by the code."""
    histogram = np.bincount(label.ravel(), minlength=4).tolist()
    return dict(zip(("background", "organ", "tumour"), histogram))


# ---- data sets with which nothing is wrong --------------------------------------------------------------------------

def test_a_correct_data_set_has_the_right_kinds_and_counts_and_nothing_to_complain_of(data, check):
    report = check()

    voxels = 4 * 6 * 5
    assert {case: found["kind"] for case, found in report["cases"].items()} == KINDS
    for case, label in data.labels.items():
        counts = counted(label)
        assert report["cases"][case] == {
            "kind": KINDS[case], "declared": None, "patient": case[:2], "size": voxels, "hidden": 0, "classes": None,
            "annotated": sum(counts.values()), "annotated_share": pytest.approx((label != 3).mean()), "voxels": counts,
            "share": pytest.approx({name: (label == LABELS[name]).mean() for name in counts})}
    # five full cases; two partial ones
    assert report["totals"]["full"] | {"voxels": 0, "share": 0} == {
        "cases": 5, "size": 5 * voxels, "annotated": 5 * voxels, "annotated_share": 1.0, "voxels": 0, "share": 0}
    both = np.stack([data.labels["p3_a"], data.labels["p3_b"]])
    assert report["totals"]["partial"]["voxels"] == counted(both)
    assert report["totals"]["partial"]["share"]["tumour"] == pytest.approx((both == 2).mean())
    assert report["totals"]["unlabelled"]["annotated"] == 0 and report["totals"]["unlabelled"]["cases"] == 1
    every = np.stack(list(data.labels.values()))
    assert report["totals"]["all"]["cases"] == 8 and report["totals"]["all"]["voxels"] == counted(every)
    assert report["totals"]["all"]["annotated_share"] == pytest.approx((every != 3).mean())
    assert report["split"] == {"file": str(data.split_file), "unused": [], "folds": [
        {"train": {"full": 2, "partial": 2, "unlabelled": 1}, "val": {"full": 3, "partial": 0, "unlabelled": 0}}]}
    assert (report["dataset"], report["labels"], report["channels"]) == ("Dataset007_Toy", LABELS, ["T1", "T2"])


def test_nnunet_agrees_that_nothing_is_wrong(data, require_integrity):
    require_integrity(data.folder)


def test_nothing_is_written(data, check):
    def files():
        everything = data.folder.parent.parent.rglob("*")
        return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in everything if file.is_file()}

    before = files()
    check()
    assert files() == before


def test_only_json_goes_to_stdout_and_any_number_of_processes_gives_the_same(data):
    run = subprocess.run([sys.executable, "-m", "nnunet_confkd.cli", "check", "-d", "7", "--json", "--processes", "2"],
                         capture_output=True, text=True, env=os.environ, timeout=120)
    assert run.returncode == 0, run.stderr
    report = check_dataset("Dataset007_Toy", processes=1)
    assert json.loads(run.stdout) == report.as_dict()
    assert report.as_dict()["ok"] is True


@pytest.mark.parametrize(
    "ending, shape",
    [(".nrrd", SHAPE), (".mha", SHAPE), (".nii", SHAPE), (".nii.gz", (6, 5)), (".png", (6, 5)), (".tif", (6, 6, 5))],
)  # nnU-Net takes 3 or 4 slices for colours
def test_other_formats_and_flat_images_are_read(folders, check, ending, shape):
    data = Data(folders, ending, shape)
    report = check()
    assert {case: found["voxels"] for case, found in report["cases"].items()} == {
        case: counted(label) for case, label in data.labels.items()}


def test_the_spacing_of_a_tiff_image_and_of_its_label_stand_in_two_files(folders, check):
    data = Data(folders, ".tif", (6, 6, 5))
    for split in ("imagesTr", "labelsTr"):
        (data.folder / split / "p1_a.json").write_text('{"spacing": [5, 1, 1]}')
    check()
    (data.folder / "labelsTr" / "p1_a.json").unlink()
    check(
        [r"labelsTr/p1_a.tif: is on another grid than .*p1_a_0000.tif: spacing \(1.0, 1.0, 1.0\) and \(1.0, 1.0, 5.0\)"]
    )


def test_colours_are_channels(folders, check):
    data = Data(folders, ".png", (6, 5))
    for case in KINDS:
        data.image(case, 1).unlink()
        data.image(case).unlink()
        write(data.image(case), data.rng.integers(0, 200, (6, 5, 3)).astype(np.uint8))
    data.describe(channel_names={"0": "R", "1": "G", "2": "B"})
    assert check()["totals"]["all"]["size"] == 8 * 6 * 5


def test_labels_that_are_whole_numbers_of_a_float_type_are_right(data, check):
    write(data.label("p1_a"), data.labels["p1_a"].astype(np.float32))
    assert check()["cases"]["p1_a"]["voxels"] == counted(data.labels["p1_a"])


def test_regions_are_counted_by_name(data, check):
    data.describe(labels=REGIONS, regions_class_order=[1, 2])
    report = check()
    for case, label in data.labels.items():
        assert report["cases"][case]["voxels"] == {
            "background": (label == 0).sum(), "whole": np.isin(label, (1, 2)).sum(), "tumour": (label == 2).sum()}
        assert report["cases"][case]["annotated"] == (label != 3).sum()  # regions overlap, voxels count once


def test_files_may_be_listed_in_dataset_json(data, check, monkeypatch):
    elsewhere = data.folder.parent.parent / "elsewhere"
    (data.folder / "imagesTr").rename(elsewhere)
    monkeypatch.setenv("ELSEWHERE", str(elsewhere))
    data.describe(dataset={case: {"images": [f"$ELSEWHERE/{data.image(case, channel).name}" for channel in range(2)],
                                  "label": f"labelsTr/{case}.nii.gz"} for case in KINDS})
    report = check()
    assert {case: found["voxels"] for case, found in report["cases"].items()} == {
        case: counted(label) for case, label in data.labels.items()}

    planned = data.folder.parent.parent / "preprocessed" / data.folder.name
    planned.mkdir(parents=True, exist_ok=True)
    shutil.copy(data.folder / "dataset.json", planned)
    check()  # the copy that planning makes is no other description

    (elsewhere / "p1_a_0001.nii.gz").unlink()
    data.label("p4_a").unlink()
    check([r"elsewhere/p1_a_0001.nii.gz: there is no such file", r"labelsTr/p4_a.nii.gz: there is no such file"])


def test_a_table_that_says_what_the_labels_say_or_less_is_right(data, check):
    # a full label may count as partial, a partial one as none
    data.describe(supervision=KINDS | {"p1_b": "partial", "p3_b": "unlabelled"})
    report = check()
    assert report["cases"]["p1_b"]["kind"] == report["cases"]["p1_b"]["declared"] == "partial"
    assert report["cases"]["p1_b"]["voxels"] == counted(data.labels["p1_b"])
    hidden = report["cases"]["p3_b"]
    assert (hidden["kind"], hidden["annotated"], hidden["hidden"]) == (
        "unlabelled",
        0,
        (data.labels["p3_b"] != 3).sum(),
    )
    assert set(hidden["voxels"].values()) == {0}
    assert report["totals"]["unlabelled"]["annotated"] == 0
    assert "1 case declared unlabelled: training does not see the annotated voxels" in check_dataset(7, 1).text()


def test_an_ignore_label_that_no_case_uses_is_allowed(data, check):
    data.remove("p3_a", "p3_b", "p4_a")
    check()
    assert "no case uses the ignore label: every voxel is annotated" in check_dataset(7, 1).text()


def test_it_says_that_unlabelled_images_are_left_out_if_nothing_is_partially_annotated(data):
    def text():
        return " ".join(check_dataset(7, 1).text().split())

    kinds = {case: found["kind"] for case, found in check_dataset(7, 1).cases.items()}
    assert "partial" in kinds.values() and "the network labels them" not in text()
    data.describe(supervision=kinds | {case: "unlabelled" for case, kind in kinds.items() if kind == "partial"})
    assert "by default the network labels them after a part" in text() and "set \"complete_at\": 0 in" in text()


def test_other_cases_use_the_ignore_label_and_then_nothing_is_said(data):
    assert "no case uses the ignore label" not in check_dataset(7, 1).text()


# ---- nothing can be examined ----------------------------------------------------------------------------------------

def hide(data, *cases):
    """Let cases be annotated for their first foreground class alone."""
    first, second = [name for name in LABELS if name not in ("background", "ignore")]
    for case in cases:
        data.relabel(case, np.where(data.labels[case] == LABELS[second], 0, data.labels[case]).astype(np.uint8))
    data.describe(annotated_classes={case: [first] for case in cases})
    return second


def test_cases_that_are_not_annotated_for_all_classes_are_partial(data, check):
    hide(data, "p1_a")
    assert check()["cases"]["p1_a"]["kind"] == "partial"


def test_a_value_of_a_class_that_a_case_is_not_annotated_for_is_an_error(data, check):
    second = hide(data, "p1_a")
    data.relabel("p1_a", np.full(SHAPE, LABELS[second], np.uint8))
    check([rf"dataset.json, .annotated_classes.:\n  p1_a: its label has \d+ voxels of value 2 \({second}\)"])


def test_a_table_counts_the_cases_of_each_class(data, capsys):
    hide(data, "p1_a", "p1_b")
    report = check_dataset(7, processes=1).as_dict()
    assert not any("annotated for it" in text for text in report["warnings"]), "five of seven are enough"
    first, second = report["classes"].values()
    labelled = [case for case, found in report["cases"].items() if found["kind"] != "unlabelled"]
    assert first["annotated"] == len(labelled) == second["annotated"] + 2
    names = list(report["classes"])
    present = [sum(found["voxels"][name] > 0 for found in report["cases"].values()) for name in names]
    assert [first["present"], second["present"]] == present
    assert report["cases"]["p1_a"]["classes"] == names[:1] and report["cases"]["p2_a"]["classes"] is None
    cli.main(["check", "-d", "7", "--processes", "1"])
    shown = capsys.readouterr().out
    assert "2 cases not annotated for all classes" in shown
    assert re.search(rf"{names[1]} +{second['annotated']} +{second['present']}\n", shown)
    assert re.search(r"p1_a +partial .* -\n", shown), "a class that is not listed has no number"
    hide(data, "p1_a", "p1_b", "p2_a")
    assert "class tumour: only 4 cases of 7 are annotated for it; annotate it in more" in check_dataset(7, 1).warnings


def test_a_class_that_no_case_of_a_list_holds_is_a_warning(data):
    first = next(name for name in LABELS if name not in ("background", "ignore"))
    hide(data, "p1_a", "p1_b")
    for case in ("p1_a", "p1_b"):
        data.relabel(case, np.zeros(SHAPE, np.uint8))
    report = check_dataset(7, processes=1)
    assert any(f"class {first}: 2 cases list it" in text and "p1_a, p1_b" in text for text in report.warnings)
    hide(data, "p1_a")
    assert not any("list it" in text for text in check_dataset(7, processes=1).warnings), "one case may lack it"


def test_without_a_case_that_can_teach_the_others_there_is_a_warning(data, check):
    full = [case for case, kind in KINDS.items() if kind == "full"]
    hide(data, *full)
    data.split([{"train": sorted(KINDS), "val": []}])
    report = check_dataset(7, processes=1)
    assert any("-tr ConfKDTrainer_partialOnly" in warning for warning in report.warnings)
    assert not any("fully annotated" in error and "teacher" in error for error in report.errors)


@pytest.mark.parametrize("argument, message", [("8", "no data set 8"), ("Dataset009_No", "no data set Dataset009_No")])
def test_a_data_set_that_is_not_there_is_told(data, capsys, argument, message):
    assert cli.main(["check", "-d", argument]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and not printed.out


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_a_variable_that_is_not_set_is_told(data, monkeypatch, variable):
    monkeypatch.delenv(variable)
    with pytest.raises(InputError, match=f"{variable} is not set"):
        check_dataset(7, 1)


@pytest.mark.parametrize("content, message", [
    (None, "cannot be read as JSON .*No such file"), ("{", "cannot be read as JSON"), ("[]", "must hold an object")])
def test_a_dataset_json_that_cannot_be_read_is_told(data, content, message):
    file = data.folder / "dataset.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(InputError, match=rf"Dataset007_Toy/dataset.json: {message}"):
        check_dataset(7, 1)


def test_a_folder_that_nnunet_does_not_take_for_a_data_set_is_told(data):
    data.folder.rename(data.folder.with_name("Toy"))
    with pytest.raises(InputError, match="raw/Toy: nnU-Net's data sets are named like Dataset027_NAME"):
        check_dataset("Toy", 1)


# ---- dataset.json ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("entries, message", [
    ({"labels": NOWHERE}, r'lacks "labels"; add names and values'),
    ({"channel_names": NOWHERE}, r'lacks "channel_names"; add the names of the channels'),
    ({"channel_names": NOWHERE, "modality": {"0": "T1"}}, r'lacks "channel_names" \("modality" is its name in the old'),
    ({"file_ending": NOWHERE}, r'lacks "file_ending"; add one of \.nii\.gz'),
    ({"file_ending": ".jpg"}, r'"file_ending" must be one of .*; got "\.jpg"'),
    ({"channel_names": ["T1", "T2"]}, r'"channel_names" must be .*; got \["T1", "T2"\]'),
    ({"channel_names": {}}, r'"channel_names" must be'),
    ({"channel_names": {"1": "T2", "0": "T1"}}, r'"channel_names" must be .* numbered in order; got'),
    ({"channel_names": {"0": "T1", "1": 2}}, r'"channel_names" must be the names'),
    ({"labels": {"0": "background", "1": "organ"}}, r'"labels" must be names and values.*got \{"0": "background"'),
    ({"labels": {"background": 0, "organ": 1.5}}, r'"labels" must be'),
    ({"labels": {"background": 0, "organ": []}}, r'"labels" must be'),
    ({"labels": {"background": 0, "organ": 1, "ignore": [2]}}, r'"labels" must be .* "ignore" a number'),
    ({"labels": {"ignore": 0}}, r'"labels" must be'),
    ({"dataset": {"a": {"images": "a.nii.gz", "label": "b.nii.gz"}}}, r'"dataset" must be \{CASE: '),
    ({"dataset": ["a"]}, r'"dataset" must be \{CASE: ')])
def test_what_is_wrong_in_dataset_json_is_told_and_the_files_stay_unexamined(data, check, entries, message):
    data.describe(**entries)
    report = check([rf"Dataset007_Toy/dataset\.json: {message}"])
    assert report["cases"] == {} and report["totals"] == {}
    assert check_dataset(7, 1).text().endswith(
        "1 error, 0 warnings: correct the errors before training; the images and labels were not examined")


@pytest.mark.parametrize("entries, message", [
    ({"numTraining": NOWHERE}, r'lacks "numTraining"; add the number of training cases'),
    ({"numTraining": "7"}, r'"numTraining" must be the number of training cases; got "7"'),
    ({"numTraining": 9}, r'"numTraining" is 9, but there are 8 training cases; correct it'),
    ({"patient_pattern": 3}, r'"patient_pattern" must be a regular expression, a text; got 3'),
    ({"supervision": ["p1_a"]}, r'"supervision" must be an object \{case: kind\}; got \["p1_a"\]'),
    ({"supervision": []}, r'"supervision" must be an object'),
    ({"labels": {**LABELS, "other": 3, "ignore": 9}}, "the ignore label is 9, but .* plus one, 4"),
    ({"labels": {"nothing": 0, "organ": 1, "tumour": 2, "ignore": 3}}, r'"labels" needs "background": 0'),
    ({"labels": {"background": [0], "organ": 1, "tumour": 2, "ignore": 3}}, r'"labels" needs "background": 0'),
    ({"labels": REGIONS}, r'"regions_class_order" must hold one of the values 0, 1, 2 .* got null'),
    ({"labels": REGIONS, "regions_class_order": [1]}, r"for each of the 2 that .*\[1\]"),
    ({"labels": REGIONS, "regions_class_order": [1, 7]}, r"the values 0, 1, 2 .*\[1, 7\]"),
    ({"labels": REGIONS, "regions_class_order": [1, [2]]}, r"the values 0, 1, 2 .*\[1, \[2\]\]"),
])
def test_what_is_wrong_in_dataset_json_is_told_and_the_files_are_examined(data, entries, message):
    data.describe(**entries)
    found = check_dataset(7, 1)
    assert len(found.cases) == 8
    assert [re.search(rf"dataset\.json: .*{message}", text) is not None for text in found.errors] == [True], (
        found.errors
    )
    assert cli.main(["check", "-d", "7", "--processes", "1"]) == 1


def test_labels_with_a_gap_are_told(data):
    data.describe(labels={"background": 0, "organ": 1, "tumour": 2, "other": 5, "ignore": 6})
    assert re.search(
        r"dataset\.json: the labels must be 0, 1, 2 and so on without a gap, not 0, 1, 2, 5; renumber them",
        check_dataset(7, 1).errors[0],
    )


def test_two_names_of_one_value_are_a_warning(data, check):
    data.describe(labels={"background": 0, "organ": 1, "lesion": 2, "tumour": 2, "ignore": 3})
    check([], [r"dataset\.json: some of the labels lesion, tumour have the same value; nnU-Net sees one class"])


# ---- files ----------------------------------------------------------------------------------------------------------

def test_an_image_without_a_label_is_an_error(data, check):
    data.label("p3_a").unlink()
    report = check(
        [r"imagesTr/p3_a_0000.nii.gz: has no label .*labelsTr/p3_a.nii.gz; an unlabelled case needs one that"]
    )
    nothing = dict.fromkeys(("background", "organ", "tumour"))
    assert report["cases"]["p3_a"] == {
        "kind": None, "declared": None, "patient": "p3", "size": 120, "annotated": None, "annotated_share": None,
        "voxels": nothing, "share": nothing, "hidden": 0, "classes": None}
    assert report["totals"]["all"]["cases"] == 7


def test_a_label_without_an_image_is_an_error(data, check):
    write(data.label("p9"), data.labels["p1_a"])
    check([r"labelsTr/p9.nii.gz: is a label without an image; add imagesTr/p9_0000.nii.gz, or remove the label"])


@pytest.mark.parametrize("missing, numbered", [(0, "1"), (1, "0")])
def test_a_missing_channel_is_an_error(data, check, missing, numbered):
    data.image("p1_a", missing).unlink()
    check([rf"imagesTr/p1_a_000{numbered}.nii.gz: the case has 1 channel, in files numbered {numbered}; dataset.json"])


def test_a_gap_in_the_numbers_of_the_channels_is_an_error(data, check):
    # nnU-Net would take the two files for channels 0 and 1
    data.image("p1_a", 1).rename(data.image("p1_a", 2))
    check([r"the case has 2 channels, in files numbered 0, 2; dataset.json names 2"])


def test_a_channel_too_many_is_an_error(data, check):
    shutil.copyfile(data.image("p1_a"), data.image("p1_a", 2))
    check([r"the case has 3 channels, in files numbered 0, 1, 2; dataset.json names 2"])


def test_an_image_without_a_number_is_an_error(data, check):
    shutil.copyfile(data.image("p1_a"), data.folder / "imagesTr" / "extra.nii.gz")
    check([r"imagesTr/extra.nii.gz: has no number of a channel .* rename it to extra_0000.nii.gz"])


def test_files_of_other_endings_are_a_warning(data, check):
    for name in ("imagesTr/p9_0000.nii", "imagesTr/notes.txt", "labelsTr/p9.NII.GZ", "imagesTr/.DS_Store"):
        (data.folder / name).write_text("")
    check([], [r"imagesTr: nnU-Net does not read files that do not end with .nii.gz: notes.txt, p9_0000.nii$",
               r"labelsTr: nnU-Net does not read .*: p9.NII.GZ$"])


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_a_missing_folder_is_an_error(data, missing):
    shutil.rmtree(data.folder / f"{missing}Tr")
    assert (
        f"{data.folder / missing}Tr: there is no such folder; make it, or list the files"
        in check_dataset(7, 1).errors[0]
    )


def test_an_empty_data_set_is_an_error(data, check):
    data.remove(*KINDS)
    data.split_file.unlink()
    check([r"Dataset007_Toy: has no training case"])


def test_files_that_cannot_be_read_are_errors(data, check):
    data.image("p1_a").write_bytes(data.image("p1_a").read_bytes()[:-20])  # cut short
    data.label("p1_b").write_bytes(gzip.compress(b"no image"))
    data.label("p3_a").write_text("no gzip")
    report = check([rf"{file}.nii.gz: cannot be read as an image"
                    for file in ("imagesTr/p1_a_0000", "labelsTr/p1_b", "labelsTr/p3_a")])
    assert [case for case, found in report["cases"].items() if found["kind"] is None] == ["p1_b", "p3_a"]


def test_a_case_none_of_whose_images_can_be_read_has_a_size_all_the_same(data, check, capsys):
    for channel in range(2):
        data.image("p1_a", channel).write_text("no image")
    report = check([r"p1_a_0000.nii.gz: cannot be read", r"p1_a_0001.nii.gz: cannot be read"])
    assert report["cases"]["p1_a"]["annotated_share"] == 1


OTHER_GRIDS = [({"spacing": (1.5, 2.1, 3.0)}, r"spacing \(1.5, 2.1, 3.0\) and \(1.5, 2.0, 3.0\)"),
               ({"origin": (-3.0, 10.0, 3.0)}, r"origin \(-3.0, 10.0, 3.0\) and \(-3.0, 10.0, 2.0\)"),
               ({"direction": (1, 0, 0, 0, 1, 0, 0, 0, 1)}, r"direction \(1.0, -?0.0, .*\) and \(0.8, -0.6, ")]


@pytest.mark.parametrize("geometry, message", OTHER_GRIDS)
@pytest.mark.parametrize("what", ["label", "channel"])
def test_another_grid_is_an_error(data, check, geometry, message, what):
    file = data.label("p3_a") if what == "label" else data.image("p3_a", 1)
    write(file, sitk.GetArrayFromImage(sitk.ReadImage(str(file))), **geometry)
    check([rf"{file.name}: is on another grid than .*p3_a_0000.nii.gz: {message}"])


@pytest.mark.parametrize("what", ["label", "channel"])
def test_another_size_is_an_error(data, check, what):
    file = data.label("p3_a") if what == "label" else data.image("p3_a", 1)
    write(file, np.tile(np.arange(3, dtype=np.uint8), (4, 6, 2)))
    check([rf"{file.name}: is on another grid than .*: size \(6, 6, 4\) and \(5, 6, 4\)"])


def test_a_grid_within_the_rounding_of_a_file_is_the_same(data, check):
    write(data.label("p3_a"), data.labels["p3_a"], spacing=(1.5001, 2.0, 3.0), origin=(-3.01, 10.0, 2.0))
    check()


def test_label_values_that_are_not_listed_are_an_error(data, check):
    label = data.labels["p1_a"].copy()
    label[0, 0, :2] = 7, 9
    data.relabel("p1_a", label)
    report = check([r"labelsTr/p1_a.nii.gz: holds the values 7, 9, which dataset.json does not list"])
    assert report["cases"]["p1_a"]["kind"] is None and report["totals"]["full"]["cases"] == 4


@pytest.mark.parametrize("value, printed", [(0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf")])
def test_labels_that_are_no_whole_numbers_are_an_error(data, check, value, printed):
    label = data.labels["p1_a"].astype(np.float32)
    label[0, 0, 0] = value
    write(data.label("p1_a"), label)
    check([rf"labelsTr/p1_a.nii.gz: holds values that are no whole numbers: {printed}; was it resampled"])


def test_an_image_of_several_channels_is_an_error(data, check):
    image = sitk.ReadImage(str(data.image("p1_a")))
    sitk.WriteImage(sitk.JoinSeries([image, sitk.ReadImage(str(data.image("p1_a", 1)))]), str(data.image("p1_a")))
    data.image("p1_a", 1).unlink()
    check([r"imagesTr/p1_a_0000.nii.gz: holds 2 channels. nnU-Net would .* split it into a file for each channel"])


def test_a_label_of_several_channels_is_an_error(data, check):
    image = sitk.JoinSeries([sitk.ReadImage(str(data.label("p1_a")))] * 2)
    sitk.WriteImage(image, str(data.label("p1_a")))
    check([r"labelsTr/p1_a.nii.gz: holds 2 channels; a label has one"])


@pytest.mark.parametrize("value, dtype", [(np.nan, np.float32), (-np.inf, np.float64), (1e39, np.float64)])
def test_intensities_that_are_not_finite_are_an_error(data, check, value, dtype):
    image = data.rng.random(SHAPE).astype(dtype)
    image[1, 2, :3] = value
    write(data.image("p2_a", 1), image)  # 1e39 is beyond single precision, in which nnU-Net computes
    check([r"imagesTr/p2_a_0001.nii.gz: 3 voxels not finite"])


def test_names_that_nnunet_cannot_have_are_errors(data, check):
    for name in ("p5_seg", "._p6"):
        for source, target in ((data.image("p4_a"), data.image(name)), (data.image("p4_a", 1), data.image(name, 1)),
                               (data.label("p4_a"), data.label(name))):
            image = sitk.ReadImage(str(source))
            sitk.WriteImage(image + (len(name) if "images" in str(target) else 0), str(target))
    data.describe(numTraining=10, patient_pattern=NOWHERE)
    data.split([FOLD | {"train": [*FOLD["train"], "p5_seg", "._p6"]}])
    check([r"\._p6_0000.nii.gz: the name of the case, '\._p6', is empty, hidden",
           r"p5_seg_0000.nii.gz: the name of the case, 'p5_seg', ends with _seg"])


def test_all_that_is_wrong_is_listed_together(data, check):
    data.describe(numTraining=1)
    data.label("p1_a").unlink()
    write(data.image("p3_a"), np.full(SHAPE, np.nan, np.float32))
    write(data.label("p3_a"), np.full(SHAPE, 9, np.uint8))
    data.split([FOLD | {"val": [*FOLD["val"], "p7"]}])
    check([r"has no label", r"p3_a_0000.nii.gz: 120 voxels not finite", r"p3_a.nii.gz: holds the values 9",
           r'"numTraining" is 1', r"fold 0: there are no cases p7"])


# ---- supervision ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("table, message", [
    ({"p3_a": "full"}, r"p3_a: declared full, but \d+ of its voxels are ignored; declare it partial"),
    ({"p4_a": "partial", "p4_b": "full"}, r"there is no case p4_b; remove it from the table"),
    ({"p1_a": float("nan")}, r"p1_a: 'nan' is no kind of supervision"),
    ({"p1_a": "scribbled"}, r"p1_a: 'scribbled' is no kind of supervision; use one of full, partial, unlabelled")])
def test_a_table_that_contradicts_the_labels_is_an_error(data, check, table, message):
    data.describe(supervision=table)
    report = check([rf'Dataset007_Toy/dataset\.json, "supervision": {message}'])
    assert {case: found["kind"] for case, found in report["cases"].items()} == KINDS


def test_partial_cases_need_an_ignore_label(data, check):
    data.remove("p3_a", "p3_b", "p4_a")
    data.describe(labels={"background": 0, "organ": 1, "tumour": 2}, supervision={"p1_b": "partial"})
    check([r'"supervision": p1_b: declared partial, but the labels in dataset.json have no "ignore"'])


def test_it_is_not_said_that_no_case_is_full_where_one_cannot_be_read(data, check):
    for case in ("p1_a", "p1_b"):  # all that the fold trains on
        data.label(case).write_text("no gzip")
    check([r"labelsTr/p1_a.nii.gz: cannot be read", r"labelsTr/p1_b.nii.gz: cannot be read"])
    data.remove("p1_b", "p2_a", "p2_b", "p5_a")
    data.split_file.unlink()
    data.label("p1_a").write_text("no gzip")
    check([r"labelsTr/p1_a.nii.gz: cannot be read"])


def test_no_full_case_is_an_error(data, check):
    data.describe(supervision={case: "partial" for case in KINDS if KINDS[case] == "full"})
    # said once, not again for each fold
    check(
        [r"none of the 8 training cases is fully annotated", r"fold 0: validates on cases that are not fully annotated"]
    )
    data.split_file.unlink()
    check(
        [r"none of the 8 training cases is fully annotated \(0 full, 7 partial, 1 unlabelled\), so there is no teacher"]
    )


# ---- classes --------------------------------------------------------------------------------------------------------

def test_a_class_that_no_full_training_case_has_is_a_warning_for_each_fold(data, check):
    for case in ("p1_a", "p1_b"):
        data.relabel(case, np.where(data.labels[case] == 2, 1, data.labels[case]))
    missing = "class tumour: annotated in no fully annotated training case"
    check(
        [],
        [
            rf"^{missing} of fold 0; the teacher cannot learn it, and takes it for background\. Annotate it completely"
        ],
    )
    data.split([FOLD, {"train": ["p2_a", "p2_b", "p3_a", "p3_b", "p4_a"], "val": ["p1_a", "p1_b", "p5_a"]}])
    check([], [rf"^{missing} of fold 0;"])


def test_a_class_that_one_full_patient_has_is_a_warning_for_the_fold_that_will_validate_on_it(data, check):
    data.split_file.unlink()
    for case in ("p1_a", "p1_b", "p5_a"):
        data.relabel(case, np.where(data.labels[case] == 2, 1, data.labels[case]))
    folds = split_full_cases(KINDS, {case: case[:2] for case in KINDS})
    (fold,) = [k for k, fold in enumerate(folds) if "p2_a" in fold["val"]]
    check(
        [],
        [
            NO_SPLIT,
            SINGLE,
            rf"^class tumour: annotated in no fully annotated training case of fold {fold} that the trainer will",
        ],
    )


def test_a_class_that_no_full_case_has_is_a_warning_with_and_without_a_split(data, check):
    for case, kind in KINDS.items():
        if kind == "full":
            data.relabel(case, np.where(data.labels[case] == 2, 1, data.labels[case]))
    message = r"^class tumour: annotated in no fully annotated training case, but in 2 partial cases .*; the teacher"
    check([], [message])
    data.split_file.unlink()
    check([], [NO_SPLIT, SINGLE, message])


@pytest.mark.parametrize("value, name, message", [
    (0, "background", "the student learns what is background from the full ones alone"),
    (2, "tumour", "the student learns it from the full ones alone")])
def test_a_class_that_no_partial_case_has_is_a_warning(data, check, value, name, message):
    for case in ("p3_a", "p3_b"):
        data.relabel(case, np.where(data.labels[case] == value, 3, data.labels[case]))
    check([], [rf"^class {name}: annotated nowhere among the partial cases; {message}\. If they show it, "])


def test_full_cases_without_background_are_no_reason_to_warn(data, check):
    for case in ("p1_a", "p1_b", "p2_a", "p2_b", "p5_a"):
        data.relabel(case, np.where(data.labels[case] == 0, 1, data.labels[case]))
    check()


# ---- images ---------------------------------------------------------------------------------------------------------

def test_an_empty_image_is_a_warning_for_its_channel(data, check):
    write(data.image("p1_a", 1), np.full(SHAPE, 5, np.int16))
    check([], [r"^.*imagesTr/p1_a_0001.nii.gz: is empty, 5 everywhere$"])


def test_identical_images_are_a_warning_however_they_are_stored(data, check):
    for channel in range(2):
        array = sitk.GetArrayFromImage(sitk.ReadImage(str(data.image("p1_a", channel))))
        write(data.image("p3_a", channel), array.astype(np.int16))
    assert data.image("p3_a").read_bytes() != data.image("p1_a").read_bytes()
    check([], [r"^the images of p1_a, p3_a are identical, though of several patients .*Is one a copy by mistake"])


def test_images_that_share_one_channel_are_not_identical(data, check):
    shutil.copyfile(data.image("p1_a"), data.image("p2_a"))
    check()


def test_empty_images_are_not_called_identical(data, check):
    for case in ("p1_a", "p2_a"):
        for channel in range(2):
            write(data.image(case, channel), np.zeros(SHAPE, np.uint8))
    check([], [r"is empty, 0 everywhere"] * 4)


def test_identical_images_to_train_and_to_validate_are_an_error(data, check):
    for channel in range(2):
        shutil.copyfile(data.image("p1_a", channel), data.image("p2_b", channel))
    check([r"the images of p1_a, p2_b are identical .*, and fold 0 trains and validates on them"])
    data.split_file.unlink()
    check([], [NO_SPLIT, SINGLE, r"p1_a, p2_b are identical, though .* Is one a copy"])


# ---- the split ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", ["[", "{}", "[]", "[3]", '[{"train": []}]', '[{"train": "a", "val": "b"}]',
                                     '[{"train": [1], "val": [2]}]'])
def test_a_split_of_another_form_is_an_error(data, check, content):
    data.split_file.write_text(content)
    check([r"splits_final.json: is no list of folds"])


@pytest.mark.parametrize(
    "train, val, message",
    [
        (["p1_a", "x"], ["p2_a", "y"], r"there are no cases x, y; correct the names"),
        (["p1_a", "p2_a"], ["p2_a"], r"trains and validates on p2_a; each case can be on one side only"),
        (
            ["p1_a", "p2_a"],
            ["p2_b"],
            r"patient p2 has cases to train \(p2_a\) and to validate \(p2_b\); keep them on one side",
        ),
        (
            ["p1_a"],
            ["p2_a", "p3_a", "p4_a"],
            r"not fully annotated, .*: p3_a \(partial\), p4_a \(unlabelled\)\. Did nnU-Net write",
        ),
        (
            ["p3_a", "p4_a"],
            ["p2_a"],
            r"none of the 2 training cases is fully annotated \(0 full, 1 partial, 1 unlabelled\)",
        ),
        (["p1_a"], [], r"validates on no case"),
    ],
)
def test_what_is_wrong_in_a_fold_is_an_error(data, train, val, message):
    data.split([FOLD, {"train": train, "val": val}])  # the first fold is right
    errors = check_dataset(7, 1).errors
    assert [re.search(f"splits_final.json, fold 1: .*{message}", text) is not None for text in errors] == [True], errors
    assert cli.main(["check", "-d", "7", "--processes", "1"]) == 1


def test_without_a_pattern_each_case_is_a_patient(data, check):
    data.split([FOLD | {"train": ["p1_a", "p2_a", "p3_a", "p3_b", "p4_a"], "val": ["p1_b", "p2_b", "p5_a"]}])
    check([r"patient p1 has", r"patient p2 has"])
    data.describe(patient_pattern=NOWHERE)
    check()
    # one given by the option wins over that of dataset.json
    check([r"patient p1 has", r"patient p2 has"], [], "--patient-pattern", r"(p\d)")
    data.describe(patient_pattern=r"(p\d+)_")
    check([], [], "--patient-pattern", "(.*)")


@pytest.mark.parametrize("pattern, message", [
    ("(q)", "does not match these cases; correct it: p1_a"), ("(", "no regular expression")])
def test_a_pattern_that_does_not_match_is_an_error(data, check, pattern, message):
    check([rf"patient pattern .*{message}"], [], "--patient-pattern", pattern)


def test_a_split_that_nnunet_wrote_is_one_error_that_says_to_delete_it(data, check):
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    data.split(generate_crossval_split(sorted(KINDS)))
    data.describe(patient_pattern=NOWHERE)
    check(
        [
            r"splits_final.json, fold \d(, \d)+: validates on cases that are not fully annotated.* "
            r"Then delete it: confkd plan, or the next "
            r"training, writes folds that validate on fully annotated cases only"
        ],
        [SINGLE],
    )
    data.split_file.unlink()
    check([], [NO_SPLIT, SINGLE])


def test_folds_that_validate_on_one_patient_are_a_warning_with_the_numbers(data, check):
    data.split([{"train": ["p1_a", "p1_b", "p3_a", "p3_b", "p4_a", "p5_a"], "val": ["p2_a", "p2_b"]}, FOLD])
    check(
        [],
        [
            r"^fold 0: the validation is on a single patient, .*, and 1 of 3 fully annotated patients \(33 %\) do "
            r"not train\. Consider "
            r"fold 'all', .* \(confkd train 7 CONFIGURATION all\); predict with checkpoint_final then$"
        ],
    )
    data.describe(patient_pattern=NOWHERE)
    check()  # two patients of one case each
    data.split(
        [
            {"train": ["p1_a", "p1_b", "p3_a"], "val": ["p2_a", "p2_b"]},
            {"train": ["p1_a", "p1_b", "p4_a", "p3_b"], "val": ["p5_a"]},
        ]
    )
    data.describe(patient_pattern=r"(p\d+)_")
    check(
        [],
        [
            r"^fold 0, fold 1: .* and 2 of 3 fully annotated patients \(67 %\) do not train\. "
            r"Others are held back .* --folds 1"
        ],
    )


def test_a_dataset_json_that_was_edited_after_planning_is_an_error_that_says_what_to_type(data, check):
    planned = data.split_file.with_name("dataset.json")
    shutil.copyfile(data.folder / "dataset.json", planned)
    check()
    data.describe(licence="CC0", supervision={})  # neither says anything to the training
    described = json.loads((data.folder / "dataset.json").read_text())
    (data.folder / "dataset.json").write_text(json.dumps(dict(reversed(described.items())), indent=4))
    check()
    data.describe(supervision={"p1_b": "unlabelled"})
    check(
        [
            rf"{data.folder}/dataset\.json differs from {planned}, which training reads, in supervision: "
            r".*Copy the first file over the "
            r"second \(confkd plan -d 7 --no_pp"
        ]
    )
    data.describe(labels={"background": 0, "lesion": 1, "tumour": 2, "ignore": 3})
    check([r"which training reads, in labels, supervision: .*Plan and preprocess again: confkd plan -d 7"])
    planned.write_text("{")
    check([r"preprocessed/Dataset007_Toy/dataset\.json: cannot be read as JSON"])


def test_the_order_of_regions_counts_and_that_of_other_labels_does_not(data, check):
    planned = data.split_file.with_name("dataset.json")
    for labels, errors in ((LABELS, []), (REGIONS, ["in labels"])):
        data.describe(labels=labels, regions_class_order=[1, 2])
        shutil.copyfile(data.folder / "dataset.json", planned)
        data.describe(labels={"background": 0, **dict(reversed(list(labels.items())[1:]))})
        check(errors)


def test_cases_in_no_fold_are_a_warning(data, check):
    data.split([FOLD | {"train": ["p1_a", "p3_a"]}])
    report = check([], [r"splits_final.json: no fold trains or validates on p1_b, p3_b, p4_a"])
    assert report["split"]["unused"] == ["p1_b", "p3_b", "p4_a"]


def test_a_missing_split_is_a_warning_that_tells_what_the_trainer_does(data, check):
    data.split_file.unlink()
    # three patients are full
    report = check(
        [],
        [
            r"splits_final.json: there is no split. The trainer will write 3 folds of the fully annotated cases; "
            r"all others train in every fold$",
            SINGLE,
        ],
    )
    assert report["split"] == {"file": None, "folds": [], "unused": []}
    data.describe(patient_pattern=NOWHERE)
    check([], [r"The trainer will write 5 folds of .*every fold$", SINGLE])
    check(
        [],
        [
            r"The trainer will write 5 folds of .*every fold. It does not know the patients: p1, p2 would be on both",
            SINGLE,
        ],
        "--patient-pattern",
        r"(p\d+)_",
    )


def test_without_a_split_and_with_one_full_patient_nothing_can_be_validated(data, check):
    data.remove("p2_a", "p2_b", "p5_a")
    data.split_file.unlink()
    check([], [r"there is no split. fewer than two patients are .*confkd train \d+ CONFIGURATION all"])


def test_without_a_split_full_cases_are_split_by_nnunet(data, check):
    for case in ("p3_a", "p3_b", "p4_a"):
        data.relabel(case, data.rng.integers(0, 3, SHAPE).astype(np.uint8))
    data.split_file.unlink()
    check([], [r"The trainer will write 5 folds of the fully", SINGLE])  # by patients, of which there are five
    data.describe(patient_pattern=NOWHERE)
    check([], [r"nnU-Net will make five random folds of all cases$", SINGLE])
    data.remove("p3_a", "p3_b", "p4_a", "p5_a")
    data.split_file.unlink()
    check(
        [], [r"nnU-Net would make five folds, and fail: there are only 4 cases. Write a split, or train on fold 'all'"]
    )


# ---- test cases -----------------------------------------------------------------------------------------------------

def test_test_cases_are_examined_and_counted(data, check):
    data.add_test("t1", data.labels["p1_a"])
    data.add_test("t2", data.labels["p1_a"])
    assert check()["test"] == {"cases": 2, "labelled": 2}
    data.label("t2", "Ts").unlink()
    assert check([], [r"^test: .*labelsTs: has no label for t2$"])["test"] == {"cases": 2, "labelled": 1}
    shutil.rmtree(data.folder / "labelsTs")
    assert check()["test"] == {"cases": 2, "labelled": 0}


def test_what_is_wrong_with_test_cases_is_a_warning(data, check):
    # training does not read them
    data.add_test("t1")
    data.image("t1", 0, "Ts").write_text("no image")
    data.add_test("t2", np.full(SHAPE, 9, np.uint8))
    data.add_test("t3", data.labels["p1_a"])
    data.image("t3", 1, "Ts").unlink()
    write(data.label("t4", "Ts"), data.labels["p1_a"])
    data.add_test("t5", data.labels["p1_a"])
    for channel in range(2):
        shutil.copyfile(data.image("p1_a", channel), data.image("t5", channel, "Ts"))
    check([], [r"^test: the images of t5 \(test\) and p1_a \(training\) are identical",
               r"^test: .*labelsTs/t4.nii.gz: is a label without",
               r"^test: .*t1_0000.nii.gz: cannot be read", r"^test: .*labelsTs/t2.nii.gz: holds the values 9",
               r"^test: .*t3_0000.nii.gz: the case has 1 channel, in files numbered 0; dataset.json names 2",
               r"^test: .*labelsTs: has no label for t1"])


# ---- the text -------------------------------------------------------------------------------------------------------

def test_the_text_has_totals_and_a_row_for_each_case(data):
    data.describe(supervision={"p3_a": "partial"})
    label = np.full(SHAPE, 3, np.uint8)
    label[0, 0, :3] = 0, 1, 2
    data.relabel("p3_a", label)
    data.relabel("p3_b", np.where(label == 2, 1, label))
    for case in ("p1_a", "p1_b", "p2_a", "p2_b", "p5_a"):
        label = np.zeros(SHAPE, np.uint8)
        label[0] = 1  # 30 of 120
        label[1, :2] = 2  # 10 of 120
        data.relabel(case, label)
    # 5 * (80, 30, 10) of 600; 1 + 1 background, 1 + 2 organ, 1 tumour of 240
    assert check_dataset(7, 1).text().splitlines() == [
        "Dataset007_Toy: 8 training cases",
        f"folder: {data.folder}",
        "channels: T1, T2",
        "labels: background 0, organ 1, tumour 2, ignore 3",
        "fold 0: trains on 2 full, 2 partial, 1 unlabelled; validates on 3 full",
        "",
        "annotated voxels and their share          full     partial  unlabelled           all",
        "cases                                        5           2           1             8",
        "annotated                         600    100 %  6   2.50 %  0      0 %  606   63.1 %",
        "background                        400   66.7 %  2  0.833 %  0      0 %  402   41.9 %",
        "organ                             150   25.0 %  3   1.25 %  0      0 %  153   15.9 %",
        "tumour                             50   8.33 %  1  0.417 %  0      0 %   51   5.31 %",
        "",
        "case        kind  annotated  background  organ  tumour",
        "p1_a        full      100 %          80     30      10",
        "p1_b        full      100 %          80     30      10",
        "p2_a        full      100 %          80     30      10",
        "p2_b        full      100 %          80     30      10",
        "p3_a     partial     2.50 %           1      1       1",
        "p3_b     partial     2.50 %           1      2       0",
        "p4_a  unlabelled        0 %           0      0       0",
        "p5_a        full      100 %          80     30      10",
        "",
        "0 errors, 0 warnings: ready; next: confkd plan -d 7"]


def test_warnings_and_then_errors_come_last(data, capsys):
    data.label("p1_a").unlink()
    write(data.image("p1_a", 1), np.zeros(SHAPE, np.uint8))
    assert cli.main(["check", "-d", "7", "--processes", "1"]) == 1
    text = capsys.readouterr().out
    assert re.search(r"\np1_a +\? +- +- +- +-\n", text)
    last = text[text.index("WARNINGS"):]
    assert last == (
        "WARNINGS\n"
        "- imagesTr/p1_a_0001.nii.gz: is empty, 0 everywhere\n\n"
        "ERRORS\n"
        "- imagesTr/p1_a_0000.nii.gz: has no label labelsTr/p1_a.nii.gz; an unlabelled case needs one that is\n"
        "  \"ignore\" everywhere\n\n"
        "1 error, 1 warning: correct the errors before training\n")


def _report_of(cases, classes):
    """A report with so many cases, of which case k has an annotated share of k percent, and so many classes."""
    report = Report("Dataset007_Toy", "/raw")
    names = [f"class_{k:02d}" for k in range(classes)]
    voxels, share = dict.fromkeys(names, 12345678), dict.fromkeys(names, 0.5)
    for k in range(cases):
        report.cases[f"case_{k:03d}"] = {"kind": "partial", "annotated_share": k / 100, "voxels": voxels, "hidden": 0,
                                         "classes": None}
    total = {"cases": cases, "size": 10, "annotated": 5, "annotated_share": 0.5, "voxels": voxels, "share": share}
    report.totals = {kind: total if kind in ("partial", "all") else total | {"cases": 0}
                     for kind in ("full", "partial", "unlabelled", "all")}
    return report


def test_more_than_forty_cases_are_summarised_unless_all_are_asked_for():
    report = _report_of(41, 1)
    text = report.text()
    assert "case_007" not in text and "41 cases: --all has a row for each" in text
    # 0, 1, ..., 40 percent
    for row in (
        r"\nleast annotated case +0 % +0 %\n",
        r"\nmedian annotated case +20\.0 %",
        r"\nmost annotated case +40",
    ):
        assert re.search(row, text)
    assert "case_007" in report.text(all_cases=True) and "median" not in report.text(all_cases=True)
    assert "case_007" in _report_of(40, 1).text()


def test_the_option_all_reaches_the_text(data, capsys, monkeypatch):
    monkeypatch.setattr("nnunet_confkd.data.check_report.ROWS", 6)
    for argv, row in (([], False), (["--all"], True)):
        cli.main(["check", "-d", "7", "--processes", "1", *argv])
        assert ("\np3_a " in capsys.readouterr().out) == row


def test_many_classes_stand_below_each_other_within_a_hundred_columns():
    text = _report_of(3, 30).text()
    assert max(map(len, text.splitlines())) <= 100
    # the first table has two columns more: 8 + 2 + 7 + 2 + 9 leave room for 6 of 2 + 10; 8 leave room for 9 a table
    assert [line.split()[1:] for line in text.splitlines() if line.startswith("case  ")] == [
        ["kind", "annotated", *(f"class_{k:02d}" for k in range(6))], *(
            [f"class_{k:02d}" for k in range(first, min(first + 7, 30))] for first in (6, 13, 20, 27))]


@pytest.mark.parametrize(
    "share, text",
    [
        (None, "-"), (0, "0 %"), (1, "100 %"), (0.99999, ">99.9 %"), (1e-7, "<0.001 %"), (0.24, "24.0 %"), (0.0101,
        "1.01 %"), (0.00002, "0.00200 %"),
    ],
)
def test_a_share_never_looks_like_none_or_all_when_it_is_not(share, text):
    assert percent(share) == text


# ---- real data ------------------------------------------------------------------------------------------------------

def test_acdc_with_scribbles_is_right_and_counted_as_in_the_source(folders, test_data, capsys):
    source = folders / "acdc"
    patients = [f"patient{k:03d}" for k in range(1, 7)]
    for patient in patients:
        shutil.copytree(test_data / "acdc" / "training" / patient, source / "training" / patient)
    folder = acdc.convert(source, 27, scribbles=test_data / "acdc_scribbles", full=["2"], processes=1)

    assert cli.main(["check", "-d", "27", "--processes", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["errors"] == []
    assert [re.search(r"^fold 0: .*, and 1 of 3 fully annotated patients \(33 %\) do not train", text) is not None
            for text in report["warnings"]] == [True], report["warnings"]
    kinds = json.loads((folder / "dataset.json").read_text())["supervision"]
    # one of six patients validates and two train with their masks; three have scribbles
    assert sorted(kinds.values()) == ["full"] * 6 + ["partial"] * 6
    for case, kind in kinds.items():
        file = (test_data / "acdc_scribbles" / f"{case}_scribble.nii.gz" if kind == "partial" else
                test_data / "acdc" / "training" / case[:10] / f"{case}_gt.nii.gz")
        label = np.asarray(nibabel.load(file).dataobj)
        found = report["cases"][case]
        assert (found["kind"], found["patient"], found["size"]) == (kind, case[:10], label.size)
        assert list(found["voxels"].items()) == [
            (name, np.sum(label == value)) for value, name in enumerate(("background", "RV", "myocardium", "LV"))]
        assert found["annotated_share"] == pytest.approx(np.mean(label < 4))
    assert report["split"]["folds"] == [{"train": {"full": 4, "partial": 6, "unlabelled": 0},
                                         "val": {"full": 2, "partial": 0, "unlabelled": 0}}]


def test_a_large_case_is_examined_in_less_memory_than_two_images(tmp_path, monkeypatch):
    for module in ("check_cases", "scribbles"):
        monkeypatch.setattr(f"nnunet_confkd.data.{module}.SLAB", 2 ** 16)
    monkeypatch.setattr("nnunet_confkd.data.scribbles.SAMPLED", 2 ** 14)
    voxels = np.zeros((200, 200, 200), np.int16)
    voxels[20:, 10:, ::3] = 700
    label = np.repeat(np.arange(200, dtype=np.uint8) // 2, 200 * 200).reshape(voxels.shape)
    files = CaseFiles((tmp_path / "i_0000.nii.gz",), (0,), tmp_path / "i.nii.gz")
    write(files.images[0], voxels)
    write(files.label, label)
    examine_case(files, list(range(100)), None)
    tracemalloc.start()
    try:
        content = examine_case(files, list(range(100)), None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert not content.errors and content.size == voxels.size and len(content.shape.volumes) == 99
    assert peak < 2 * voxels.nbytes


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64"])
def test_the_digest_of_an_image_does_not_depend_on_its_type_and_on_the_parts(tmp_path, monkeypatch, dtype):
    voxels = np.random.default_rng(0).integers(0, 200, (30, 20, 10))
    found = []
    for name, kind, slab in (("a", "float32", 2 ** 20), ("b", dtype, 7), ("c", dtype, 999)):
        monkeypatch.setattr("nnunet_confkd.data.check_cases.SLAB", slab)
        files = CaseFiles((tmp_path / f"{name}_0000.nii.gz",), (0,), None)
        write(files.images[0], voxels.astype(kind))
        found.append(examine_case(files, [], None).digest)
    assert found[0] and len(set(found)) == 1
    voxels[-1, -1, -1] += 1
    write(files.images[0], voxels.astype(dtype))
    assert examine_case(files, [], None).digest not in found
