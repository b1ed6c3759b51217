"""nnU-Net's predictor with an export of its own, which measures entropy and confidence.

nnU-Net's own code predicts, resamples and writes the segmentation. The maps are measured from the logits that it has resampled to the
original grid: nothing is resampled twice, no probabilities are stored, and the segmentation is the same to the bit.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from types import FunctionType

import numpy as np
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
    export_prediction_from_logits,
)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_confkd.training.losses import entropy


def max_entropy(heads: int, regions: bool) -> float:
    """The largest entropy, in nats: log C for labels, C log 2 for regions."""
    return heads * math.log(2) if regions else math.log(heads)


def measure(logits: np.ndarray | torch.Tensor, regions: bool) -> dict[str, np.ndarray]:
    """Entropy and confidence of a prediction, `(C, *spatial)` -> `(*spatial)`, float32.

    "entropy": in nats, of the softmax, or the sum over the heads' Bernoulli entropies (regions). "confidence": the winning
    probability; with regions that of the head that is least sure, `min_c max(p_c, 1 - p_c)`. One slice at a time: no
    second array of the logits' size.
    """
    logits = torch.as_tensor(logits)
    most = max_entropy(len(logits), regions)
    maps = {name: np.empty(logits.shape[1:], np.float32) for name in ("entropy", "confidence")}
    for i in range(logits.shape[1]):
        slab = logits[None, :, i].float()
        if regions:
            confidence = torch.sigmoid(slab.abs()).amin(1)
        else:
            confidence = torch.softmax(slab, 1).amax(1)
        maps["entropy"][i] = entropy(slab, regions)[0].clamp(0, most)
        maps["confidence"][i] = confidence[0].clamp(0, 1)
    return maps


class _Measuring:
    """A label manager that measures the logits from which it is asked for a segmentation or for probabilities."""

    def __init__(self, labels):
        self.labels, self.maps = labels, None

    def __getattr__(self, name: str):
        return getattr(self.labels, name)

    def convert_logits_to_segmentation(self, logits):
        self.maps = measure(logits, self.labels.has_regions)
        return self.labels.convert_logits_to_segmentation(logits)

    def apply_inference_nonlin(self, logits):
        self.maps = measure(logits, self.labels.has_regions)
        return self.labels.apply_inference_nonlin(logits)


def with_names(function: Callable, **names) -> Callable:
    """A copy of a function of nnU-Net's to which some of its module's names mean something else; the module is untouched."""
    unused = set(names) - set(function.__code__.co_names)
    if unused:
        raise RuntimeError(f"nnU-Net's {function.__qualname__} does not use {sorted(unused)}: another version than was tested?")
    return FunctionType(function.__code__, {**function.__globals__, **names}, function.__name__, function.__defaults__,
                        function.__closure__)


def export_and_measure(*args, **kwargs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """nnU-Net's export_prediction_from_logits. Returns the segmentation that it wrote and, on the same grid, the maps of
    :func:`measure`. What nnU-Net crops away is background by definition: entropy 0, confidence 1."""
    segmentation, maps = None, {}

    def convert(logits, plans_manager, configuration_manager, label_manager, properties, *more, **options):
        nonlocal segmentation
        measuring = _Measuring(label_manager)
        result = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans_manager, configuration_manager, measuring, properties, *more, **options)
        segmentation = result[0] if isinstance(result, tuple) else result
        inside = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])
        for name, outside in (("entropy", 0), ("confidence", 1)):
            whole = np.full(properties["shape_before_cropping"], outside, np.float32)
            whole[inside] = measuring.maps.pop(name)
            maps[name] = whole.transpose(plans_manager.transpose_backward)
        return result

    with_names(export_prediction_from_logits,
               convert_predicted_logits_to_segmentation_with_correct_shape=convert)(*args, **kwargs)
    return segmentation, maps


def _exporting(name: str):
    """nnUNetPredictor's method of this name, which exports with the predictor's own `exporter()`."""
    method = getattr(nnUNetPredictor, name)

    @wraps(method)  # it asks for its own signature
    def exporting(self, *args, **kwargs):
        return with_names(method, export_prediction_from_logits=self.exporter())(self, *args, **kwargs)
    return exporting


class ExportingPredictor(nnUNetPredictor):
    """nnU-Net's predictor with an export of its own; a subclass says which. It goes to other processes, so it must pickle."""

    predict_from_data_iterator = _exporting("predict_from_data_iterator")
    predict_from_files_sequential = _exporting("predict_from_files_sequential")

    def exporter(self) -> Callable:
        raise NotImplementedError
