"""Fixtures of the tests of training."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest

HIPPOCAMPUS = "Dataset004_Hippocampus"


@pytest.fixture
def split(nnunet, hippocampus):
    """Writes another split, None for no file; the former one comes back at the end."""
    file = nnunet.preprocessed(HIPPOCAMPUS) / "splits_final.json"
    before = file.read_text()
    yield lambda folds: file.unlink() if folds is None else file.write_text(json.dumps(folds))
    file.write_text(before)


@pytest.fixture(autouse=True)
def threads_in_place_of_processes(request, monkeypatch):
    """Let threads preprocess, and write and measure the segmentations of the final validation, except in slow tests.

    Starting a process takes longer than everything that it would do here. The session's `hippocampus_model` is
    validated with processes all the same: it is made before this fixture.
    """
    if "nnunet" not in request.fixturenames or request.node.get_closest_marker("slow"):
        return
    from nnunetv2.evaluation import evaluate_predictions
    from nnunetv2.preprocessing.preprocessors import default_preprocessor

    from nnunet_confkd.training import validation
    monkeypatch.setattr(validation, "ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))
    threads = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    for module in (evaluate_predictions, default_preprocessor):
        monkeypatch.setattr(module, "multiprocessing", threads)
