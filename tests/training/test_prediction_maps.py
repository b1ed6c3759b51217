"""Maps of a prediction, from logits a part at a time: against SciPy and against nnU-Net; and their memory."""
from __future__ import annotations

import math
import tracemalloc
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_confkd.training import prediction_maps
from nnunet_confkd.training.prediction_maps import StreamingExport, maps_of, max_entropy


def manager(heads: int, regions: bool) -> LabelManager:
    """nnU-Net's label manager of so many heads. The regions are painted in the order of their heads."""
    if regions:
        names = {f"r{head}": list(range(head, heads + 1)) for head in range(1, heads + 1)}
        return LabelManager({"background": 0, **names}, list(range(1, heads + 1)))
    return LabelManager({"background": 0, **{f"c{head}": head for head in range(1, heads)}}, None)


def measure(logits, regions: bool) -> dict[str, np.ndarray]:
    maps = maps_of(logits, manager(len(logits), regions))
    return {"entropy": maps.entropy, "confidence": maps.confidence}


def test_the_entropy_of_equal_logits_is_log_C_and_of_certainty_0():
    assert max_entropy(4, False) == math.log(4) and max_entropy(4, True) == 4 * math.log(2)
    logits = np.zeros((4, 2, 1, 3), np.float32)
    logits[1, 1] = 1e4  # certain of class 1 in the second slice
    maps = measure(logits, False)
    np.testing.assert_allclose(maps["entropy"], np.repeat([[[math.log(4)]], [[0]]], 3, axis=2), atol=1e-6)
    np.testing.assert_allclose(maps["confidence"], np.repeat([[[0.25]], [[1]]], 3, axis=2), atol=1e-6)
    # regions: 4 heads of log 2 at logits 0; three of them where one is certain
    maps = measure(logits, True)
    np.testing.assert_allclose(maps["entropy"][:, 0, 0], [4 * math.log(2), 3 * math.log(2)], rtol=1e-6)
    np.testing.assert_allclose(maps["confidence"][:, 0, 0], [0.5, 0.5])


def test_the_confidence_of_regions_is_that_of_the_least_sure_head():
    # sigmoid(log 9) = 0.9; sigmoid(-log 4) = 0.2, of which the head is 0.8 sure
    logits = np.log(np.array([[[[9.0]]], [[[1 / 4]]]]))
    np.testing.assert_allclose(measure(logits, True)["confidence"], [[[0.8]]], rtol=1e-6)


def test_half_precision_is_measured_in_full_and_the_logits_are_left_alone():
    logits = np.random.default_rng(0).normal(0, 3, (3, 4, 5, 6)).astype(np.float16)
    before = logits.copy()
    maps = measure(logits, False)
    p = scipy.special.softmax(logits.astype(np.float64), 0)
    np.testing.assert_allclose(maps["entropy"], scipy.stats.entropy(p), atol=1e-6)
    np.testing.assert_allclose(maps["confidence"], p.max(0), atol=1e-6)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("slab", [1, 40, 10 ** 6])
@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("heads, dtype", [(2, np.float32), (5, np.float16), (300, np.float16)])
def test_the_segmentation_is_nnunets_and_the_maps_are_scipys(monkeypatch, slab, regions, heads, dtype):
    monkeypatch.setattr(prediction_maps, "SLAB", slab)
    labels = manager(heads, regions)
    logits = np.random.default_rng(0).normal(0, 4, (heads, 5, 6, 7)).astype(dtype)
    logits[:, 1] = np.round(logits[:, 1])  # ties
    logits[:, 2, 0] *= 50
    for given in (logits, torch.from_numpy(logits)):
        maps = maps_of(given, labels)
        expected = np.asarray(labels.convert_logits_to_segmentation(given))
        np.testing.assert_array_equal(maps.segmentation, expected)
        assert maps.segmentation.dtype == (np.uint8 if heads < 200 else np.uint16)
        alone, less = maps_of(given, labels, measured=()), maps_of(given, labels, measured=["confidence"])
        np.testing.assert_array_equal(alone.segmentation, expected)
        np.testing.assert_array_equal(less.confidence, maps.confidence)
        assert alone.confidence is alone.entropy is less.entropy is None
    exact = logits.astype(np.float64)
    if regions:
        p = scipy.special.expit(exact)
        entropy = (scipy.special.entr(p) + scipy.special.entr(scipy.special.expit(-exact))).sum(0)
        confidence = np.maximum(p, 1 - p).min(0)
        np.testing.assert_allclose(maps_of(logits, labels, heads=True).heads, p, atol=1e-6)
    else:
        p = scipy.special.softmax(exact, 0)
        entropy, confidence = scipy.stats.entropy(p), p.max(0)
        assert maps_of(logits, labels, heads=True).heads is None
    np.testing.assert_allclose(maps.entropy, entropy, atol=1e-6 * max(1, math.log(heads)) * (heads if regions else 1))
    np.testing.assert_allclose(maps.confidence, confidence, atol=1e-6 if heads < 10 else 4e-6)
    assert 0 <= maps.entropy.min() and maps.entropy.max() <= np.float32(max_entropy(heads, regions))


@pytest.mark.parametrize("regions", [False, True])
def test_no_array_of_the_size_of_the_logits_is_made(monkeypatch, regions):
    """40 heads: 80 bytes a voxel. Without the maps that are asked for, a byte a voxel is left for temporaries."""
    monkeypatch.setattr(prediction_maps, "SLAB", 2 ** 12)
    logits, labels = np.zeros((40, 64, 64, 64), np.float16), manager(40, regions)

    def resample(heads):
        assert len(heads) == 1
        return heads[..., :-1]

    maps_of(logits[:, :2], labels)
    for options in ({}, {"resample": resample, "shape": (64, 64, 63)}):
        tracemalloc.start()
        try:
            maps = maps_of(logits, labels, **options)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        kept = maps.segmentation.nbytes + maps.entropy.nbytes + maps.confidence.nbytes
        largest = 4 * maps.segmentation.size if options and not regions else 0  # of all heads so far
        assert peak < kept + largest + 2 ** 18


@pytest.mark.parametrize("slab", [1, 10 ** 6])
@pytest.mark.parametrize("old, new, spacings, options, sliced", [
    ((5, 9, 11), (5, 20, 17), ((1, 2, 2), (1, 1, 1)), {"order": 1, "force_separate_z": None}, True),
    ((5, 20, 17), (5, 9, 11), ((5, 1, 1), (5, 2, 2)), {"order": 1, "force_separate_z": None}, True),  # thick slices
    ((5, 9, 11), (5, 20, 17), ((1, 5, 2), (1, 2, 1)), {"order": 1, "force_separate_z": None}, False),  # of axis 1
    ((5, 9, 11), (5, 20, 17), ((1, 2, 2), (1, 1, 1)), {"order": 3}, False),
    ((5, 9, 11), (7, 20, 17), ((1, 2, 2), (1, 1, 1)), {"order": 1}, False)])
def test_resampling_within_slices_is_nnunets_to_the_bit(monkeypatch, slab, old, new, spacings, options, sliced):
    monkeypatch.setattr(prediction_maps, "SLAB", slab)
    function, labels = partial(resample_data_or_seg_to_shape, is_seg=False, order_z=0, **options), manager(4, False)
    logits = np.random.default_rng(0).normal(0, 4, (4, *old)).astype(np.float16)
    export = StreamingExport(SimpleNamespace(get_label_manager=lambda _: labels),
                             SimpleNamespace(resampling_fn_probabilities=function), {}, measured=("confidence",))
    export.configuration.resampling_fn_probabilities(torch.from_numpy(logits), new, *spacings)
    assert export.configuration.by_slices == sliced
    expected = function(logits, new, *spacings)
    np.testing.assert_array_equal(export.resampled(logits), expected)
    np.testing.assert_array_equal(export.segment(torch.from_numpy(logits)), expected.argmax(0))
    probabilities = scipy.special.softmax(expected.astype(float), 0)
    np.testing.assert_allclose(export.maps.confidence, probabilities.max(0), atol=1e-6)
