"""A fixture for the tests of inference: threads in place of nnU-Net's processes."""
from __future__ import annotations

import multiprocessing
from importlib import import_module
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture
def threads(monkeypatch):
    """Let nnU-Net work in threads, because each of its processes takes seconds to start."""
    def preprocess(sources, previous, outputs, plans, dataset_json, configuration, *_):
        for files, output in zip(sources, outputs):
            data, _, properties = configuration.preprocessor_class(verbose=False).run_case(
                files, None, plans, configuration, dataset_json)
            yield {"data": torch.from_numpy(data).float(), "data_properties": properties, "ofile": output}

    replacement = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool),
                                  TimeoutError=multiprocessing.TimeoutError, cpu_count=lambda: 1)
    for name in ("inference.predict_from_raw_data", "evaluation.evaluate_predictions", "ensembling.ensemble",
                 "postprocessing.remove_connected_components", "preprocessing.preprocessors.default_preprocessor",
                 "experiment_planning.dataset_fingerprint.fingerprint_extractor"):
        monkeypatch.setattr(import_module(f"nnunetv2.{name}"), "multiprocessing", replacement)
    monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.preprocessing_iterator_fromfiles", preprocess)
