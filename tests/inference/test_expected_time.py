"""The expected time on a CPU: what it is made of."""
from __future__ import annotations

import json

import pytest
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

from nnunet_confkd.inference import expected_time
from nnunet_confkd.inference.expected_time import prediction_text, training_text, windows

HIPPOCAMPUS = "Dataset004_Hippocampus"


@pytest.mark.parametrize("size, patch", [((40, 56, 40), (40, 56, 40)), ((100, 130, 33), (64, 48, 40)),
                                         ((9, 130, 256), (128, 128)), ((5, 10, 10), (16, 16))])
def test_the_windows_are_as_many_as_nnunets(size, patch):
    slices, image = size[:len(size) - len(patch)], size[len(size) - len(patch):]
    padded = [max(pair) for pair in zip(image, patch)]
    expected = 1
    for steps in compute_steps_for_sliding_window(tuple(padded), patch, 0.5):
        expected *= len(steps)
    assert windows(size, patch) == expected * (slices[0] if slices else 1)


def test_the_time_grows_with_epochs_folds_and_mirroring(nnunet, hippocampus, hippocampus_model, monkeypatch):
    monkeypatch.setattr(expected_time, "seconds_per_pass", lambda network, shape, training: 0.5 + training)
    monkeypatch.setattr(expected_time, "duration", lambda seconds: f"{seconds:.6f}")
    folder = nnunet.preprocessed(HIPPOCAMPUS)

    def seconds(text: str) -> float:
        return float(text.split("take ")[1].split()[0])

    nnunet.configure(HIPPOCAMPUS, "2d_time", "2d", {})
    once = seconds(training_text(folder, "nnUNetPlans", "2d_time", 1, 10))
    assert seconds(training_text(folder, "nnUNetPlans", "2d_time", 3, 20)) == pytest.approx(6 * once, rel=1e-4)
    one = seconds(prediction_text(hippocampus_model))
    assert seconds(prediction_text(hippocampus_model, 2)) == pytest.approx(2 * one, rel=1e-4)
    assert seconds(prediction_text(hippocampus_model, 1, mirroring=False)) == pytest.approx(one / 4, rel=1e-4)


def test_a_model_that_is_not_as_nnunet_writes_it_has_no_expected_time(tmp_path):
    assert prediction_text(tmp_path) is None
    (tmp_path / "plans.json").write_text(json.dumps({"plans_name": "a", "dataset_name": "b", "configurations": {}}))
    assert prediction_text(tmp_path) is None
