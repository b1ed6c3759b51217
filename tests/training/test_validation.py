"""The final validation: both branches in one pass, what is handed to other processes, and what is left in folders."""
from __future__ import annotations

import json
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
from nnunetv2.inference.export_prediction import export_prediction_from_logits

from nnunet_confkd.training import validation
from nnunet_confkd.training.hints import hint_channels
from nnunet_confkd.training.validation import CasePredictor, leave_out_unlisted, predict_cases, simulated_hints

HIPPOCAMPUS = "Dataset004_Hippocampus"
SHORT = {"epochs": 1, "iterations_per_epoch": 1}


class Pool:
    """Stands for the processes: counts the bytes that would be pickled, and does the work in this one."""

    def __init__(self):
        self.submitted, self.pickled = [], []

    def wait_for_room(self):
        pass

    def wait_for_all(self):
        pass

    def submit(self, function, *args):
        self.submitted.append(args)
        self.pickled.append(len(ForkingPickler.dumps((function, args))))
        function(*args)


@pytest.fixture
def trained(nnunet, hippocampus_model):
    """The trainer of the trained model, ready to validate."""
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d_export", continue_training=True)
    trainer.load_checkpoint(str(hippocampus_model / "fold_0" / "checkpoint_final.pth"))
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    return trainer


def test_a_rank_that_predicts_alone_does_not_wait_for_the_others(trained, hippocampus, monkeypatch):
    """DDP's first pass sends the buffers, of which a network whose teacher completes labels has one."""
    class Ranks(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **options):
            raise AssertionError("all ranks take part in this pass")

    monkeypatch.setattr("nnunet_confkd.training.network.DistributedDataParallel", Ranks)
    trained.network = Ranks(trained.network)
    case = hippocampus["validation"][0]
    data = trained.dataset_class(trained.preprocessed_dataset_folder, [case]).load_case(case)[0]
    predicted = CasePredictor(trained, ["student", "teacher"])(data, None)
    assert predicted["student"].shape == predicted["teacher"].shape


def test_both_branches_are_validated_as_nnunet_does(hippocampus_model, hippocampus):
    """The student's files are nnU-Net's: one for each case, with probabilities, and a summary."""
    dice = {}
    for folder in ("validation", "validation_teacher"):
        summary = json.loads((hippocampus_model / "fold_0" / folder / "summary.json").read_text())
        assert len(summary["metric_per_case"]) == len(hippocampus["validation"])
        assert len(list((hippocampus_model / "fold_0" / folder).glob("*.npz"))) == len(hippocampus["validation"])
        dice[folder] = summary["foreground_mean"]
    assert dice["validation"] != dice["validation_teacher"]


def test_one_pass_for_both_branches_equals_one_pass_each(hippocampus, trained):
    data = trained.dataset_class(trained.preprocessed_dataset_folder).load_case(hippocampus["validation"][0])[0][:]
    calls = []
    trained.network.encoder.register_forward_hook(lambda *_: calls.append(1))
    both = CasePredictor(trained, ["student", "teacher"])(data, None)
    once = len(calls)
    for branch in ("student", "teacher"):
        trained.network.branch = branch
        calls.clear()
        alone = CasePredictor(trained, [branch])(data, None)[branch]
        np.testing.assert_array_equal(both[branch], alone)
        assert len(calls) == once


def test_hints_as_labels_are_a_channel_for_each_class(hippocampus, trained):
    data, seg, _, _ = trained.dataset_class(trained.preprocessed_dataset_folder).load_case(hippocampus["validation"][0])
    label = torch.from_numpy(np.maximum(seg[:], 0).astype(np.int16))
    mask = torch.rand(label.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    generator = torch.Generator().manual_seed(1)
    for weights in trained.network.teacher_decoder.hints.parameters():
        weights.data.normal_(generator=generator)
    predict = CasePredictor(trained, ["student", "teacher"])
    channels = predict(data[:], None, hint_channels(label[None], mask[None], 3)[0])
    labels = predict(data[:], None, torch.where(mask, label + 1, 0))
    assert not trained.network.hints_in_input
    plain = predict(data[:], None)
    for branch in ("student", "teacher"):
        np.testing.assert_allclose(labels[branch], channels[branch], rtol=1e-2, atol=1e-2)  # logits are float16
    np.testing.assert_array_equal(labels["student"], plain["student"])
    assert (labels["teacher"] - plain["teacher"]).abs().max() > 0.1
    # what the validation hands to it
    both = simulated_hints(trained, hippocampus["validation"][0], data[:], seg[:])
    found, spread = both[:1], both[1:]
    assert found.shape == label.shape and set(found.unique().tolist()) <= {0, 1, 2, 3} and (found > 0).any()
    assert (found[found > 0] == label[found > 0] + 1).all()
    assert (spread[found > 0] == found[found > 0]).all() and (spread > 0).sum() > 3 * (found > 0).sum()
    with_both = predict(data[:], None, both)
    np.testing.assert_array_equal(with_both["student"], plain["student"])
    assert (with_both["teacher"] - predict(data[:], None, found)["teacher"]).abs().max() > 0.1


def test_each_case_is_handed_over_once_and_its_logits_are_not_pickled(hippocampus, trained, tmp_path):
    folders = {"student": tmp_path / "student", "teacher": tmp_path / "teacher"}
    for folder in (*folders.values(), tmp_path / "expected"):
        folder.mkdir()
    cases, pool = sorted(hippocampus["validation"])[:1], Pool()
    predict_cases(trained, cases, pool, folders, True)
    assert len(pool.submitted) == len(cases)
    for case, (logits, *_), pickled in zip(cases, pool.submitted, pool.pickled):
        assert set(logits) == set(folders) and all(isinstance(of, torch.Tensor) for of in logits.values())
        properties = trained.dataset_class(trained.preprocessed_dataset_folder).load_case(case)[3]
        others = len(ForkingPickler.dumps(properties))  # they hold the places of the classes
        assert pickled - others < sum(of.nbytes for of in logits.values()) / 10
        # the files are those that nnU-Net's export writes from an array of the branch's own
        for branch, folder in folders.items():
            expected = tmp_path / "expected" / case
            export_prediction_from_logits(np.ascontiguousarray(logits[branch].numpy()), properties,
                                          trained.configuration_manager, trained.plans_manager, trained.dataset_json,
                                          str(expected), True)
            assert (folder / f"{case}.nii.gz").read_bytes() == expected.with_name(f"{case}.nii.gz").read_bytes()
            ours, nnunets = (np.load(of.with_name(f"{case}.npz"))["probabilities"] for of in (folder / case, expected))
            np.testing.assert_array_equal(ours, nnunets)


def test_the_branches_of_a_large_case_are_predicted_and_handed_over_one_by_one(hippocampus, trained, tmp_path,
                                                                               monkeypatch):
    """So the memory holds the logits of one branch. The files are the same."""
    cases, written = sorted(hippocampus["validation"])[:1], []
    monkeypatch.setattr(trained, "inference_allowed_mirroring_axes", None)
    for at_once, handed_over in ((validation.AT_ONCE, [["student", "teacher"]]), (100, [["student"], ["teacher"]])):
        monkeypatch.setattr(validation, "AT_ONCE", at_once)
        folders = {branch: tmp_path / str(at_once) / branch for branch in ("student", "teacher")}
        for folder in folders.values():
            folder.mkdir(parents=True)
        pool = Pool()
        predict_cases(trained, cases, pool, folders, False)
        assert [list(logits) for logits, *_ in pool.submitted] == handed_over
        assert [list(files) for _, files, *_ in pool.submitted] == handed_over
        written.append([(folder / f"{cases[0]}.nii.gz").read_bytes() for folder in folders.values()])
    assert written[0] == written[1] and written[0][0] != written[0][1]


def test_cases_of_a_former_split_are_moved_and_not_counted(nnunet, hippocampus, split, tmp_path):
    a, b, c = sorted(hippocampus["validation"])[:3]
    configuration = nnunet.configure(HIPPOCAMPUS, "former_split", "2d", SHORT, max_patch=56, features=(2, 4, 4))
    split([{"train": hippocampus["full"] + hippocampus["partial"][:2], "val": [a, b]}])
    fold = nnunet.train(HIPPOCAMPUS, configuration, export_validation_probabilities=True)
    (fold / "validation" / "notes.txt").write_text("not nnU-Net's")
    split([{"train": hippocampus["full"] + hippocampus["partial"][:2], "val": [b, c]}])
    nnunet.train(HIPPOCAMPUS, configuration, only_run_validation=True)
    for name in ("validation", "validation_teacher"):
        summary = json.loads((fold / name / "summary.json").read_text())
        measured = [case["prediction_file"].split("/")[-1] for case in summary["metric_per_case"]]
        assert measured == [f"{b}.nii.gz", f"{c}.nii.gz"]
        old, = fold.glob(f"{name}_old_*")
        assert {file.name for file in old.iterdir()} == {f"{a}.nii.gz", f"{a}.npz", f"{a}.pkl"}
    assert (fold / "validation" / "notes.txt").is_file()
    log = "".join(file.read_text() for file in fold.glob("training_log*.txt"))
    assert f"moved the files of 1 cases that this fold does not validate to {fold / 'validation_old_'}" in log
    assert "were training cases" not in log
    # what nnUNetv2_find_best_configuration collects
    accumulate_cv_results(str(fold.parent), str(tmp_path / "merged"), (0,), num_processes=1)
    assert {file.name for file in (tmp_path / "merged").glob("*.nii.gz")} == {f"{b}.nii.gz", f"{c}.nii.gz"}

    known = hippocampus["full"][0]
    train = [case for case in hippocampus["full"] if case != known] + hippocampus["partial"][:2]
    split([{"train": train, "val": [b, known]}])
    nnunet.train(HIPPOCAMPUS, configuration, only_run_validation=True)
    log = "".join(file.read_text() for file in fold.glob("training_log*.txt"))
    assert "WARNING: 1 of the 2 validation cases were training cases of this network" in log
    assert f"(see {fold / 'confkd.json'}): {known}." in log
    shutil.rmtree(fold.parent)


def test_the_summary_leaves_out_classes_that_a_case_is_not_annotated_for():
    """The means are those over the cases that are annotated, which nnU-Net computes from these alone."""
    def entry(case, *dice):
        return {"prediction_file": f"/x/{case}.nii.gz",
                "metrics": {label: {"Dice": value, "FP": 9} for label, value in zip((1, (2, 3), 4), dice)}}

    cases = [entry("a", 0.8, 0, 0.0), entry("b", 0.0, 0.5, 0.0), entry("c.d", 0.6, 0.7, 0.0)]
    metrics = {"metric_per_case": cases, "mean": {label: {"Dice": 0, "FP": 0} for label in (1, (2, 3), 4)},
               "foreground_mean": {"Dice": 0, "FP": 0}}
    leave_out_unlisted(metrics, {"a": [(2, 3), 4], "b": [1, 4], "c.d": [4], "e": [1]}, ".nii.gz")
    assert metrics["mean"][1]["Dice"] == pytest.approx(0.7) and metrics["mean"][2, 3]["Dice"] == pytest.approx(0.6)
    assert np.isnan(metrics["mean"][4]["Dice"]) and metrics["foreground_mean"]["Dice"] == pytest.approx(0.65)
    assert np.isnan(cases[0]["metrics"][2, 3]["FP"]) and cases[0]["metrics"][1] == {"Dice": 0.8, "FP": 9}
    assert metrics["confkd_not_annotated"] == {"a": ["(2, 3)", "4"], "b": ["1", "4"], "c.d": ["4"]}
