"""Measures against figures worked out by hand, against brute force and against SimpleITK; statistics against SciPy."""
from __future__ import annotations

import math

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from nnunet_confkd.evaluation.metrics import (
    MEASURES,
    CaseMeasures,
    bootstrap_interval,
    holm,
    measure_case,
    measure_masks,
    paired_statistics,
    statistics,
    surface_distances,
)


def cube(start, shape=(12, 12, 12), size=4):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def surface(mask):
    return mask & ~ndimage.binary_erosion(mask)


def brute_force(truth, prediction, spacing):
    """Every distance from every surface voxel to every other: slow, and nothing to get wrong."""
    a, b = (np.argwhere(surface(mask)) * np.asarray(spacing) for mask in (prediction, truth))
    apart = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return apart.min(1), apart.min(0)


@pytest.mark.parametrize("axis, mm", [(0, 3.0), (1, 1.5), (2, 0.5)])
def test_a_shifted_cube_is_measured_in_mm_of_its_axis(axis, mm):
    spacing = (3.0, 1.5, 0.5)
    to = [4, 4, 4]
    to[axis] += 1
    found = measure_masks(cube((4, 4, 4)), cube(to), spacing, tolerance_mm=0.4)
    assert found["Dice"] == pytest.approx(2 * 48 / 128) and found["IoU"] == pytest.approx(48 / 80)
    # the leading face has 16 of 56 surface voxels, all one voxel away: far more than 5 %
    assert found["HD95_mm"] == pytest.approx(mm)
    there, back = brute_force(cube((4, 4, 4)), cube(to), spacing)
    assert found["ASSD_mm"] == pytest.approx(np.concatenate((there, back)).mean())
    assert found["NSD"] == pytest.approx((np.concatenate((there, back)) <= 0.4).mean()) and found["NSD"] < 1
    assert measure_masks(cube((4, 4, 4)), cube(to), spacing, tolerance_mm=mm)["NSD"] == 1
    assert found["volume_difference_ml"] == 0


def test_two_points_by_hand():
    truth, prediction = np.zeros((2, 9, 9, 9), bool)
    truth[2, 2, 2] = prediction[4, 5, 2] = prediction[4, 5, 3] = True
    # 2 * 2 mm and 3 * 1 mm: 5 mm; the second point is 0.5 mm further along the last axis
    near, far = 5.0, math.sqrt(25 + 0.25)
    found = measure_masks(truth, prediction, (2.0, 1.0, 0.5), tolerance_mm=5.0)
    assert found["Dice"] == 0 and found["HD95_mm"] == pytest.approx(near + 0.95 * (far - near))
    assert found["ASSD_mm"] == pytest.approx((near + far + near) / 3) and found["NSD"] == pytest.approx(2 / 3)
    assert found["volume_difference_ml"] == pytest.approx(0.001)


def test_identical_masks_are_perfect():
    found = measure_masks(cube((0, 3, 8)), cube((0, 3, 8)), (3, 1, 1))
    assert found == {"Dice": 1, "IoU": 1, "HD95_mm": 0, "ASSD_mm": 0, "NSD": 1, "volume_difference_ml": 0}


def test_the_rules_of_empty_masks():
    empty, full = np.zeros((12, 12, 12), bool), cube((1, 1, 1))
    assert all(math.isnan(v) for v in measure_masks(empty, empty, (1, 1, 1)).values())
    for truth, prediction, ml in ((full, empty, -0.064), (empty, full, 0.064)):
        found = measure_masks(truth, prediction, (1, 1, 1))
        assert found["Dice"] == found["IoU"] == found["NSD"] == 0
        assert math.isnan(found["HD95_mm"]) and math.isnan(found["ASSD_mm"])
        assert found["volume_difference_ml"] == pytest.approx(ml)


def test_what_touches_the_border_has_its_surface_there():
    whole = np.ones((6, 6, 6), bool)
    there, back = surface_distances(whole, cube((1, 1, 1), (6, 6, 6)), (1, 1, 1))
    assert len(there) == 56 and len(back) == 216 - 64
    assert set(there) == {1.0} and back.max() == pytest.approx(math.sqrt(3))


def test_an_image_of_one_slice_is_measured_as_an_outline():
    square, shifted = np.zeros((2, 1, 20, 20), bool)
    square[0, 4:14, 4:14] = shifted[0, 5:15, 4:14] = True
    thin = measure_masks(square, shifted, (8.0, 2.0, 1.0), 1.0)
    assert thin == measure_masks(square[0], shifted[0], (2.0, 1.0), 1.0) | {"volume_difference_ml": 0}
    there, back = brute_force(square[0], shifted[0], (2.0, 1.0))
    assert thin["ASSD_mm"] == pytest.approx(np.concatenate((there, back)).mean())


def distance_map(image):
    """SimpleITK's distance in mm from each voxel to the nearest one of the surface."""
    contour = sitk.BinaryContour(image, False)  # False: face neighbours
    distance = sitk.SignedMaurerDistanceMap(contour, squaredDistance=False, useImageSpacing=True)
    return np.maximum(sitk.GetArrayFromImage(distance), 0)


@pytest.mark.parametrize("seed", range(3))
def test_blobs_agree_with_brute_force_and_simpleitk(seed):
    rng = np.random.default_rng(seed)
    spacing = tuple(rng.uniform(0.4, 4, 3))
    masks = [ndimage.gaussian_filter(rng.normal(size=(10, 24, 18)), 2) > 0.03 for _ in range(2)]
    found = measure_masks(*masks, spacing, tolerance_mm=1.7)
    images = []
    for mask in masks:  # with a rim: SimpleITK does not take the border of the image for a surface
        images.append(sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8)))
        images[-1].SetSpacing(spacing[::-1])
    truth, prediction = (distance_map(image) for image in images)
    simple = [of[np.pad(surface(mask), 1)] for of, mask in ((truth, masks[1]), (prediction, masks[0]))]
    for there, back in (brute_force(*masks, spacing), simple):
        for ours, expected in zip(surface_distances(*masks, spacing), (there, back)):
            np.testing.assert_allclose(np.sort(ours), np.sort(expected), atol=1e-5)
        assert found["HD95_mm"] == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), abs=1e-5)
        together = np.concatenate((there, back))
        assert found["ASSD_mm"] == pytest.approx(together.mean(), abs=1e-5)
        assert found["NSD"] == (together <= 1.7).mean()
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*images)
    assert found["Dice"] == pytest.approx(overlap.GetDiceCoefficient())
    assert found["IoU"] == pytest.approx(overlap.GetJaccardCoefficient())


def test_real_labels_agree_with_simpleitk(test_data):
    """Hausdorff distances of whole objects (SimpleITK has no percentile), by shifted labels of real cases."""
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[:4]
    assert files
    for file in files:
        image = sitk.Cast(sitk.ReadImage(str(file)) > 0, sitk.sitkUInt8)
        image.SetSpacing((0.7, 1.3, 2.0))
        truth = sitk.GetArrayFromImage(image).astype(bool)
        prediction = ndimage.binary_dilation(np.roll(truth, 1, 1))
        other = sitk.GetImageFromArray(prediction.astype(np.uint8))
        other.CopyInformation(image)
        hausdorff = sitk.HausdorffDistanceImageFilter()
        hausdorff.Execute(image, other)
        there, back = surface_distances(truth, prediction, (2.0, 1.3, 0.7))
        # SimpleITK's is from volume to volume: never more than from surface to surface
        assert max(there.max(), back.max()) >= hausdorff.GetHausdorffDistance() - 1e-4
        outline = [sitk.GetImageFromArray(surface(mask).astype(np.uint8)) for mask in (truth, prediction)]
        for of in outline:
            of.CopyInformation(image)
        hausdorff.Execute(*outline)
        assert max(there.max(), back.max()) == pytest.approx(hausdorff.GetHausdorffDistance(), abs=1e-4)


def test_regions_are_unions_and_ignored_voxels_belong_to_nothing():
    truth, prediction = np.zeros((2, 8, 8), np.uint8)
    truth[1:4, 1:7], truth[4:6, 1:7], truth[:, 6:] = 1, 2, 3  # 3 is "ignore"
    prediction[1:4, 1:7], prediction[4:7, 1:7] = 2, 1
    found = measure_case(truth, prediction, {"whole": (1, 2), "1": (1,)}, (1.0, 1.0), ignore_label=3)
    # columns 6 and 7 do not count: 25 voxels of truth, 30 of prediction
    assert found["whole"]["Dice"] == pytest.approx(2 * 25 / 55) and found["1"]["Dice"] == 0
    assert found["whole"]["volume_difference_ml"] == pytest.approx(0.005)
    assert found["whole"]["HD95_mm"] == pytest.approx(1.0)


# ---- many cases -----------------------------------------------------------------------------------------------------

def test_statistics_leave_nan_out():
    found = statistics([1.0, math.nan, 3.0])
    assert found["mean"] == 2 and found["n"] == 2 and found["sd"] == pytest.approx(math.sqrt(2))
    assert (found["ci_low"], found["ci_high"]) == (1, 3)
    alone, none = statistics([0.5]), statistics([math.nan])
    assert alone["mean"] == 0.5 and math.isnan(alone["ci_low"]) and none["n"] == 0 and math.isnan(none["mean"])


def test_the_interval_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std(ddof=1) / 20  # of the normal distribution
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)
    # where seeds disagree, drawing seeds as well widens it
    table = np.stack([values, values + 1, values - 1])
    assert np.ptp(bootstrap_interval(table)) > 2 * np.ptp(bootstrap_interval(table.mean(0)))


def test_a_second_case_of_each_patient_that_repeats_the_first_narrows_nothing():
    values, others = np.random.default_rng(1).normal(0.8, 0.1, (2, 12))
    patients = [f"p{i}" for i in range(12)]
    once, twice = statistics(values), statistics(np.tile(values, 2), patients * 2)
    assert (twice["ci_low"], twice["ci_high"]) == pytest.approx((once["ci_low"], once["ci_high"]))
    assert (twice["n"], twice["patients"], once["patients"]) == (24, 12, 12)
    assert twice["mean"] == pytest.approx(once["mean"])
    # taken as 24 patients, the same values claim an interval that is narrower by about the root of 2
    wrong = statistics(np.tile(values, 2))
    assert wrong["ci_high"] - wrong["ci_low"] < 0.8 * (once["ci_high"] - once["ci_low"])
    paired = paired_statistics(np.tile(values, 2), np.tile(others, 2), patients * 2)
    assert paired["p"] == pytest.approx(paired_statistics(values, others)["p"])
    assert paired_statistics(np.tile(values, 2), np.tile(others, 2))["p"] < paired["p"]
    # of several seeds, too
    table = np.stack([values, others])
    assert bootstrap_interval(np.tile(table, 2), patients * 2) == pytest.approx(bootstrap_interval(table))


def clusters():
    """30 patients with 1 to 5 similar cases: the values and the patient of each case. Two values are undefined."""
    rng = np.random.default_rng(2)
    patients = np.repeat([f"p{i}" for i in range(30)], rng.integers(1, 6, 30))
    values = rng.normal(0, 1, 30)[[int(p[1:]) for p in patients]] + rng.normal(0, 0.2, len(patients))
    values[[3, 17]] = math.nan
    return values, patients


def drawn_means(table, patients, draws=4000):
    """The means of bootstrap draws, patient by patient and seed by seed: slow, and nothing to get wrong."""
    rng, names = np.random.default_rng(7), np.unique(patients)
    means = []
    for _ in range(draws):
        seeds = rng.choice(len(table), len(table))
        cases = np.concatenate([np.flatnonzero(patients == name) for name in rng.choice(names, len(names))])
        means.append(np.nanmean(table[seeds][:, cases]))
    return means


def test_the_interval_is_that_of_drawing_whole_patients():
    values, patients = clusters()
    found = statistics(values, list(patients))
    expected = np.percentile(drawn_means(values[None], patients), (2.5, 97.5))
    assert (found["ci_low"], found["ci_high"]) == pytest.approx(expected, abs=0.02)
    assert found["mean"] == pytest.approx(np.nanmean(values))
    assert found["patients"] == 30 and found["n"] == len(values) - 2
    # cases drawn one by one would claim more certainty
    assert np.ptp(expected) > 1.2 * np.ptp(bootstrap_interval(values))


def test_the_interval_over_several_seeds_draws_seeds_and_patients():
    values, patients = clusters()
    table = np.stack([values, values + 1, values - 1])
    expected = np.percentile(drawn_means(table, patients), (2.5, 97.5))
    assert bootstrap_interval(table, list(patients)) == pytest.approx(expected, abs=0.06)


def test_a_draw_without_any_value_does_not_count():
    """Of two patients of which one has no value, every fourth draw is empty."""
    assert bootstrap_interval(np.array([math.nan, 0.5])) == (0.5, 0.5)


def test_one_patient_alone_has_no_interval():
    found = statistics([0.5, 0.7], ["a", "a"])
    assert found["n"] == 2 and found["patients"] == 1 and math.isnan(found["ci_low"]) and math.isnan(found["ci_high"])


def test_the_paired_test_counts_patients():
    theirs = np.zeros(10)
    ours = np.arange(1, 11) / 100  # all of one sign: p is 2 of the 2^n signs
    assert paired_statistics(ours, theirs, ["abcde"[i // 2] for i in range(10)])["p"] == pytest.approx(2 / 2 ** 5)
    assert paired_statistics(ours, theirs)["p"] == pytest.approx(2 / 2 ** 10)
    # gains and losses of a patient that cancel out are no evidence
    assert paired_statistics([0.5, -0.5, 0.25, -0.25], np.zeros(4), ["a", "a", "b", "b"])["p"] == 1


def test_paired_differences_and_their_p():
    ours, theirs = [0.9, 0.8, 0.7, 0.95, 0.6, math.nan], [0.8, 0.75, 0.65, 0.9, 0.5, 0.1]
    found = paired_statistics(ours, theirs)
    assert found["mean"] == pytest.approx(0.07) and found["n"] == 5
    assert found["p"] == pytest.approx(2 / 2 ** 5)  # all five of one sign: the two extremes of 2^5
    assert paired_statistics([1, 2], [1, 2])["p"] == 1 and math.isnan(paired_statistics([math.nan], [1])["p"])


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, math.nan]) == pytest.approx([0.03, 0.06, 0.06, math.nan], nan_ok=True)
    assert holm([0.5, 0.9]) == [1, 1]


def test_the_foreground_is_a_cases_mean_over_its_classes():
    measures = [dict.fromkeys(MEASURES, value) for value in (0.5, 1.0, math.nan)]
    cases = {"a": {"1": measures[0], "2": measures[1]}, "b": {"1": measures[1], "2": measures[2]},
             "c": {"1": measures[2], "2": measures[2]}}
    found = CaseMeasures(classes={"1": (1,), "2": (2,)}, cases=cases, patients={"a": "p", "b": "p"})
    assert found.values("foreground", "Dice") == pytest.approx([0.75, 1, math.nan], nan_ok=True)
    assert found.names == ["1", "2", "foreground"] and found.patient_of_each == ["p", "p", "c"]
    assert CaseMeasures(classes={"1": (1,)}, cases=cases).names == ["1"]
    assert found.statistics()["2"]["Dice"]["n"] == 1


def test_every_measure_is_reported():
    assert set(measure_masks(cube((1, 1, 1)), cube((2, 2, 2)), (1, 1, 1))) == set(MEASURES)


def test_without_a_spacing_there_are_no_distances_and_volumes():
    label = cube((1, 1, 1)).astype(int)
    found = measure_case(label, label, {"1": (1,)}, None)["1"]
    assert found["Dice"] == found["IoU"] == 1 and sum(math.isnan(value) for value in found.values()) == 4
