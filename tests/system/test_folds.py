"""The README's recipe, then all that nnU-Net offers for five folds: the best configuration, an ensemble, a cascade."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError

DATASET = "Dataset301_Recipe"
SHORT = {"epochs": 1, "iterations_per_epoch": 2, "seed": 0}
MODELS = [{"configuration": configuration, "trainer": "ConfKDTrainer", "plans": "nnUNetPlans"} for configuration in ("2d_small", "3d_small")]


def generate(folder, kind, count):
    """Bright balls in noise; of the partial labels (255: not annotated) a slice and a half is annotated."""
    rng = np.random.default_rng(len(kind))
    for k in range(count):
        center, grid = rng.integers(7, 10, 3), np.indices((16, 16, 16))
        label = (((grid.T - center).T ** 2).sum(0) < rng.integers(16, 26)).astype(np.uint8)
        image = (label + rng.normal(0, 0.3, label.shape)).astype(np.float32)
        if kind == "partial":
            label[:7], label[9:], label[8, 8:] = 255, 255, 255
        for sub, array in (("images", image), ("labels", label)):
            if (kind, sub) != ("unlabelled", "labels"):
                file = folder / kind / sub / f"{kind}{k}.nii.gz"
                file.parent.mkdir(parents=True, exist_ok=True)
                sitk.WriteImage(sitk.GetImageFromArray(array), str(file))


@pytest.fixture(scope="module", autouse=True)
def threads():
    """Sixteen trainings, each with its validation, would start a hundred processes, which take seconds each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunet_confkd.training.validation.ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))
        for name in ("evaluation.evaluate_predictions", "ensembling.ensemble", "postprocessing.remove_connected_components",
                     "experiment_planning.dataset_fingerprint.fingerprint_extractor", "preprocessing.preprocessors.default_preprocessor"):
            patch.setattr(import_module(f"nnunetv2.{name}"), "multiprocessing",
                          SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool)))
        yield


@pytest.fixture(scope="module")
def recipe(nnunet, tmp_path_factory):
    """mix, check, plan; and configurations of a small network."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    folder = tmp_path_factory.mktemp("recipe")
    for kind, count in (("full", 5), ("partial", 2), ("unlabelled", 1)):
        generate(folder, kind, count)
    generate(folder, "test", 1)
    assert cli.main(["mix", "--full", str(folder / "full"), "--partial", str(folder / "partial"), "--unlabelled", str(folder / "unlabelled"),
                     "--labels", "background", "liver", "--channels", "CT", "--ignore-value", "255", "--id", "301", "--name", "Recipe",
                     "--processes", "1"]) == 0
    assert cli.main(["check", "-d", "301", "--processes", "1"]) == 0
    assert not cli.main(["plan", "-d", "301", "-c", "2d", "3d_fullres", "-np", "1", "-npfp", "1"])
    small = {"features": (4, 4, 8), "batch_size": 2, "max_patch": 16, "convolutions": 1}
    for name, base in (("2d_small", "2d"), ("3d_small", "3d_fullres"), ("3d_lowres", "3d_fullres"), ("3d_cascade_fullres", "3d_fullres")):
        nnunet.configure(DATASET, name, base, SHORT, **small)
    plans_file = nnunet.preprocessed(DATASET) / "nnUNetPlans.json"  # nnU-Net plans a cascade for large images only
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_lowres"] |= {"spacing": [1.5, 1.5, 1.5], "data_identifier": "nnUNetPlans_3d_lowres",
                                             "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    plans_file.write_text(json.dumps(plans))
    preprocess([301], configurations=["3d_lowres"], num_processes=[1])
    return folder


def log_of(fold):
    return "".join(file.read_text() for file in sorted(fold.glob("training_log_*.txt")))


def test_the_best_configuration_and_an_ensemble_are_found_after_the_recipe_and_all_five_folds(nnunet, recipe):
    from nnunetv2.ensembling.ensemble import ensemble_folders
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    for model in MODELS:
        for fold in range(5):
            folder = nnunet.train(DATASET, model["configuration"], fold=fold, export_validation_probabilities=True)
            assert len(list((folder / "validation").glob("*.nii.gz"))) == 1  # five fully annotated cases
            assert ("validation is on a single patient, so the pseudo-Dice and the choice of checkpoint_best are mostly noise, and "
                    "1 of 5 fully annotated patients (20 %) do not train") in log_of(folder)
    best = find_best_configuration(301, MODELS, num_processes=1)
    ensembles = [name for name in best["all_results"] if name.startswith("ensemble___")]
    assert len(best["all_results"]) == 3 and len(ensembles) == 1
    merged = nnunet.folder / "results" / DATASET / "ensembles" / ensembles[0]
    assert sorted(f.name for f in merged.glob("*.nii.gz")) == [f"full{k}.nii.gz" for k in range(5)]

    predictions = [recipe / model["configuration"] for model in MODELS]
    images = recipe / "test" / "images"
    (images / "test0.nii.gz").rename(images / "test0_0000.nii.gz")
    for model, folder in zip(MODELS, predictions):
        cli.main(["predict", "-d", "301", "-i", str(images), "-o", str(folder), "-c", model["configuration"], "-f", "0", "1", "2", "3", "4",
                  "-device", "cpu", "--save_probabilities", "-npp", "0", "-nps", "0"])
    ensemble_folders([str(folder) for folder in predictions], str(recipe / "ensemble"), num_processes=1)
    assert (recipe / "ensemble" / "test0.nii.gz").is_file()


def test_a_cascade_trains_after_the_recipe_and_warns_of_what_its_first_stage_lacks(nnunet, recipe):
    first = nnunet.model(DATASET, "3d_lowres")
    nnunet.train(DATASET, "3d_lowres", fold=0)
    with pytest.raises(InputError, match=r"4 case\(s\) lack the prediction of the first stage, 3d_lowres, .*Run first: confkd train 301 3d_lowres "
                                         r"1; confkd train 301 3d_lowres 2; .*3; confkd train 301 3d_lowres 4$"):
        nnunet.trainer(DATASET, "3d_cascade_fullres").get_tr_and_val_datasets()
    nnunet.train(DATASET, "3d_lowres", fold=1)

    # predictions of all cases are there, but those of three full ones are of a network that was trained on them
    written = first / "predicted_next_stage" / "3d_cascade_fullres"
    splits_file = nnunet.preprocessed(DATASET) / "splits_final.json"
    splits = json.loads(splits_file.read_text())
    for case in splits[2]["val"] + splits[3]["val"] + splits[4]["val"]:
        (written / f"{case}.b2nd").write_bytes((written / f"{splits[0]['val'][0]}.b2nd").read_bytes())
    trainer = nnunet.trainer(DATASET, "3d_cascade_fullres")
    trainer.get_tr_and_val_datasets()
    assert ("WARNING: the first stage, 3d_lowres, predicted 3 fully annotated training case(s) with a network that was trained on these very "
            "cases") in log_of(nnunet.model(DATASET, "3d_cascade_fullres") / "fold_0")
    assert ("lacks 3 of 5 folds; train them first: confkd train 301 3d_lowres 2; confkd train 301 3d_lowres 3; "
            "confkd train 301 3d_lowres 4") in log_of(nnunet.model(DATASET, "3d_cascade_fullres") / "fold_0")

    for fold in range(2, 5):
        nnunet.train(DATASET, "3d_lowres", fold=fold)
    folder = nnunet.train(DATASET, "3d_cascade_fullres", fold=1)
    assert (folder / "validation" / "summary.json").is_file()
    assert "fully annotated training case(s) with a network that was trained" not in log_of(folder)
    assert "3 partially annotated or unlabelled training case(s) validate in no fold" in log_of(folder)


def test_a_cascade_over_a_single_fold_warns_that_no_fold_validates_its_full_training_cases(nnunet, recipe, monkeypatch):
    file = nnunet.preprocessed(DATASET) / "splits_final.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before)[:1]))
    try:
        trainer = nnunet.trainer(DATASET, "3d_cascade_fullres", fold=0)
        trainer.get_tr_and_val_datasets()
    finally:
        file.write_text(before)
    log = log_of(nnunet.model(DATASET, "3d_cascade_fullres") / "fold_0")
    assert "predicted 4 fully annotated training case(s)" in log and f"No fold of {file} validates these cases" in log
