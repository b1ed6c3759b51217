"""nnU-Net's predictor with another export, which also measures the entropy and the confidence of each voxel.

nnU-Net's own code predicts, resamples and writes the segmentation. The maps are measured from the logits that nnU-Net
has resampled to the original grid. So nothing is resampled twice, no probabilities are stored, and the segmentation is
the same to the bit.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from functools import wraps
from unittest import mock

import numpy as np
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_confkd.training.losses import entropy


def max_entropy(heads: int, regions: bool) -> float:
    """Compute the largest possible entropy of a voxel, in nats: log C for labels, C log 2 for regions."""
    return heads * math.log(2) if regions else math.log(heads)


def normalised_entropy(entropy_nats: np.ndarray, heads: int, regions: bool) -> np.ndarray:
    """Divide a float32 map of the entropy in nats by the largest possible entropy; the result is from 0 to 1."""
    return entropy_nats / np.float32(max_entropy(heads, regions))


def measure(logits: np.ndarray | torch.Tensor, regions: bool) -> dict[str, np.ndarray]:
    """Measure the entropy and the confidence of a prediction.

    One slice is measured at a time, so that no second array of the size of the logits is needed.

    Args:
        logits: Logits of any floating point type, `(C, *spatial)`.
        regions: Whether the C heads are regions that may overlap. Otherwise they are labels that exclude each other.

    Returns:
        Two float32 maps, `(*spatial)`:

        - "entropy", in nats: that of the softmax, or with regions the sum of the heads' Bernoulli entropies.
        - "confidence": the largest probability, or with regions the confidence of the least confident head,
          `min_c max(p_c, 1 - p_c)`.
    """
    logits = torch.as_tensor(logits)
    largest = max_entropy(len(logits), regions)
    maps = {name: np.empty(logits.shape[1:], np.float32) for name in ("entropy", "confidence")}
    for i in range(logits.shape[1]):
        piece = logits[None, :, i].float()
        if regions:
            confidence = torch.sigmoid(piece.abs()).amin(1)
        else:
            confidence = torch.softmax(piece, 1).amax(1)
        maps["entropy"][i] = entropy(piece, regions)[0].clamp(0, largest)
        maps["confidence"][i] = confidence[0].clamp(0, 1)
    return maps


class _MeasuringLabels:
    """A label manager that measures the logits which it converts, and keeps the resulting segmentation."""

    def __init__(self, labels) -> None:
        self.labels = labels
        self.maps: dict[str, np.ndarray] = {}
        self.segmentation: np.ndarray | None = None  # of the type that nnU-Net writes

    def __getattr__(self, name: str):
        return getattr(self.labels, name)

    def convert_logits_to_segmentation(self, logits):
        self.maps = measure(logits, self.labels.has_regions)
        return self._keep(self.labels.convert_logits_to_segmentation(logits))

    def apply_inference_nonlin(self, logits):
        self.maps = measure(logits, self.labels.has_regions)
        return self.labels.apply_inference_nonlin(logits)

    def convert_probabilities_to_segmentation(self, probabilities):
        return self._keep(self.labels.convert_probabilities_to_segmentation(probabilities))

    def _keep(self, segmentation):
        self.segmentation = np.asarray(segmentation).astype(
            np.uint8 if len(self.labels.foreground_labels) < 255 else np.uint16)
        return segmentation


def export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json: dict, output: str,
                       *args, **kwargs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Write a prediction with nnU-Net's `export_prediction_from_logits`, which has the same arguments, and measure it.

    Returns:
        The segmentation that nnU-Net wrote, and the maps of :func:`measure`, all on the grid of the original image.
        The margins that nnU-Net crops away are background by definition: they have entropy 0 and confidence 1.
    """
    labels = _MeasuringLabels(plans_manager.get_label_manager(dataset_json))
    measuring_plans = copy(plans_manager)
    measuring_plans.get_label_manager = lambda _: labels
    export_prediction_from_logits(logits, properties, configuration_manager, measuring_plans, dataset_json, output,
                                  *args, **kwargs)
    cropped = tuple(slice(*bounds) for bounds in properties["bbox_used_for_cropping"])

    def uncropped(voxels: np.ndarray, margin: int) -> np.ndarray:
        whole = np.full(properties["shape_before_cropping"], margin, voxels.dtype)
        whole[cropped] = voxels
        return whole.transpose(plans_manager.transpose_backward)

    maps = {name: uncropped(labels.maps.pop(name), margin) for name, margin in (("entropy", 0), ("confidence", 1))}
    return uncropped(labels.segmentation, 0), maps


def _with_own_export(method: Callable) -> Callable:
    """Make a method of nnUNetPredictor call the predictor's own `exporter()` in place of nnU-Net's export.

    The signature is kept, because nnU-Net's methods inspect it.
    """
    @wraps(method)
    def exporting(self, *args, **kwargs):
        with mock.patch.object(predict_from_raw_data, "export_prediction_from_logits", self.exporter()):
            return method(self, *args, **kwargs)
    return exporting


class ExportingPredictor(nnUNetPredictor):
    """nnU-Net's predictor with another export. Subclasses say which.

    nnU-Net has no hook for the export: its methods call a function of their module. They are called while that name
    is patched in the main process. Worker processes are not patched: they get the function itself, pickled.
    """

    predict_from_data_iterator = _with_own_export(nnUNetPredictor.predict_from_data_iterator)
    predict_from_files_sequential = _with_own_export(nnUNetPredictor.predict_from_files_sequential)

    def exporter(self) -> Callable:
        """Return what replaces nnU-Net's `export_prediction_from_logits`. It must be picklable."""
        raise NotImplementedError
