"""`confkd complete --watershed`: labels that are completed without a model."""
from __future__ import annotations

import json
import re

import numpy as np
import pytest
from image_files import file_states, read_json, read_voxels, write_image

from nnunet_confkd import cli
from nnunet_confkd.data.folders import preprocessed_folder, raw_folder
from nnunet_confkd.inference.completed_case import PREDICTED, CompletedCase, KnownLabel

IGNORE, SIZE = 2, (6, 40, 44)
THICK = (1.5, 1.5, 8.0)  # mm, in ITK's order


def truth() -> np.ndarray:
    """A cylinder across the slices."""
    y, x = np.ogrid[:SIZE[1], :SIZE[2]]
    return np.broadcast_to((y - 18) ** 2 + (x - 25) ** 2 < 100, SIZE).astype(np.uint8)


def weak(background: bool = True, slices=slice(1, 5)) -> np.ndarray:
    """A stroke in the cylinder, and one beside it, in some slices."""
    label = np.full(SIZE, IGNORE, np.uint8)
    label[slices, 16:20, 24:27] = 1
    if background:
        label[slices, 2:38, 3] = 0
    return label


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a raw data set of cases with such an image, {case: (kind, label)}, of some spacing."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        monkeypatch.setattr(f"nnunetv2.paths.nnUNet_{name}", str(tmp_path / name))
    image = 3 * truth() + np.random.default_rng(0).normal(scale=0.1, size=SIZE)

    def written(cases, spacing=THICK, **more):
        folder = raw_folder() / "Dataset007_Rods"
        for case, (_, label) in cases.items():
            write_image(folder / "imagesTr" / f"{case}_0000.nii.gz", image.astype(np.float32), spacing)
            write_image(folder / "labelsTr" / f"{case}.nii.gz", label, spacing)
        described = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "rod": 1, "ignore": IGNORE},
                     "numTraining": len(cases), "file_ending": ".nii.gz",
                     "supervision": {case: kind for case, (kind, _) in cases.items()}} | more
        (folder / "dataset.json").write_text(json.dumps(described))
        return folder

    return written


def complete(*options: str) -> int:
    return cli.main(["complete", "-d", "7", "--watershed", "--id", "8", "--processes", "1", *options])


def flooded(label, *channels):
    """The completed label of one case."""
    (label.parent / PREDICTED).mkdir()
    case = CompletedCase("case", KnownLabel(label, IGNORE), label.parent, ".nii.gz", IGNORE, None, fills_all=False)
    case.flood(channels)
    return case.fill(label).voxels[0]


CASES = {"full": ("full", truth()), "other": ("full", truth()), "weak": ("partial", weak()),
         "none": ("unlabelled", np.full(SIZE, IGNORE, np.uint8))}


def test_annotations_are_spread_up_to_the_edges_slice_by_slice_where_slices_are_thick(write, capsys):
    source = write(CASES)
    before = file_states(source)
    assert complete() == 0
    assert file_states(source) == before
    folder = raw_folder() / "Dataset008_Rods_watershed"
    label = read_voxels(folder / "labelsTr" / "weak.nii.gz")
    assert (label[[0, 5]] == IGNORE).all(), "nothing is annotated in these slices"
    assert (label[1:5] == truth()[1:5]).mean() > 0.98
    annotated = weak() != IGNORE
    assert np.array_equal(label[annotated], weak()[annotated])
    for case in ("full", "none"):
        assert np.array_equal(read_voxels(folder / "labelsTr" / f"{case}.nii.gz"), CASES[case][1])
    described = read_json(folder / "dataset.json")
    assert described["supervision"] == {case: kind for case, (kind, _) in CASES.items()}
    (about,) = described["completed"]
    left, filled = 2 * SIZE[1] * SIZE[2], 4 * SIZE[1] * SIZE[2] - int(annotated.sum())
    assert about["watershed"] and about["cases"] == {"weak": {
        "kind_before": "partial", "annotated_voxels": int(annotated.sum()), "filled_voxels": filled,
        "ignored_voxels": left}}
    assert f"1 labels completed: {filled} voxels labelled by the watershed, {left} still ignored" in (
        capsys.readouterr().out)
    splits = read_json(preprocessed_folder() / folder.name / "splits_final.json")
    assert sorted(case for fold in splits for case in fold["val"]) == ["full", "other"], "spread labels do not validate"


def test_volumes_of_thin_slices_are_flooded_as_a_whole(write):
    write(CASES, spacing=(1.5, 1.5, 2))
    assert complete("--name", "Spread") == 0
    folder = raw_folder() / "Dataset008_Spread"
    label = read_voxels(folder / "labelsTr" / "weak.nii.gz")
    assert (label == truth()).mean() > 0.98
    assert read_json(folder / "dataset.json")["supervision"]["weak"] == "full"


def test_a_slice_without_annotated_background_is_not_filled_with_foreground(write):
    label = weak()
    label[2][label[2] == 0] = IGNORE
    write(CASES | {"weak": ("partial", label)})
    assert complete() == 0
    found = read_voxels(raw_folder() / "Dataset008_Rods_watershed" / "labelsTr" / "weak.nii.gz")
    assert np.array_equal(found[2], label[2]) and (found[1] == truth()[1]).mean() > 0.98


@pytest.mark.parametrize("axis", (1, 2))
def test_slices_across_any_axis_may_be_thick(tmp_path, axis):
    """Sagittal and coronal images, too."""
    label, image = (np.moveaxis(array, 0, axis) for array in (weak(), 3.0 * truth()))
    order = [1.5, 1.5, 1.5]
    order[2 - axis] = 8.0  # ITK's order
    file, channel = (write_image(tmp_path / name, np.ascontiguousarray(array), order)
                     for name, array in (("label.nii.gz", label), ("image.nii.gz", image.astype(np.float32))))
    found = np.moveaxis(flooded(file, channel), axis, 0)
    assert (found[[0, 5]] == IGNORE).all() and (found[1:5] == truth()[1:5]).mean() > 0.98


def test_a_channel_of_large_numbers_does_not_decide_alone(tmp_path):
    noise = np.random.default_rng(1).normal(1000, 100, SIZE)
    label, *channels = (write_image(tmp_path / f"{i}.nii.gz", array, THICK) for i, array in enumerate(
        (weak(), (3.0 * truth()).astype(np.float32), noise.astype(np.float32))))
    found = flooded(label, *channels)
    assert (found[1:5] == truth()[1:5]).mean() > 0.95


def test_small_structures_survive_a_coarser_grid(write, monkeypatch):
    monkeypatch.setattr("nnunet_confkd.inference.completed_case.MOST", 3000)
    write(CASES, spacing=(1.5, 1.5, 2))
    assert complete() == 0
    label = read_voxels(raw_folder() / "Dataset008_Rods_watershed" / "labelsTr" / "weak.nii.gz")
    assert (label == truth()).mean() > 0.9 and np.array_equal(label[weak() != IGNORE], weak()[weak() != IGNORE])


@pytest.mark.parametrize("cases, more, text", [
    (CASES | {"blob": ("partial", weak(background=False))}, {}, "blob: no annotated background.*--model"),
    ({"full": CASES["full"], "none": CASES["none"]}, {}, "no training case is partially annotated"),
    (CASES, {"labels": {"background": 0, "all": [1], "ignore": IGNORE}, "regions_class_order": [1]},
     "labels are regions.*--model"),
    (CASES | {"weak": ("partial", np.full(SIZE, 9, np.uint8))}, {}, "weak.nii.gz: holds the values")])
def test_what_cannot_be_spread_is_told_and_nothing_written(write, capsys, cases, more, text):
    write(cases, **more)
    assert complete() != 0
    assert re.search(text, capsys.readouterr().err, re.DOTALL)
    assert [folder.name for folder in raw_folder().iterdir()] == ["Dataset007_Rods"]


@pytest.mark.parametrize("options, text", [
    (("--model", "somewhere"), "not allowed with"), (("--branch", "teacher"), "--branch: only with --model"),
    (("--branch", "student", "-chk", "checkpoint_final.pth"), "--branch, --checkpoint: only with --model"),
    (("--confidence", "0.5", "--fold", "0"), "--confidence, --fold: only with --model")])
def test_options_of_a_model_are_refused(write, capsys, options, text):
    write(CASES)
    with pytest.raises(SystemExit, match="2"):
        complete(*options)
    assert text in capsys.readouterr().err
