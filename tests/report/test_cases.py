"""Predictions of cases, one at a time."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

from nnunet_confkd.data.images import is_flat
from nnunet_confkd.errors import InputError
from nnunet_confkd.evaluation.metrics import MEASURES, CaseMeasures
from nnunet_confkd.report.cases import (
    Calibration,
    Findings,
    Original,
    Prediction,
    Predictor,
    Slice,
    _read_given,
    _spread,
)
from nnunet_confkd.report.model import Model
from nnunet_confkd.training import validation

BRANCHES = ("student", "teacher")


def findings(**attributes) -> Findings:
    """Findings without a model: nothing is predicted."""
    found = Findings.__new__(Findings)
    vars(found).update(attributes)
    return found


def labels_of(has_regions: bool, **more):
    return SimpleNamespace(label_manager=SimpleNamespace(has_regions=has_regions, ignore_label=None, **more))


def voxels(found: Findings) -> dict:
    """{branch: (number, correct) of all voxels and of those in question}."""
    return {branch: [(c.count.sum(), c.correct.sum()) for c in (counts.all, counts.in_question)]
            for branch, counts in found.calibration.items()}


def test_voxels_are_in_question_where_a_branch_predicts_foreground_or_is_not_sure():
    found = findings(model=labels_of(False), calibration={branch: Calibration() for branch in BRANCHES})
    # sure background; foreground of the student alone; the teacher in doubt; foreground that both miss, which is not in
    # question, although the ground truth would tell
    truth = np.array([0, 0, 0, 1])
    foreground = {"student": [0.001, 0.999, 0.001, 0.001], "teacher": [0.001, 0.001, 0.1, 0.001]}
    p = {branch: np.stack((1 - np.array(values), values)) for branch, values in foreground.items()}
    found._count(truth, {branch: Original(values.argmax(0), values.max(0)[None]) for branch, values in p.items()})
    assert voxels(found) == {"student": [(4, 2), (2, 1)], "teacher": [(4, 3), (2, 2)]}
    assert [len(found.calibration[branch].cases) for branch in BRANCHES] == [1, 1]


def test_each_region_is_counted():
    found = findings(model=labels_of(True, foreground_regions=[(1, 2), (2,)]), calibration={"student": Calibration()})
    p = np.array([[0.001, 0.9, 0.2], [0.001, 0.001, 0.3]])  # heads "1 or 2" and "2"
    found._count(np.array([0, 1, 2]), {"student": Original(np.array([0, 1, 0]), p)})
    # two heads in each of three voxels; the first voxel is sure background
    assert voxels(found) == {"student": [(6, 4), (4, 2)]}


def prediction(spatial=(3, 4, 5), has_regions=False) -> Prediction:
    """A prediction of 2 classes whose label lies in slice 1, and whose prediction in slice 2 of 3."""
    logits = torch.full((2, *spatial), -5.0)
    logits[0] = -5.0 if has_regions else 5.0
    logits[:, 2, :2] = torch.tensor((-5.0, 5.0))[:, None, None]
    seg = np.zeros(spatial, np.int8)
    seg[1, 0, 0] = 1
    manager = SimpleNamespace(has_regions=has_regions, ignore_label=None, num_segmentation_heads=2,
                              foreground_labels=[1], regions_class_order=[2, 1])
    model = SimpleNamespace(label_manager=manager, configuration_manager=SimpleNamespace(spacing=[9, 3, 2]))
    data = np.arange(np.prod(spatial), dtype=float).reshape(1, *spatial)
    return Prediction(model, data, seg, {"student": logits}, {})


@pytest.mark.parametrize("has_regions", (False, True))
def test_the_slice_with_most_foreground_is_shown(has_regions, tmp_path):
    found = prediction(has_regions=has_regions)
    shown = found.slice()
    assert (shown.index, shown.count, shown.aspect) == (2, 3, 1.5)
    np.testing.assert_array_equal(shown.image, found.data[0, 2])
    assert shown.segmentations.shape == (1, 4, 5) and shown.segmentations.sum() == 10 and not shown.label.any()
    assert ((0 <= shown.entropy) & (shown.entropy < 0.1)).all()  # each head is sure
    shown.save(tmp_path / "slice.npz")
    again = Slice.load(tmp_path / "slice.npz")
    for name, value in vars(shown).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_the_slice_of_a_real_case_and_its_entropy(predicted):
    for found in predicted.values():
        shown = found.slice()
        foreground = [sum((logits[:, i].argmax(0) > 0).sum() for logits in found.logits.values())
                      + ((found.seg[i] == 1) | (found.seg[i] == 2)).sum() for i in range(len(found.seg))]
        assert foreground[shown.index] == max(foreground) > 0 and shown.count == len(foreground)
        np.testing.assert_array_equal(shown.label, found.seg[shown.index])
        p = np.exp(found.logits["student"][:, shown.index].numpy().astype(float))
        p /= p.sum(0)
        np.testing.assert_allclose(shown.entropy, -(p * np.log(p)).sum(0) / np.log(3), atol=1e-4)


def test_the_branches_of_a_large_case_are_predicted_one_by_one(predicted, small, monkeypatch):
    case, expected = next(iter(predicted.items()))
    monkeypatch.setattr(validation, "AT_ONCE", 100)
    model = Model(small, None, "checkpoint_final.pth")
    found = Predictor(model, model.fold_folders[0], list(BRANCHES), torch.device("cpu"))(case)
    assert list(found.logits) == list(BRANCHES) and found.logits.last[1] is None  # nothing is predicted yet
    predictions = []
    for branch, predict in found.logits.predictions.items():
        found.logits.predictions[branch] = lambda of=branch, by=predict: (predictions.append(of), by())[1]
    found.summarise()
    shown = found.slice()
    assert predictions == ["teacher", "student"] and found.logits.last[0] == "student"
    for branch in BRANCHES:
        torch.testing.assert_close(found.logits[branch], expected.logits[branch], atol=0.01, rtol=0.01)
        same = found.segmentations[branch] == expected.logits[branch].float().argmax(0).numpy()
        assert same.mean() > 0.999
    assert shown.index == expected.slice().index
    np.testing.assert_allclose(shown.entropy, expected.slice().entropy, atol=0.02)


def test_a_segmentation_is_moved_to_the_preprocessed_grid(predicted, truths):
    """The ground truth, cropped and on the preprocessed grid, is the preprocessed label."""
    for case, found in predicted.items():
        truth = found.model.plans_manager.image_reader_writer_class().read_seg(str(truths / f"{case}.nii.gz"))[0][0]
        np.testing.assert_array_equal(found.to_preprocessed(truth), np.maximum(found.seg, 0))


def test_a_segmentation_on_another_grid_is_refused(predicted, truths, tmp_path):
    case, found = next(iter(predicted.items()))
    reader = found.model.plans_manager.image_reader_writer_class()
    file = truths / f"{case}.nii.gz"
    truth = reader.read_seg(str(file))[0]
    np.testing.assert_array_equal(_read_given(file, file, reader, truth), truth[0])
    image = sitk.ReadImage(str(file))
    sitk.WriteImage(image[1:], str(tmp_path / "smaller.nii.gz"))
    sitk.WriteImage(sitk.Flip(image, (False, True, False)), str(tmp_path / "mirrored.nii.gz"))
    image.SetSpacing((1, 1, 2))
    sitk.WriteImage(image, str(tmp_path / "thicker.nii.gz"))
    (tmp_path / "broken.nii.gz").write_bytes(b"broken")
    for name, text in (("smaller", "not lie on the grid of the ground truth, .*: size "), ("thicker", "spacing"),
                       ("mirrored", "origin .*; direction"), ("broken", "broken.nii.gz: cannot be read")):
        with pytest.raises(InputError, match=text):
            _read_given(tmp_path / f"{name}.nii.gz", file, reader, truth)


@pytest.mark.parametrize("dice, expected", [
    ([np.nan], {}), ([0.5], {"best": "0"}), ([0.5, 0.7], {"best": "1", "worst": "0"}),
    ([0.5, 0.7, np.nan, 0.6], {"best": "1", "median": "3", "worst": "0"})])
def test_the_best_the_median_and_the_worst_case_are_examples(dice, expected):
    measures = {str(i): {"a": dict.fromkeys(MEASURES, value)} for i, value in enumerate(dice)}
    found = findings(evaluations={"student": CaseMeasures(classes={"a": (1,)}, cases=measures)})
    assert list(found.examples().items()) == list(expected.items())


def test_cases_are_spread_evenly():
    assert _spread(list("abcdefg"), 3) == ["a", "d", "g"]
    assert _spread(["a", "b"], 3) == ["a", "b"] and _spread([], 3) == []


def test_a_class_that_a_case_is_not_annotated_for_has_no_measures(predicted, small, monkeypatch):
    case, found = next(iter(predicted.items()))
    model = Model(small, None, "checkpoint_final.pth")
    first, second = model.classes
    model.dataset_json = model.dataset_json | {"annotated_classes": {case: [first]}}
    again = Prediction(model, found.data, found.seg, found.logits, found.properties)
    result = findings(model=model, predictions=None, evaluations={
        branch: CaseMeasures(classes=model.classes) for branch in BRANCHES},
        calibration={branch: Calibration() for branch in BRANCHES}, _keep=lambda *_: None)
    result._measure(case, case, again)
    for branch in BRANCHES:
        measures = result.evaluations[branch].cases[case]
        assert not np.isnan(measures[first]["Dice"]) and all(np.isnan(measures[second][name]) for name in MEASURES)


@pytest.mark.parametrize("name, shape, flat", [("a.png", (8, 6), True), ("a.nii.gz", (8, 6), True),
                                               ("a.mha", (8, 6), True), ("a.nii.gz", (1, 8, 6), False)])
def test_images_without_a_third_axis_are_known_by_what_nnunets_readers_return(tmp_path, name, shape, flat):
    image = sitk.GetImageFromArray(np.zeros(shape, np.uint8))
    image.SetSpacing([0.5, 0.25, 3.0][:len(shape)])
    sitk.WriteImage(image, str(tmp_path / name))
    file = str(tmp_path / name)
    reader = determine_reader_writer_from_file_ending(name[1:], file, verbose=False)()
    labels, properties = reader.read_seg(file)
    assert is_flat(labels.shape[1:], properties["spacing"]) == flat
