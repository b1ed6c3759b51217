"""The measured maps, and how the export of nnU-Net's predictor is replaced."""
from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import SimpleITK as sitk
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_confkd.inference.prediction import ExportingPredictor, export_and_measure
from nnunet_confkd.inference.uncertainty import EntropyPredictor


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.fixture
def arguments(hippocampus_model):
    """What nnU-Net hands to its export, up to the output file, for a cropped image whose axes are transposed."""
    plans = json.loads((hippocampus_model / "plans.json").read_text())
    plans |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    manager = PlansManager(plans)
    logits = np.random.default_rng(0).normal(0, 2, (3, 4, 6, 5)).astype(np.float32)
    # transposed: (X, Z, Y) = (7, 6, 9), of which (4, 6, 5) from (2, 0, 3) on is left after cropping
    properties = {"spacing": [1.0, 1.0, 1.0], "shape_before_cropping": (7, 6, 9),
                  "bbox_used_for_cropping": [[2, 6], [0, 6], [3, 8]],
                  "shape_after_cropping_and_before_resampling": (4, 6, 5),
                  "sitk_stuff": {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}}
    dataset_json = json.loads((hippocampus_model / "dataset.json").read_text())
    return logits, properties, manager.get_configuration("2d_export"), manager, dataset_json


def test_the_maps_are_cropped_and_transposed_back_as_the_segmentation_is(arguments, tmp_path):
    segmentation, maps = export_and_measure(*arguments, str(tmp_path / "c"), True)
    p = np.load(tmp_path / "c.npz")["probabilities"].astype(np.float64)
    assert p.shape == (3, 6, 9, 7) and segmentation.shape == (6, 9, 7) and segmentation.dtype == np.uint8
    np.testing.assert_array_equal(segmentation, read(tmp_path / "c.nii.gz"))
    np.testing.assert_allclose(maps["entropy"], scipy.stats.entropy(p), atol=1e-6)
    np.testing.assert_allclose(maps["confidence"], p.max(0), atol=1e-6)

    again, maps_again = export_and_measure(*arguments, str(tmp_path / "d"))  # without probabilities
    np.testing.assert_array_equal(again, segmentation)
    assert all(np.array_equal(maps_again[name], maps[name]) for name in maps)
    assert (tmp_path / "c.nii.gz").read_bytes() == (tmp_path / "d.nii.gz").read_bytes()


def test_resampled_logits_are_nnunets_and_are_measured_class_by_class(arguments, tmp_path):
    logits, properties, configuration, plans, dataset_json = arguments
    logits = logits.astype(np.float16)  # as nnU-Net predicts them
    properties = properties | {"shape_after_cropping_and_before_resampling": (7, 6, 9), "spacing": [1.0, 1.5, 0.7],
                               "bbox_used_for_cropping": [[0, 7], [0, 6], [0, 9]]}
    export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, str(tmp_path / "stock"), True)
    expected = np.load(tmp_path / "stock.npz")["probabilities"].astype(np.float64)
    for name, probabilities in (("plain", False), ("more", True)):
        seen = []
        function = configuration.resampling_fn_probabilities
        watched = SimpleNamespace(spacing=configuration.spacing, resampling_fn_probabilities=lambda logits, *args: (
            seen.append(logits.shape), function(logits, *args))[1])
        segmentation, maps = export_and_measure(logits, properties, watched, plans, dataset_json, str(tmp_path / name),
                                                probabilities)
        assert {shape[0] for shape in seen} == {1} and len(seen) >= 3
        assert (tmp_path / f"{name}.nii.gz").read_bytes() == (tmp_path / "stock.nii.gz").read_bytes()
        np.testing.assert_array_equal(segmentation, read(tmp_path / "stock.nii.gz"))
        np.testing.assert_allclose(maps["entropy"], scipy.stats.entropy(expected), atol=1e-6)
        np.testing.assert_allclose(maps["confidence"], expected.max(0), atol=1e-6)
    np.testing.assert_array_equal(np.load(tmp_path / "more.npz")["probabilities"], expected.astype(np.float32))


def test_a_predictor_exports_in_nnunets_worker_processes_and_patches_nothing_for_good(arguments, tmp_path):
    logits, properties, configuration, plans, dataset_json = arguments

    class Predictor(EntropyPredictor):
        def predict_logits_from_preprocessed_data(self, data):
            return torch.from_numpy(logits)

    predictor = Predictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.network, predictor.dataset_json = torch.nn.Identity(), dataset_json
    predictor.plans_manager, predictor.configuration_manager = plans, configuration
    before = predict_from_raw_data.export_prediction_from_logits
    predictor.predict_from_data_iterator(
        [{"data": torch.zeros(1), "data_properties": properties, "ofile": str(tmp_path / "c")}],
        num_processes_segmentation_export=1)
    assert predict_from_raw_data.export_prediction_from_logits is before
    segmentation, maps = export_and_measure(*arguments, str(tmp_path / "d"))
    np.testing.assert_array_equal(read(tmp_path / "c.nii.gz"), segmentation)
    np.testing.assert_array_equal(read(tmp_path / "uncertainty" / "entropy_nats" / "c.nii.gz"), maps["entropy"])
    score = json.loads((tmp_path / "uncertainty" / "scores" / "c.json").read_text())
    assert score["case"] == "c" and score["foreground_voxels"] == (segmentation != 0).sum()


def test_nnunet_s_export_comes_back_after_an_error():
    class Failing(ExportingPredictor):
        def exporter(self):
            return len

    before = predict_from_raw_data.export_prediction_from_logits
    with pytest.raises(AttributeError):  # no configuration
        Failing(device=torch.device("cpu")).predict_from_files_sequential([], None)
    assert predict_from_raw_data.export_prediction_from_logits is before
