"""`confkd complete`: what is written, which models and data are refused, and what an interruption leaves."""
from __future__ import annotations

import csv
import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from image_files import read_json, read_voxels

from nnunet_confkd import cli
from nnunet_confkd.data import folders, raw_format
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference import completed_dataset
from nnunet_confkd.inference import completion as module
from nnunet_confkd.inference.completed_case import CompletedCase, KnownLabel
from nnunet_confkd.inference.completion import CHECKPOINT, TrainedModel
from nnunet_confkd.inference.export import export
from nnunet_confkd.training.network import predicting

HIPPOCAMPUS, FEW = "Dataset004_Hippocampus", "Dataset006_Few"
IGNORE = 3


def complete(dataset, model, new, branch="student", folds=None, checkpoint=CHECKPOINT, **options):
    """On the CPU, in this process."""
    return module.complete(dataset, TrainedModel(model, branch, folds, checkpoint, "cpu"), new, processes=1, **options)


def _files(folder):
    return {f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
            for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def few(nnunet, hippocampus):
    """Three fully annotated, two partially annotated, one unlabelled and one test case of Hippocampus, in two folds."""
    source, raw = nnunet.raw(HIPPOCAMPUS), nnunet.raw(FEW)
    kinds = {**dict.fromkeys(hippocampus["full"][:3], "full"), **dict.fromkeys(hippocampus["partial"][:2], "partial"),
             hippocampus["unlabelled"][0]: "unlabelled"}
    for split, cases in (("Tr", kinds), ("Ts", hippocampus["test"][:1])):
        for folder, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
            (raw / f"{folder}{split}").mkdir(parents=True)
            for case in cases:
                file = Path(f"{folder}{split}", f"{case}{ending}")
                shutil.copyfile(source / file, raw / file)
    described = read_json(source / "dataset.json") | {"numTraining": len(kinds), "supervision": kinds, "release": "3"}
    (raw / "dataset.json").write_text(json.dumps(described))
    full = hippocampus["full"]
    splits = [{"train": sorted(set(kinds) - {full[i]}), "val": [full[i]]} for i in range(2)]
    nnunet.preprocessed(FEW).mkdir()
    (nnunet.preprocessed(FEW) / "splits_final.json").write_text(json.dumps(splits))
    cases = {kind: [case for case in kinds if kinds[case] == kind] for kind in ("full", "partial", "unlabelled")}
    return SimpleNamespace(raw=raw, splits=splits, described=described, kinds=kinds, **cases,
                           weak=cases["partial"] + cases["unlabelled"])


def _changed_copy(model, folder, change):
    """Copy a model folder, with weights changed in place by `change`, and without mirroring, which takes time."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("validation*"))
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    change(checkpoint["network_weights"])
    checkpoint["inference_allowed_mirroring_axes"] = None
    torch.save(checkpoint, file)
    return folder


def _hint_vectors(weights):
    found = [w for name, w in weights.items() if name.startswith(("teacher_decoder.hints.",
                                                                  "teacher_decoder.spread_hints."))]
    assert found
    return found


@pytest.fixture(scope="module")
def model(nnunet, hippocampus_model, tmp_path_factory):
    """A copy of the trained model whose branches differ more, and whose teacher ignores its hints."""
    def change(weights):
        weights["teacher_decoder.seg_layers.1.weight"].mul_(-1)
        for vectors in _hint_vectors(weights):
            vectors.zero_()
    folder = tmp_path_factory.mktemp("model") / "ConfKDTrainer__nnUNetPlans__2d_export"
    return _changed_copy(hippocampus_model, folder, change)


@pytest.fixture
def hinted_model(model, tmp_path):
    """A copy whose teacher predicts something else when it gets hints."""
    def change(weights):
        generator = torch.Generator().manual_seed(0)
        for vectors in _hint_vectors(weights):
            vectors.copy_(100 * torch.randn(vectors.shape, generator=generator))
    return _changed_copy(model, tmp_path / model.name, change)


@pytest.fixture(scope="module")
def predicted(few, model, tmp_path_factory):
    """Predictions of nnU-Net's own predictor for the weak cases: {branch: {case: (segmentation, probabilities)}}."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    found = {}
    for branch in ("student", "teacher"):
        output = tmp_path_factory.mktemp(branch)
        predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
        with predicting(branch):
            predictor.initialize_from_trained_model_folder(str(model), [0])
        sources = [[str(few.raw / "imagesTr" / f"{case}_0000.nii.gz")] for case in few.weak]
        predictor.predict_from_files_sequential(sources, [str(output / case) for case in few.weak],
                                                save_probabilities=True)
        found[branch] = {case: (read_voxels(output / f"{case}.nii.gz"),
                                np.load(output / f"{case}.npz")["probabilities"]) for case in few.weak}
    return found


@pytest.fixture(scope="module")
def completed(nnunet, few, model):
    """Completed by the student, all voxels, on the command line."""
    before = _files(nnunet.raw(FEW)) | _files(nnunet.preprocessed(FEW))
    assert cli.main(["complete", "-d", "6", "--model", str(model), "--id", "60", "-device", "cpu",
                     "--processes", "1"]) == 0
    assert _files(nnunet.raw(FEW)) | _files(nnunet.preprocessed(FEW)) == before
    return nnunet.raw("Dataset060_Few_completed")


@pytest.fixture(scope="module")
def confident(nnunet, few, model, predicted):
    """Completed by the teacher, only the more confident half of the voxels."""
    threshold = float(np.median(np.concatenate([p.max(0).ravel() for _, p in predicted["teacher"].values()])))
    folder = complete(FEW, model, 61, "teacher", confidence=threshold, name="Confident")
    return SimpleNamespace(folder=folder, threshold=threshold)


@pytest.fixture(scope="module")
def loaded(model):
    return module._load_predictor(TrainedModel(model, device="cpu"))


@pytest.fixture
def no_network(monkeypatch, loaded, completed):
    """Neither load nor run a network: the results of another run are copied. For tests of what happens around that."""
    def predict(_, cases, folder, *__):
        (folder / "rows").mkdir(parents=True)
        (folder.parent / "confidence").mkdir()
        rows = {row["case"]: row for row in read_json(completed / "review_first.json")["cases"]}
        for case in cases:
            name = f"{case.name}.nii.gz"
            shutil.copyfile(completed / "labelsTr" / name, folder / name)
            (folder / "rows" / f"{case.name}.json").write_text(json.dumps(rows[case.name]))
            shutil.copyfile(completed / "confidence" / name, folder.parent / "confidence" / name)

    monkeypatch.setattr(module, "_load_predictor", lambda _: loaded)
    monkeypatch.setattr(module, "_predict", predict)


@pytest.fixture
def no_prediction(monkeypatch, loaded):
    """Do not load the model, and fail if anything is predicted."""
    monkeypatch.setattr(module, "_load_predictor", lambda _: loaded)
    monkeypatch.setattr(module, "_predict", lambda *_: pytest.fail("predicted"))


# ---- what is written ------------------------------------------------------------------------------------------------

def test_annotated_voxels_stay_and_the_others_are_the_students(few, completed, predicted):
    for case in few.weak:
        before, after = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (few.raw, completed))
        annotated = before != IGNORE
        np.testing.assert_array_equal(after[annotated], before[annotated])
        np.testing.assert_array_equal(after[~annotated], predicted["student"][case][0][~annotated])
        assert after.dtype == np.uint8
        # the prediction differs from the annotations, or the first line would prove nothing
        assert case in few.unlabelled or (predicted["student"][case][0] != before)[annotated].any()


def test_the_confidence_beside_is_the_winning_probability(few, completed, predicted):
    assert sorted(f.name for f in (completed / "confidence").iterdir()) == sorted(f"{case}.nii.gz" for case in few.weak)
    for case in few.weak:
        file = completed / "confidence" / f"{case}.nii.gz"
        np.testing.assert_allclose(read_voxels(file), predicted["student"][case][1].max(0), atol=1e-6)
        image, label = (sitk.ReadImage(str(f)) for f in (file, completed / "labelsTr" / file.name))
        assert image.GetPixelID() == sitk.sitkFloat32
        for getter in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(image, getter)() == getattr(label, getter)()


def test_with_a_confidence_only_voxels_above_it_are_filled(few, confident, predicted):
    filled = 0
    for case in few.weak:
        before, after = (read_voxels(folder / "labelsTr" / f"{case}.nii.gz") for folder in (few.raw, confident.folder))
        confidence = read_voxels(confident.folder / "confidence" / f"{case}.nii.gz")
        fill = (before == IGNORE) & (confidence > confident.threshold)
        np.testing.assert_array_equal(after, np.where(fill, predicted["teacher"][case][0], before))
        assert 0 < fill.sum() < (before == IGNORE).sum()
        filled += fill.sum()
    about = read_json(confident.folder / "dataset.json")["completed"][-1]
    assert sum(case["filled_voxels"] for case in about["cases"].values()) == filled
    assert about["branch"] == "teacher" and about["confidence"] == confident.threshold
    kinds = read_json(confident.folder / "dataset.json")["supervision"]
    assert {case: kinds[case] for case in few.weak} == dict.fromkeys(few.weak, "partial")  # none is unlabelled any more


def test_what_was_full_and_all_images_and_test_cases_are_copied(few, completed):
    for file in [*(f"labelsTr/{case}.nii.gz" for case in few.full),
                 *(f"imagesTr/{case}_0000.nii.gz" for case in few.kinds)]:
        assert (completed / file).read_bytes() == (few.raw / file).read_bytes()
    for split in ("imagesTs", "labelsTs"):
        assert _files(completed / split) == _files(few.raw / split) and _files(completed / split)
    assert not [f for f in completed.rglob("*") if f.name.startswith(".")]


def test_dataset_json_tells_that_labels_are_predicted_and_by_what(few, completed, model):
    described = read_json(completed / "dataset.json")
    assert described["supervision"] == dict.fromkeys(sorted(few.kinds), "full")
    (about,) = described["completed"]
    assert about["source"] == FEW and about["model"] == model.name and about["model_dataset"] == HIPPOCAMPUS
    assert about["branch"] == "student" and about["folds"] == ["0"] and about["checkpoint"] == "checkpoint_final.pth"
    assert about["confidence"] is None and "do not take them for truth" in about["note"]
    for case in few.weak:
        ignored = int((read_voxels(few.raw / "labelsTr" / f"{case}.nii.gz") == IGNORE).sum())
        size = read_voxels(few.raw / "labelsTr" / f"{case}.nii.gz").size
        assert about["cases"][case] == {"kind_before": few.kinds[case], "annotated_voxels": size - ignored,
                                        "filled_voxels": ignored, "ignored_voxels": 0}
    assert set(about["cases"]) == set(few.weak)
    for key in ("labels", "channel_names", "file_ending", "licence", "reference", "release"):
        assert described.get(key) == few.described.get(key), key


def test_the_split_is_carried_over(nnunet, few, completed):
    assert read_json(nnunet.preprocessed(completed.name) / "splits_final.json") == few.splits


def test_without_a_split_only_cases_that_were_full_validate(nnunet, few, model, no_network):
    (nnunet.preprocessed(FEW) / "splits_final.json").rename(nnunet.folder / "kept.json")
    try:
        folder = complete(6, model, 62, name="NoSplit")
    finally:
        (nnunet.folder / "kept.json").rename(nnunet.preprocessed(FEW) / "splits_final.json")
    splits = read_json(nnunet.preprocessed(folder.name) / "splits_final.json")
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(few.full)


def test_no_fold_validates_on_completed_voxels(nnunet, few, model, no_network):
    """The folds of the source do, as nnU-Net's random ones, in partially annotated cases."""
    file = nnunet.preprocessed(FEW) / "splits_final.json"
    kept = file.read_text()
    try:
        first = few.weak[0]
        file.write_text(json.dumps([{"train": sorted(set(few.kinds) - {first}), "val": [first]}]))
        folder = complete(6, model, 94, name="RandomSplit")
    finally:
        file.write_text(kept)
    splits = read_json(nnunet.preprocessed(folder.name) / "splits_final.json")
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(few.full)


def test_a_case_that_lacks_a_class_may_have_no_voxel_of_it(tmp_path):
    """The class that it is annotated for fills the image."""
    label = np.ones((2, 3, 3), np.uint8)
    case = CompletedCase("case", KnownLabel(tmp_path, None, {0: (0, 2)}), tmp_path, ".nii.gz", None, None)
    row = case.review(label, label, np.full(label.shape, 0.9, np.float32), np.zeros(label.shape, np.float32))
    assert row["mean_confidence"] is None and row["filled_voxels"] == 0 and row["agreement_with_annotations"] == 1
    json.dumps(row, allow_nan=False)


def test_the_list_tells_what_to_review_first(few, completed, predicted):
    rows = read_json(completed / "review_first.json")["cases"]
    assert sorted(row["case"] for row in rows) == sorted(few.weak) and [row["rank"] for row in rows] == [1, 2, 3]
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    for row in rows:
        label = read_voxels(few.raw / "labelsTr" / f"{row['case']}.nii.gz")
        segmentation, p = predicted["student"][row["case"]]
        p = p.astype(np.float64)
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(0) / np.log(3)
        judged = (label == IGNORE) & ((segmentation > 0) | (entropy >= 0.1))
        assert row["score"] == pytest.approx(entropy[judged].mean(), rel=1e-4)
        assert row["mean_confidence"] == pytest.approx(p.max(0)[label == IGNORE].mean(), rel=1e-5)
        annotated = label != IGNORE
        agreement = pytest.approx((segmentation == label)[annotated].mean()) if annotated.any() else None
        assert row["agreement_with_annotations"] == agreement
        assert row["kind_before"] == few.kinds[row["case"]] and row["kind"] == "full"
    with open(completed / "review_first.csv", newline="") as stream:
        assert [row["case"] for row in csv.DictReader(stream)] == [row["case"] for row in rows]


def test_what_goes_to_other_processes_can_go_there(completed, model, monkeypatch, no_network):
    """They are not started, because each would import nnU-Net, which takes longer than all the rest."""

    def pickling(function, tasks, *_):
        results = []
        for task in tasks:
            there, task = pickle.loads(pickle.dumps((function, task)))
            results.append(there(*task))
        return pickle.loads(pickle.dumps(results))
    monkeypatch.setattr(completed_dataset, "parallel", pickling)
    folder = complete(6, model, 63, name="Pickled")
    assert _files(folder / "labelsTr") == _files(completed / "labelsTr")
    predictor = module._CompletingPredictor(device=torch.device("cpu"))
    known = KnownLabel(Path("label"), 3, {0: (0, 2)})
    predictor.completions = {"case": CompletedCase("case", known, Path("target"), ".nii.gz", 3, 0.5)}
    there = pickle.loads(pickle.dumps(predictor.exporter()))
    assert there.func is module._export and there.args == (predictor.completions,)


def test_a_completed_data_set_is_completed_further_and_says_both(few, confident, model, no_network):
    folder = complete(61, model, 64, name="Twice")
    runs = read_json(folder / "dataset.json")["completed"]
    assert [run["source"] for run in runs] == [FEW, "Dataset061_Confident"]
    assert [run["branch"] for run in runs] == ["teacher", "student"]
    for case in few.weak:
        first, second = (read_voxels(f / "labelsTr" / f"{case}.nii.gz") for f in (confident.folder, folder))
        np.testing.assert_array_equal(second[first != IGNORE], first[first != IGNORE])
        assert (first == IGNORE).any() and not (second == IGNORE).any()


def test_the_completed_data_set_passes_nnunets_own_check(completed, threads):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity
    verify_dataset_integrity(str(completed), num_processes=1)


@pytest.mark.slow
def test_stock_nnunet_plans_and_trains_on_it(nnunet, completed, monkeypatch):
    """Planning and training without the plugin."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    extract_fingerprints([60], num_processes=1, check_dataset_integrity=True)
    with monkeypatch.context() as planning:
        planning.setenv("nnUNet_n_proc_DA", "1")  # the planner makes a number of threads of it
        plan_experiments([60])
    preprocess([60], configurations=["2d"], num_processes=[1])
    nnunet.configure(completed.name, "2d_tiny", "2d")
    trainer = nnunet.trainer(completed.name, "2d_tiny", "nnUNetTrainer")
    assert type(trainer).__module__.startswith("nnunetv2.")
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    assert (nnunet.model(completed.name, "2d_tiny", "nnUNetTrainer") / "fold_0" / "checkpoint_final.pth").is_file()


def test_regions_are_completed(nnunet, region_model):
    source, folder = nnunet.raw("Dataset008_Regions"), complete(8, region_model, 65)
    described = read_json(folder / "dataset.json")
    assert described["labels"] == read_json(source / "dataset.json")["labels"]
    assert described["regions_class_order"] == [1, 2]
    (case,) = described["completed"][-1]["cases"]
    before, after = (read_voxels(f / "labelsTr" / f"{case}.nii.gz") for f in (source, folder))
    np.testing.assert_array_equal(after[before != IGNORE], before[before != IGNORE])
    assert set(np.unique(after)) <= {0, 1, 2} and len(np.unique(after[before == IGNORE])) > 1
    confidence = read_voxels(folder / "confidence" / f"{case}.nii.gz")
    assert 0.5 <= confidence.min() < confidence.max() <= 1


# ---- classes that cases lack -----------------------------------------------------------------------------------------

@pytest.fixture
def lacking(few, spoilt):
    """A data set whose first weak case has no ignored voxel and lacks class 2, and whose second has both."""
    first, second, _ = few.weak
    _label(spoilt / "labelsTr" / f"{first}.nii.gz", lambda label: np.where(label == 1, 1, 0).astype(np.uint8))
    _label(spoilt / "labelsTr" / f"{second}.nii.gz", lambda label: np.where(label == 2, 0, label).astype(np.uint8))
    name, _ = (name for name, value in few.described["labels"].items() if value in (1, 2))
    _described(spoilt, annotated_classes={first: [name], second: [name]},
               supervision=few.kinds | {first: "partial"})
    return spoilt


def test_missing_classes_are_filled_and_annotated_ones_kept(few, lacking, model, predicted, threads):
    before = _files(lacking)
    folder = complete(7, model, 82, name="Lacking")
    assert _files(lacking) == before
    described = read_json(folder / "dataset.json")
    assert "annotated_classes" not in described and set(described["supervision"].values()) == {"full"}
    for case in few.weak[:2]:
        label, after = (read_voxels(f / "labelsTr" / f"{case}.nii.gz") for f in (lacking, folder))
        labels, p = predicted["student"][case]
        # among the background and the class that is lacking
        expected = np.select([label == 0, label == IGNORE], [np.where(p[2] > p[0], 2, 0), labels], label)
        np.testing.assert_array_equal(after, expected)
        assert (after[label == 0] == 2).any() and not (after[label == 0] == 1).any()
        assert (labels[label == 0] == 1).any(), "the model alone would say otherwise somewhere"
        confidence = read_voxels(folder / "confidence" / f"{case}.nii.gz")
        share = np.maximum(p[0], p[2]) / (p[0] + p[2])
        np.testing.assert_allclose(confidence, np.where(label == 0, share, p.max(0)), atol=1e-4)
    row = described["completed"][-1]["cases"][few.weak[0]]
    label = read_voxels(lacking / "labelsTr" / f"{few.weak[0]}.nii.gz")
    assert row["filled_voxels"] == (label == 0).sum() and row["annotated_voxels"] == (label == 1).sum()
    with open(folder / "review_first.csv") as file:
        agreement = {of["case"]: float(of["agreement_with_annotations"] or 0) for of in csv.DictReader(file)}
    expected = (predicted["student"][few.weak[0]][0] == 1)[label == 1].mean()
    assert agreement[few.weak[0]] == pytest.approx(expected, abs=1e-4)


def test_what_the_model_is_not_sure_of_becomes_ignored(few, lacking, model, threads):
    def change(label):
        return np.where(label == IGNORE, 0, label).astype(np.uint8)

    for file in (lacking / "labelsTr").iterdir():
        _label(file, change)
    labels = {name: value for name, value in few.described["labels"].items() if name != "ignore"}
    _described(lacking, labels=labels, supervision={})
    folder = complete(7, model, 85, name="Sure", confidence=0.6)
    assert read_json(folder / "dataset.json")["labels"] == {**labels, "ignore": IGNORE}
    for case in few.weak[:2]:
        label, after = (read_voxels(f / "labelsTr" / f"{case}.nii.gz") for f in (lacking, folder))
        confidence = read_voxels(folder / "confidence" / f"{case}.nii.gz")
        np.testing.assert_array_equal(after == IGNORE, (label == 0) & (confidence <= 0.6))
        assert (after[label == 1] == 1).all() and 0 < (after == IGNORE).sum()


def test_no_fold_validates_on_completed_labels(nnunet, few, lacking, model, no_network, monkeypatch):
    """The folds of the source do, in cases that lack classes; three full cases validate instead."""
    # the copied predictions are of other labels
    monkeypatch.setattr(completed_dataset, "_require_annotations", lambda *_: None)
    file = nnunet.preprocessed("Dataset007_Spoilt") / "splits_final.json"
    file.parent.mkdir()
    try:
        first = few.weak[0]
        file.write_text(json.dumps([{"train": sorted(set(few.kinds) - {first}), "val": [first]}]))
        complete(7, model, 86, name="Folds")
    finally:
        shutil.rmtree(file.parent)
    folds = read_json(nnunet.preprocessed("Dataset086_Folds") / "splits_final.json")
    assert {case for fold in folds for case in fold["val"]} == set(few.full)


def test_the_teacher_is_shown_sets_of_classes(few, lacking, model):
    predictor, _ = module._load_predictor(TrainedModel(model, "teacher", device="cpu"))
    first, second, third = few.weak
    sources = [[str(lacking / "imagesTr" / f"{case}_0000.nii.gz")] for case in (first, third)]
    labels = [str(lacking / "labelsTr" / f"{case}.nii.gz") for case in (first, third)]
    items = list(module._with_hints(predictor, sources, labels, [f"x/{first}", f"x/{third}"],
                                    {first: (True, True, False), second: (True, True, False)}))
    label, inside = read_voxels(Path(labels[0])), items[0]["data"][-1].numpy().astype(bool)
    assert 0.99 < inside.mean() < 1, "a few voxels are empty, as the surroundings of an image"
    for channel, voxels in zip(items[0]["data"][1:], (label == 0, label == 1, label == 0)):
        np.testing.assert_array_equal(channel.numpy(), voxels & inside)
    assert items[1]["data"].shape[0] == 5 and not items[1]["data"][1:].any(), "nothing is annotated there"


@pytest.fixture
def lacking_regions(few, spoilt, region_model):
    """Cases with regions: the first is annotated for the whole alone, and the second, partly, for the posterior one."""
    first, second, _ = few.weak
    _label(spoilt / "labelsTr" / f"{first}.nii.gz", lambda label: np.isin(label, (1, 2)).astype(np.uint8))
    _label(spoilt / "labelsTr" / f"{second}.nii.gz", lambda label: np.where(label == 1, 0, label).astype(np.uint8))
    described = read_json(region_model / "dataset.json")
    _described(spoilt, annotated_classes={first: ["whole"], second: ["posterior"]}, labels=described["labels"],
               regions_class_order=described["regions_class_order"], supervision=few.kinds | {first: "partial"})
    return spoilt


def test_missing_regions_are_filled_and_annotated_ones_kept(few, lacking_regions, region_model, tmp_path, threads):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    folder = complete(7, region_model, 87, name="LackingRegions")
    described = read_json(folder / "dataset.json")
    assert "annotated_classes" not in described and set(described["supervision"].values()) == {"full"}
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(region_model), [0])
    predictor.predict_from_files_sequential(
        [[str(folder / "imagesTr" / f"{case}_0000.nii.gz")] for case in few.weak[:2]],
        [str(tmp_path / case) for case in few.weak[:2]], save_probabilities=True)
    for case, own in zip(few.weak[:2], (0, 1)):
        label, after = (read_voxels(f / "labelsTr" / f"{case}.nii.gz") for f in (lacking_regions, folder))
        p = np.load(tmp_path / f"{case}.npz")["probabilities"]
        whole, posterior = p > 0.5
        alone = np.where(posterior, 2, whole)
        filled = np.where(label, 1 + posterior, 0) if own == 0 else np.where(label == 2, 2, whole)
        np.testing.assert_array_equal(after, np.where(label == IGNORE, alone, filled))
        annotated = label != IGNORE
        assert (filled != alone)[annotated].any() and (after != label)[annotated].any()
        known, other = (label == 1, p[1]) if own == 0 else (label == 0, p[0])
        confidence = read_voxels(folder / "confidence" / f"{case}.nii.gz")
        np.testing.assert_allclose(confidence[known], np.maximum(other, 1 - other)[known], atol=1e-4)
    row = described["completed"][-1]["cases"][few.weak[1]]
    assert row["annotated_voxels"] == (label == 2).sum() and row["filled_voxels"] == (label != 2).sum()


def test_the_teacher_is_shown_which_regions_are_not_annotated(few, lacking_regions, region_model):
    predictor, _ = module._load_predictor(TrainedModel(region_model, "teacher", device="cpu"))
    first = few.weak[0]
    file = lacking_regions / "labelsTr" / f"{first}.nii.gz"
    (item,) = module._with_hints(predictor, [[str(lacking_regions / "imagesTr" / f"{first}_0000.nii.gz")]],
                                 [str(file)], [f"x/{first}"], {first: (True, False)})
    _, whole, posterior, inside = item["data"].numpy()
    np.testing.assert_array_equal(whole, (read_voxels(file) == 1) * inside)
    np.testing.assert_array_equal(posterior, 0.5 * inside)
    assert inside.any()


def test_regions_that_no_value_can_tell_are_not_completed(few, lacking_regions, no_prediction):
    """Two regions overlap, and neither lies in the other: nnU-Net writes 2 for what is in both."""
    _described(lacking_regions, labels={"background": 0, "whole": [1, 4], "posterior": [2, 4], "ignore": 5})
    for file in (lacking_regions / "labelsTr").iterdir():
        _label(file, lambda label: np.where(label == IGNORE, 5, label).astype(np.uint8))
    with pytest.raises(InputError, match=r"known to have one of the values 1, 4 could get 2 by"):
        completed_dataset.check_cases(lacking_regions, read_json(lacking_regions / "dataset.json"),
                                      raw_format.raw_dataset(lacking_regions, "x"), 1)


# ---- hints ----------------------------------------------------------------------------------------------------------

def test_the_teacher_is_shown_the_annotations(few, predicted, hinted_model, threads):
    folder = complete(FEW, hinted_model, 90, "teacher", name="Hinted")
    about = read_json(folder / "dataset.json")["completed"][-1]
    assert about["hints"] and about["branch"] == "teacher"
    for case in few.weak:
        before, after = (read_voxels(f / "labelsTr" / f"{case}.nii.gz") for f in (few.raw, folder))
        annotated = before != IGNORE
        np.testing.assert_array_equal(after[annotated], before[annotated])
        same = (after == predicted["teacher"][case][0])[~annotated].all()
        assert same == (case in few.unlabelled)


def _record(model, change):
    file = model / "fold_0" / "confkd.json"
    file.write_text(json.dumps(change(read_json(file))))


@pytest.mark.parametrize("change", (
    lambda record: record | {"settings": record["settings"] | {"teacher_hints": False}},
    lambda record: record | {"settings": record["settings"] | {"kl_images": "full"}},
    lambda record: record | {"supervision": dict.fromkeys(record["supervision"], "unlabelled")}),
    ids=("off", "not taught", "never seen"))
def test_a_teacher_that_never_learnt_from_hints_gets_none(hinted_model, change):
    _record(hinted_model, change)
    assert not module._uses_hints(hinted_model, ["0"])


def test_without_a_record_there_are_no_hints_and_a_broken_one_is_named(few, hinted_model, nnunet):
    assert module._uses_hints(hinted_model, ["0"])
    _record(hinted_model, lambda record: {"settings": record["settings"]})
    with pytest.raises(InputError, match="confkd.json: is not the record of a ConfKD training"):
        complete(FEW, hinted_model, 91, "teacher")
    assert not nnunet.raw("Dataset091_Few_completed").exists()
    (hinted_model / "fold_0" / "confkd.json").unlink()
    assert not module._uses_hints(hinted_model, ["0"])


@pytest.mark.parametrize("regions", (False, True), ids=("labels", "regions"))
def test_hints_are_the_annotations_behind_the_channels(few, model, region_model, regions):
    model = region_model if regions else model
    predictor, _ = module._load_predictor(TrainedModel(model, "teacher", device="cpu"))
    case = few.partial[0]
    image, label = few.raw / "imagesTr" / f"{case}_0000.nii.gz", few.raw / "labelsTr" / f"{case}.nii.gz"
    item, = module._with_hints(predictor, [[str(image)]], [str(label)], ["out"], {})
    before = read_voxels(label)
    expected = [np.where(before == IGNORE, 0, before + 1)]  # one channel; the network makes more of it, patch by patch
    if regions:
        expected = [np.isin(before, (1, 2)), before == 2, before != IGNORE]
    assert item["ofile"] == "out" and item["data"].shape == (1 + len(expected), *before.shape)
    for channel, voxels in zip(item["data"][1:], expected):  # spacing as in the plans: nothing is resampled
        np.testing.assert_array_equal(channel.numpy(), voxels)
    if not regions:
        item, = module._with_hints(predictor, [[str(image)]], [str(label)], ["out"], {}, watershed=True)
        hints, spread = item["data"][1:].numpy()
        np.testing.assert_array_equal(hints, expected[0])
        np.testing.assert_array_equal(spread[hints > 0], hints[hints > 0])
        assert np.array_equal((spread > 0).any((1, 2)), (hints > 0).any((1, 2))), "a 2-D network: slice by slice"


# ---- models ---------------------------------------------------------------------------------------------------------

def test_a_stock_model_of_the_same_labels_will_do_but_has_no_teacher(few, model, tmp_path):
    """The tests of the export check that it predicts the same."""
    stock = export(model, tmp_path / "stock")
    with pytest.raises(InputError, match="holds no teacher, so --branch teacher"):
        complete(6, stock, 66, "teacher")
    folder = complete(6, stock, 66, name="Stock")
    assert read_json(folder / "dataset.json")["completed"][-1]["branch"] is None


@pytest.mark.parametrize("change, text", [
    ({"labels": {"background": 0, "label_1": 1, "body": 2, "ignore": 3}}, "labels: .*label_2.*body"),
    ({"labels": {"background": 0, "label_1": 2, "label_2": 1, "ignore": 3}}, "labels: "),
    ({"channel_names": {"0": "CT"}}, r"channels: \['channel_0'\] in .*\['CT'\] in"),
    ({"file_ending": ".nrrd"}, "file ending: ")])
def test_a_model_of_other_data_is_refused(few, model, tmp_path, change, text, nnunet):
    shutil.copytree(model, tmp_path / "model")
    described = read_json(model / "dataset.json") | change
    (tmp_path / "model" / "dataset.json").write_text(json.dumps(described))
    _refused(nnunet, text, tmp_path / "model")


def _refused(nnunet, text, model, dataset=6, new=70, **options):
    before = sorted(nnunet.raw("").rglob("*")), sorted(nnunet.preprocessed("").rglob("*"))
    with pytest.raises(InputError, match=text):
        complete(dataset, model, new, **options)
    assert (sorted(nnunet.raw("").rglob("*")), sorted(nnunet.preprocessed("").rglob("*"))) == before


def _wider(file):
    plans = read_json(file)
    plans["configurations"]["2d_export"]["architecture"]["arch_kwargs"]["features_per_stage"][0] *= 2
    file.write_text(json.dumps(plans))


def _other_trainer(file):
    torch.save({**torch.load(file, weights_only=False), "trainer_name": "Theirs"}, file)


@pytest.mark.parametrize("spoil, options, text", [
    (lambda m: shutil.rmtree(m), {}, "there is no such folder"),
    (lambda m: shutil.rmtree(m / "fold_0"), {}, "train first"),
    (lambda m: (m / "fold_0" / "checkpoint_final.pth").unlink(), {}, "no checkpoint_final.pth of any fold"),
    (lambda m: None, {"folds": ["0", "3"]}, "no checkpoint_final.pth of fold 3"),
    (lambda m: None, {"checkpoint": "checkpoint_latest.pth"}, "no checkpoint_latest.pth of any fold"),
    (lambda m: (m / "fold_0" / "checkpoint_final.pth").write_bytes(b"half"), {}, "cannot be read as a checkpoint"),
    (lambda m: _other_trainer(m / "fold_0" / "checkpoint_final.pth"), {}, "by the trainer Theirs, which is not found"),
    (lambda m: _wider(m / "plans.json"), {}, "do not fit the network of plans.json")])
def test_a_model_that_cannot_predict_is_refused_and_nothing_written(few, model, nnunet, tmp_path, spoil, options, text):
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model")
    _refused(nnunet, text, tmp_path / "model", **options)


@pytest.mark.parametrize("options, text", [
    ({"confidence": 1.0}, "--confidence"), ({"confidence": float("nan")}, "--confidence"),
    ({"name": "../x"}, "letters, digits"), ({"new": 4}, "the id 4 is taken"), ({"new": 0}, "from 1 to 999"),
    ({"dataset": 999}, "no data set 999")])
def test_options_that_make_no_sense_are_refused_and_nothing_written(few, model, nnunet, no_prediction, options, text):
    _refused(nnunet, text, model, **options)


def test_the_second_stage_of_a_cascade_is_refused(few, model, nnunet, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    plans = read_json(model / "plans.json")
    plans["configurations"]["2d_export"]["previous_stage"] = "2d"
    (tmp_path / "model" / "plans.json").write_text(json.dumps(plans))
    _refused(nnunet, "second stage of a cascade", tmp_path / "model")


# ---- data -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def spoilt(nnunet, few):
    """A copy of the data set to spoil: its folder. The id 7 is free again afterwards."""
    folder = nnunet.raw("Dataset007_Spoilt")
    shutil.copytree(few.raw, folder)
    yield folder
    shutil.rmtree(folder)


def _label(file, change):
    image = sitk.ReadImage(str(file))
    array = change(sitk.GetArrayFromImage(image))
    new = sitk.GetImageFromArray(array)
    if array.shape == sitk.GetArrayFromImage(image).shape:
        new.CopyInformation(image)
    sitk.WriteImage(new, str(file))


@pytest.mark.parametrize("spoil, texts", [
    (lambda d, c: [(d / "imagesTr" / f"{case}_0000.nii.gz").unlink() for case in c[:2]],
     ["{0}.nii.gz: has no image", "{1}.nii.gz: has no image"]),
    (lambda d, c: (d / "labelsTr" / f"{c[0]}.nii.gz").unlink(), ["{0}.nii.gz: there is no such file"]),
    (lambda d, c: _label(d / "labelsTr" / f"{c[0]}.nii.gz", lambda a: np.where(a == 3, 7, a)),
     [r"{0}.nii.gz: holds the values \[7\]"]),
    (lambda d, c: _label(d / "labelsTr" / f"{c[0]}.nii.gz", lambda a: a[1:]), ["{0}.nii.gz: is on another grid"]),
    (lambda d, c: (d / "imagesTr" / f"{c[0]}_0000.nii.gz").write_bytes(b"no image"),
     ["{0}_0000.nii.gz: cannot be read"]),
    (lambda d, c: _described(d, channel_names={"0": "MRI", "1": "T2"}), ["of another kind of data"]),
    (lambda d, c: _described(d, supervision={"nobody": "partial"}), ["nobody: there is no such case"]),
    (lambda d, c: _described(d, supervision={c[0]: "full"}), ["{0}: declared full, but"]),
    (lambda d, c: _described(d, labels={"background": 0, "label_1": 1, "label_2": 2}), ['no "ignore"']),
    (lambda d, c: _described(d, labels={"background": 0, "label_1": 1, "label_2": 2, "ignore": 5}),
     ["the ignore label is 5"]),
    (lambda d, c: (d / "dataset.json").unlink(), ["is no data set in nnU-Net's raw format"]),
    (lambda d, c: [_label(d / "labelsTr" / f"{case}.nii.gz", lambda a: np.where(a == 3, 0, a)) for case in c]
     + [_described(d, supervision={})], ["no training case has an ignored voxel"])])
def test_data_that_are_wrong_are_told_before_the_prediction(few, spoilt, model, nnunet, spoil, texts, no_prediction):
    spoil(spoilt, few.weak)
    for text in texts:
        _refused(nnunet, text.format(*few.weak), model, dataset=7)


def _described(folder, **change):
    (folder / "dataset.json").write_text(json.dumps(read_json(folder / "dataset.json") | change))


@pytest.mark.parametrize("content, text", [
    ("{", "is no list of folds"), ('[{"train": ["x"], "val": []}]', "does not have: x")])
def test_a_broken_split_is_told_before_the_prediction(few, spoilt, model, nnunet, content, text, no_prediction):
    folder = nnunet.preprocessed(spoilt.name)
    folder.mkdir()
    try:
        (folder / "splits_final.json").write_text(content)
        _refused(nnunet, text, model, dataset=7)
    finally:
        shutil.rmtree(folder)


def test_a_case_declared_lower_than_its_label_keeps_its_kind(few, spoilt, model, no_network):
    """It has no ignored voxel, so nothing is predicted for it."""
    _described(spoilt, supervision={few.full[0]: "partial"})
    folder = complete(7, model, 71, name="Lower")
    described = read_json(folder / "dataset.json")
    assert described["supervision"][few.full[0]] == "partial" and described["supervision"][few.full[1]] == "full"
    assert few.full[0] not in described["completed"][-1]["cases"]


def test_a_case_declared_unlabelled_though_annotated_is_left_as_it_is(few, spoilt, model, no_network, capsys):
    """Its annotations may be wrong. In a completed label they would count as true."""
    _described(spoilt, supervision={few.partial[0]: "unlabelled"})
    folder = complete(7, model, 74, name="Unused")
    described, file = read_json(folder / "dataset.json"), f"labelsTr/{few.partial[0]}.nii.gz"
    assert described["supervision"][few.partial[0]] == "unlabelled"
    assert described["supervision"][few.partial[1]] == "full"
    np.testing.assert_array_equal(read_voxels(folder / file), read_voxels(spoilt / file))
    assert f"declares unlabelled, though annotated: {few.partial[0]}. To complete them" in capsys.readouterr().out


# ---- processes ------------------------------------------------------------------------------------------------------

def test_the_processes_that_read_and_write_cases_do_not_import_pytorch(few, model, no_network, monkeypatch, tmp_path):
    """That takes longer than most of their work."""
    tasks = []

    def recorded(function, of_function, processes, text):
        tasks.extend((function, task) for task in of_function)
        return [function(*task) for task in of_function]

    for sender in (completed_dataset, raw_format):
        monkeypatch.setattr(sender, "parallel", recorded)
    complete(6, model, 173)
    (tmp_path / "tasks").write_bytes(pickle.dumps(tasks))
    code = "import pickle, sys; print(len(pickle.load(open(sys.argv[1], 'rb'))), 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "tasks")], capture_output=True, text=True,
                            check=True)
    assert result.stdout.split() == [str(len(tasks)), "False"] and len(tasks) > 10


# ---- interruption ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["completion._predict", "completed_dataset.CompletedDataset._replace_labels",
                                   "completed_dataset._require_annotations", "completion.write_review_list"])
def test_an_interruption_leaves_nothing_behind(few, model, nnunet, no_network, monkeypatch, where):
    def interrupt(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(f"nnunet_confkd.inference.{where}", interrupt)
    before = sorted(nnunet.raw("").rglob("*")), sorted(nnunet.preprocessed("").rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        complete(6, model, 72)
    assert (sorted(nnunet.raw("").rglob("*")), sorted(nnunet.preprocessed("").rglob("*"))) == before


def test_folders_that_cannot_be_written_are_told_before_the_prediction(few, model, nnunet, no_prediction, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied", str(folder))
    monkeypatch.setattr(folders, "_claim", denied)
    _refused(nnunet, "cannot be written, nothing was kept; check the permissions", model)


@pytest.mark.parametrize("spoil", [
    lambda label: np.where(label == 1, 2, label), lambda label: np.full_like(label, IGNORE)])
def test_a_label_that_comes_back_changed_is_never_kept(few, model, nnunet, no_network, monkeypatch, spoil):
    """A fault of the program or of a disk has changed an annotated voxel, or has not filled the others."""
    write_into = raw_format.write_into

    def spoiling(target, *args):
        write_into(target, *args)
        _label(target / "labelsTr" / f"{few.partial[0]}.nii.gz", spoil)
    monkeypatch.setattr(completed_dataset, "write_into", spoiling)
    before = sorted(nnunet.raw("").iterdir())
    with pytest.raises(RuntimeError, match=f"not written as they should be: {few.partial[0]}$"):
        complete(6, model, 73)
    assert sorted(nnunet.raw("").iterdir()) == before
