"""Two label maps in one pass: equal to whole masks, class by class; no copies of the maps; any type and any labels."""
from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage
from scipy.spatial import KDTree

from nnunet_confkd.evaluation import label_pair
from nnunet_confkd.evaluation.label_pair import LabelPair
from nnunet_confkd.evaluation.metrics import MEASURES, measure_case

SPACING = (2.0, 1.3, 0.7)


def masks_of_whole_images(truth, prediction, labels, ignore=None):
    known = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    return np.isin(truth, labels) & known, np.isin(prediction, labels) & known


def measured_as_whole_images(truth, prediction, classes, spacing, ignore=None):
    """Every class as two masks of the whole image, eroded by SciPy: what the measures mean, at any cost."""
    thick = [axis for axis, size in enumerate(truth.shape) if size > 1]
    found = {}
    for name, labels in classes.items():
        masks = masks_of_whole_images(truth, prediction, labels, ignore)
        sizes, both = [int(mask.sum()) for mask in masks], int((masks[0] & masks[1]).sum())
        found[name] = values = dict.fromkeys(MEASURES, math.nan)
        if not sum(sizes):
            continue
        values["Dice"], values["IoU"] = 2 * both / sum(sizes), both / (sum(sizes) - both)
        values["volume_difference_ml"], values["NSD"] = (sizes[1] - sizes[0]) * math.prod(spacing) / 1000, 0.0
        if not all(sizes):
            continue
        points = []
        for mask in masks:
            mask = mask.reshape([mask.shape[axis] for axis in thick])
            points.append(np.argwhere(mask & ~ndimage.binary_erosion(mask)) * [spacing[axis] for axis in thick])
        ways = [KDTree(points[0]).query(points[1])[0], KDTree(points[1]).query(points[0])[0]]
        together = np.concatenate(ways)
        values["HD95_mm"] = max(np.percentile(way, 95) for way in ways)
        values["ASSD_mm"], values["NSD"] = together.mean(), (together <= 1 + 1e-6).mean()
    return found


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12, nan_ok=True), name


def blobs(shape, number, seed=0):
    """A label map of `number` labels in compact pieces, with background between them, and one that differs a little."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(2, *shape))
    fields = [ndimage.gaussian_filter(field, 2) for field in (noise[0], noise[0] + 0.3 * noise[1])]
    low, high = fields[0].min(), fields[0].max()
    maps = [np.clip((field - low) / (high - low) * (number + 1), 0, number).astype(np.int64) for field in fields]
    return [np.where(ndimage.gaussian_filter(noise[1], 3) > 0, labels, 0) for labels in maps]


@pytest.mark.parametrize("slab", [1, 500, 2 ** 20])
@pytest.mark.parametrize("shape", [(14, 20, 17), (1, 30, 40), (30, 1, 20), (40, 50), (1, 1, 30), (30, 40, 1)])
def test_classes_and_regions_are_measured_as_whole_masks_are(monkeypatch, shape, slab):
    monkeypatch.setattr(label_pair, "SLAB", slab)
    truth, prediction = blobs(shape, 6)
    classes = {"1": (1,), "2": (2,), "most": (1, 2, 3, 4), "ends": (1, 5), "all": (1, 2, 3, 4, 5, 6), "none": (9,)}
    spacing = SPACING[-len(shape):]
    assert_same(measure_case(truth, prediction, classes, spacing),
                measured_as_whole_images(truth, prediction, classes, spacing))
    assert_same(measure_case(truth, prediction, classes, spacing, ignore_label=3),
                measured_as_whole_images(truth, prediction, classes, spacing, ignore=3))


@pytest.mark.parametrize("labels, types", [
    ((1, 2, 3), "bBhHilfd"), ((3, 200, 251), "BhHilfd"), ((1, 2, 300), "hHilfd"), ((-3, 0, 7), "bhilfd"),
    ((5, 2 ** 22, 2 ** 23), "ilfd")])
def test_labels_of_any_type_and_size(labels, types):
    for dtype in types:
        assert_labels_of_a_type(labels, np.dtype(dtype))


def assert_labels_of_a_type(labels, dtype):
    values = np.array([17, *labels])  # 17 is of no class
    truth, prediction = (values[of].astype(dtype) for of in blobs((9, 15, 12), 3))
    classes = {"first": labels[:1], "last": labels[2:], "two": labels[1:]}
    assert_same(measure_case(truth, prediction, classes, SPACING),
                measured_as_whole_images(truth, prediction, classes, SPACING))
    # any order of the voxels in memory
    assert_same(measure_case(np.asfortranarray(truth), prediction[::-1][::-1], classes, SPACING),
                measured_as_whole_images(truth, prediction, classes, SPACING))


def test_more_labels_than_a_byte_holds():
    truth, prediction = (of.astype(np.uint16) for of in blobs((12, 30, 30), 400))
    classes = {str(label): (label,) for label in range(1, 401)} | {"all": tuple(range(1, 401))}
    assert_same(measure_case(truth, prediction, classes, SPACING),
                measured_as_whole_images(truth, prediction, classes, SPACING))


def test_fractions_are_no_labels():
    truth = np.array([[1.0, 1.5, 0.0], [1.0, 0.5, 2.0]])
    assert LabelPair(truth, truth, {"1": (1,)}).counts("1") == (2, 2, 2)


def test_counts_and_annotated_voxels():
    truth, prediction = blobs((10, 16, 16), 4)
    for ignore in (None, 0, 4):
        pair = LabelPair(truth, prediction, {"1": (1,), "two": (2, 3), "ignored": (4,)}, ignore)
        assert pair.annotated == (truth.size if ignore is None else int((truth != ignore).sum()))
        for name, labels in (("1", (1,)), ("two", (2, 3)), ("ignored", (4,))):
            a, b = masks_of_whole_images(truth, prediction, labels, ignore)
            assert pair.counts(name) == ((a & b).sum(), a.sum(), b.sum())


def test_an_object_deep_in_an_empty_image(monkeypatch):
    """Slabs without labels are passed over; the ignore label is counted in them all the same."""
    monkeypatch.setattr(label_pair, "SLAB", 64)
    truth, prediction = np.zeros((2, 40, 8, 8), np.uint8)
    truth[21:25, 2:5, 2:5] = prediction[22:26, 2:5, 2:5] = 1
    assert_same(measure_case(truth, prediction, {"1": (1,)}, SPACING),
                measured_as_whole_images(truth, prediction, {"1": (1,)}, SPACING))
    assert LabelPair(truth, prediction, {"1": (1,)}, 0).annotated == 36
    assert LabelPair(truth, prediction, {"0": (0,)}).counts("0")[1] == truth.size - 36


@pytest.mark.parametrize("shape", [(12, 40, 50), (1, 60, 70), (300,)])
@pytest.mark.parametrize("share", [0.3, 0.002])
def test_voxels_far_from_the_other_surface(monkeypatch, shape, share):
    """Many of them are measured by a distance transform, few by a tree, and both as whole masks are."""
    transforms, transform = [], ndimage.distance_transform_edt
    monkeypatch.setattr(ndimage, "distance_transform_edt",
                        lambda *args, **options: transforms.append(args) or transform(*args, **options))
    monkeypatch.setattr(label_pair, "SLAB", 100)
    truth, prediction = np.zeros((2, *shape), np.uint8)
    truth[..., :4] = 1
    prediction[..., :3] = prediction[..., -1:] = 1
    prediction |= (np.random.default_rng(0).random(shape) < share)
    spacing = SPACING[-len(shape):]
    assert_same(measure_case(truth, prediction, {"1": (1,)}, spacing),
                measured_as_whole_images(truth, prediction, {"1": (1,)}, spacing))
    assert len(transforms) == (share == 0.3 or len(shape) == 3)
    # in a larger image that is empty elsewhere, the transform is of the same box
    margins = [(0, 0) if size == 1 else (20, 30) for size in shape]
    assert_same(measure_case(np.pad(truth, margins), np.pad(prediction, margins), {"1": (1,)}, spacing),
                measured_as_whole_images(truth, prediction, {"1": (1,)}, spacing))
    sizes = [array.shape for array, in transforms]
    assert sizes[:len(sizes) // 2] == sizes[len(sizes) // 2:]


def test_maps_of_different_shapes_are_an_error():
    with pytest.raises(ValueError, match="shapes"):
        LabelPair(np.zeros((2, 3)), np.zeros((3, 2)), {"1": (1,)})


def test_real_labels_are_measured_as_whole_masks_are(test_data):
    files = sorted((test_data / "hippocampus" / "labelsTr").glob("hippocampus_*.nii.gz"))[:4]
    assert files
    for file in files:
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        prediction = np.where(np.roll(truth, 1, 1) == 1, 2, np.roll(truth, 2, 2))
        classes = {"1": (1,), "2": (2,), "both": (1, 2)}
        assert_same(measure_case(truth, prediction, classes, SPACING),
                    measured_as_whole_images(truth, prediction, classes, SPACING))


def test_many_classes_need_less_memory_than_one_mask(monkeypatch):
    """117 boxes in 7 million voxels. A single mask of the whole image would be a byte a voxel."""
    monkeypatch.setattr(label_pair, "SLAB", 2 ** 16)
    truth = np.zeros((192, 192, 192), np.uint8)
    for label, corner in enumerate(list(np.ndindex(5, 5, 5))[:117], 1):
        truth[tuple(slice(36 * place + 4, 36 * place + 16) for place in corner)] = label
    prediction = np.roll(truth, 1, 0)
    classes = {str(label): (label,) for label in range(1, 118)}
    tracemalloc.start()
    try:
        found = measure_case(truth, prediction, classes, (1.0, 1.0, 1.0))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(measures["HD95_mm"] == 1 for measures in found.values())
    assert peak < truth.size
