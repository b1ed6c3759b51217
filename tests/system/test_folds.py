"""The README's recipe, then what nnU-Net offers for five folds: the best configuration, an ensemble, a cascade."""
from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError
from nnunet_confkd.training.names import COMPLETED_LABELS

DATASET = "Dataset301_Recipe"
SHORT = {"epochs": 1, "iterations_per_epoch": 2, "seed": 0}
MODELS = [{"configuration": configuration, "trainer": "ConfKDTrainer", "plans": "nnUNetPlans"}
          for configuration in ("2d_small", "3d_small")]
pytestmark = pytest.mark.usefixtures("thread_pools")  # trainings with their validations would start a hundred processes


def generate(folder: Path, kind: str, count: int) -> None:
    """Write bright balls in noise. Of partial labels, a slice and a half is annotated, and 255 stands for the rest."""
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


@pytest.fixture(scope="module")
def recipe(nnunet, thread_pools, tmp_path_factory):
    """The folder of the source data, after mix, check and plan; the plans have configurations of small networks."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess
    folder = tmp_path_factory.mktemp("recipe")
    for kind, count in (("full", 5), ("partial", 2), ("unlabelled", 1), ("test", 1)):
        generate(folder, kind, count)
    sources = [word for kind in ("full", "partial", "unlabelled") for word in (f"--{kind}", str(folder / kind))]
    assert cli.main(["mix", *sources, "--labels", "background", "liver", "--channels", "CT", "--ignore-value", "255",
                     "--id", "301", "--name", "Recipe", "--processes", "1"]) == 0
    assert cli.main(["check", "-d", "301", "--processes", "1"]) == 0
    assert not cli.main(["plan", "-d", "301", "-c", "2d", "3d_fullres", "-np", "1", "-npfp", "1"])
    small = {"features": (4, 4, 8), "batch_size": 2, "max_patch": 16, "convolutions": 1}
    for name, base in (("2d_small", "2d"), ("3d_small", "3d_fullres"), ("3d_lowres", "3d_fullres"),
                       ("3d_cascade_fullres", "3d_fullres")):
        nnunet.configure(DATASET, name, base, SHORT, **small)
    plans_file = nnunet.preprocessed(DATASET) / "nnUNetPlans.json"  # nnU-Net plans a cascade only for large images
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_lowres"] |= {"spacing": [1.5, 1.5, 1.5], "data_identifier": "nnUNetPlans_3d_lowres",
                                             "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"]["previous_stage"] = "3d_lowres"
    plans_file.write_text(json.dumps(plans))
    preprocess([301], configurations=["3d_lowres"], num_processes=[1])
    return folder


@pytest.fixture
def own(nnunet, recipe, tmp_path):
    """A private workspace with a copy of the data set."""
    return nnunet.copy(tmp_path / "nnunet", DATASET)


def log_of(fold: Path) -> str:
    return "".join(file.read_text() for file in sorted(fold.glob("training_log_*.txt")))


# ---- the whole job -------------------------------------------------------------------------------------------------

def test_one_fold_of_the_recipe_trains_and_says_what_a_single_validation_patient_costs(own):
    fold = own.train(DATASET, "2d_small")
    (case,) = splits(own)[0]["val"]
    assert [file.name for file in (fold / "validation").glob("*.nii.gz")] == [f"{case}.nii.gz"]
    assert ("validation is on a single patient, so the pseudo-Dice and the choice of checkpoint_best are mostly noise, "
            "and 1 of 5 fully annotated patients (20 %) do not train") in log_of(fold)


@pytest.mark.slow  # ten trainings
def test_the_best_configuration_and_an_ensemble_are_found_after_all_five_folds(own, recipe, tmp_path):
    from nnunetv2.ensembling.ensemble import ensemble_folders
    from nnunetv2.evaluation.find_best_configuration import find_best_configuration

    for model in MODELS:
        for fold in range(5):
            folder = own.train(DATASET, model["configuration"], fold=fold, export_validation_probabilities=True)
            assert len(list((folder / "validation").glob("*.nii.gz"))) == 1  # five fully annotated cases
    best = find_best_configuration(301, MODELS, num_processes=1)
    ensembles = [name for name in best["all_results"] if name.startswith("ensemble___")]
    assert len(best["all_results"]) == 3 and len(ensembles) == 1
    merged = own.folder / "results" / DATASET / "ensembles" / ensembles[0]
    assert sorted(f.name for f in merged.glob("*.nii.gz")) == [f"full{k}.nii.gz" for k in range(5)]

    predictions = [tmp_path / model["configuration"] for model in MODELS]
    for model, folder in zip(MODELS, predictions):
        cli.main(["predict", "-d", "301", "-i", str(recipe / "test" / "images"), "-o", str(folder),
                  "-c", model["configuration"], "-f", "0", "1", "2", "3", "4", "-device", "cpu", "--save_probabilities",
                  "-npp", "0", "-nps", "0"])
    ensemble_folders([str(folder) for folder in predictions], str(tmp_path / "ensemble"), num_processes=1)
    assert (tmp_path / "ensemble" / "test0.nii.gz").is_file()


@pytest.mark.slow  # six trainings
def test_a_cascade_trains_after_all_folds_of_its_first_stage(own):
    for fold in range(5):
        own.train(DATASET, "3d_lowres", fold=fold)
    folder = own.train(DATASET, "3d_cascade_fullres", fold=1)
    assert (folder / "validation" / "summary.json").is_file()
    assert "fully annotated training case(s) with a network that was trained" not in log_of(folder)
    assert "3 partially annotated or unlabelled training case(s) validate in no fold" in log_of(folder)

    plans_file = own.preprocessed(DATASET) / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["3d_cascade_fullres"]["confkd"] |= {"epochs": 2, "complete_at": 0.5, "weight_kl": None}
    plans_file.write_text(json.dumps(plans))
    folder = own.train(DATASET, "3d_cascade_fullres", fold=1)  # its teacher sees the predictions of the first stage
    assert {file.name for file in (folder / COMPLETED_LABELS).glob("*.b2nd")} == {"partial0.b2nd", "partial1.b2nd"}
    assert (folder / "checkpoint_teacher.pth").is_file() and (folder / "validation" / "summary.json").is_file()


# ---- what a cascade asks of its first stage ------------------------------------------------------------------------

def splits(workspace) -> list[dict]:
    return json.loads((workspace.preprocessed(DATASET) / "splits_final.json").read_text())


def second_stage(workspace) -> str:
    """Start the second stage, as its training does; return its log."""
    workspace.trainer(DATASET, "3d_cascade_fullres").get_tr_and_val_datasets()
    return log_of(workspace.model(DATASET, "3d_cascade_fullres") / "fold_0")


def pretend_first_stage(workspace, folds: list[int], cases: list[str]) -> None:
    """Leave what a first stage leaves that was trained on these folds and has predicted these cases."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    model = workspace.model(DATASET, "3d_lowres")
    for fold in folds:
        (model / f"fold_{fold}" / "validation").mkdir(parents=True)
        (model / f"fold_{fold}" / "validation" / "summary.json").write_text("{}")
    written = model / "predicted_next_stage" / "3d_cascade_fullres"
    written.mkdir(parents=True)
    for case in cases:
        nnUNetDatasetBlosc2.save_seg(np.zeros((16, 16, 16), np.uint8), str(written / case))


def test_a_cascade_names_the_folds_of_its_first_stage_that_are_to_be_trained(own):
    folds = splits(own)
    pretend_first_stage(own, [0], [*folds[0]["val"], *(case for case in folds[0]["train"] if "full" not in case)])
    remedy = "; ".join(f"confkd train 301 3d_lowres {fold}" for fold in range(1, 5))
    with pytest.raises(InputError, match=f"4 case.s. lack the prediction of the first stage, 3d_lowres.*{remedy}$"):
        second_stage(own)


def test_a_cascade_warns_of_first_predictions_by_networks_that_were_trained_on_the_case(own):
    folds = splits(own)
    pretend_first_stage(own, [0, 1], folds[0]["train"] + folds[0]["val"])
    log = second_stage(own)
    assert re.search("3d_lowres, predicted 3 fully annotated .* that was trained on these very cases", log)
    assert ("lacks 3 of 5 folds; train them first: confkd train 301 3d_lowres 2; confkd train 301 3d_lowres 3; "
            "confkd train 301 3d_lowres 4") in log


def test_a_cascade_over_a_single_fold_warns_that_no_fold_validates_its_full_training_cases(own):
    file = own.preprocessed(DATASET) / "splits_final.json"
    first = splits(own)[0]
    file.write_text(json.dumps([first]))
    pretend_first_stage(own, [0], first["train"] + first["val"])
    log = second_stage(own)
    assert "predicted 4 fully annotated training case(s)" in log and f"No fold of {file} validates these cases" in log
