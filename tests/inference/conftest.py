"""Fixtures for the tests of inference: threads in place of nnU-Net's processes, and a model of regions."""
from __future__ import annotations

import json
import multiprocessing
import shutil
from importlib import import_module
from multiprocessing.pool import ThreadPool
from pathlib import Path
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
                 "postprocessing.remove_connected_components", "experiment_planning.verify_dataset_integrity"):
        monkeypatch.setattr(import_module(f"nnunetv2.{name}"), "multiprocessing", replacement)
    monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.preprocessing_iterator_fromfiles", preprocess)


@pytest.fixture(scope="session")
def region_model(nnunet, hippocampus) -> Path:
    """Save an untrained model of Dataset008_Regions, whose targets overlap and which has two raw cases."""
    name, configuration = "Dataset008_Regions", "3d_untrained"
    source, raw = (nnunet.raw(dataset) for dataset in ("Dataset004_Hippocampus", name))
    cases = {hippocampus["full"][0]: "full", hippocampus["partial"][0]: "partial"}
    for case in cases:
        for file in (f"imagesTr/{case}_0000.nii.gz", f"labelsTr/{case}.nii.gz"):
            (raw / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, raw / file)
    described = json.loads((source / "dataset.json").read_text())
    described |= {"labels": {"background": 0, "whole": [1, 2], "posterior": [2], "ignore": 3},
                  "regions_class_order": [1, 2], "numTraining": len(cases), "supervision": cases}
    (raw / "dataset.json").write_text(json.dumps(described))

    preprocessed, model = nnunet.preprocessed(name), nnunet.model(name, configuration)
    preprocessed.mkdir()
    plans = json.loads((nnunet.preprocessed(source.name) / "nnUNetPlans.json").read_text()) | {"dataset_name": name}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans))
    shutil.copyfile(raw / "dataset.json", preprocessed / "dataset.json")
    data = "nnUNetPlans_3d_fullres"  # nnU-Net looks at the type of the files there
    (preprocessed / data).symlink_to(nnunet.preprocessed(source.name) / data)
    nnunet.configure(name, configuration, "3d_fullres", {"seed": 3}, features=(4, 8, 8))
    trainer = nnunet.trainer(name, configuration)
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = None  # mirroring takes time
    (model / "fold_0").mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(model / "fold_0" / "checkpoint_final.pth"))
    for file in ("dataset.json", "nnUNetPlans.json"):
        shutil.copyfile(preprocessed / file, model / file.replace("nnUNetPlans", "plans"))
    return model
