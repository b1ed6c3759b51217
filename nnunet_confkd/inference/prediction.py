"""nnU-Net's predictor with another export, which also measures the entropy and the confidence of each voxel.

nnU-Net's own code predicts, resamples and writes the segmentation. The maps are measured from the logits that nnU-Net's
function has resampled to the original grid, class by class (`training.prediction_maps`). So nothing is resampled twice,
no probabilities are stored, and the segmentation is the same to the bit.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from unittest import mock

import numpy as np
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_confkd.training.prediction_maps import StreamingExport, max_entropy


def normalised_entropy(entropy_nats: np.ndarray, heads: int, regions: bool) -> np.ndarray:
    """Divide a float32 map of the entropy in nats by the largest possible entropy; the result is from 0 to 1.

    The map itself is changed, because a copy of a large one takes as much memory again.
    """
    entropy_nats /= np.float32(max_entropy(heads, regions))
    return entropy_nats


def export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json: dict, output: str,
                       *args, **kwargs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Write a prediction with nnU-Net's `export_prediction_from_logits`, which has the same arguments, and measure it.

    Returns:
        The segmentation that nnU-Net wrote, and the maps "entropy" and "confidence" (see `PredictionMaps`), all on the
        grid of the original image. The margins that nnU-Net crops away are background by definition: they have entropy
        0 and confidence 1.
    """
    export = StreamingExport(plans_manager, configuration_manager, dataset_json)
    export_prediction_from_logits(logits, properties, export.configuration, export.plans, dataset_json, output,
                                  *args, **kwargs)
    maps = export.maps
    return (export.uncropped(maps.segmentation, 0, properties),
            {"entropy": export.uncropped(maps.entropy, 0, properties),
             "confidence": export.uncropped(maps.confidence, 1, properties)})


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
