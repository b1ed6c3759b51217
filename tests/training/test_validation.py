"""The final validation: what it hands to the processes that export, and what it leaves in the folders of the fold."""
from __future__ import annotations

import json
import shutil
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from nnunetv2.evaluation.accumulate_cv_results import accumulate_cv_results
from nnunetv2.inference.export_prediction import export_prediction_from_logits

from nnunet_confkd.training.validation import _predict_cases

HIPPOCAMPUS = "Dataset004_Hippocampus"
SHORT = {"epochs": 1, "iterations_per_epoch": 1}


class Pool:
    """Stands for the processes: counts the bytes that would be pickled, and does the work in this one."""

    def __init__(self):
        self.submitted, self.pickled = [], []

    def wait_for_room(self):
        pass

    def submit(self, function, *args):
        self.submitted.append(args)
        self.pickled.append(len(ForkingPickler.dumps((function, args))))
        function(*args)


def test_each_case_is_handed_over_once_and_its_logits_are_not_pickled(nnunet, hippocampus, hippocampus_model, tmp_path):
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d_export", continue_training=True)
    trainer.load_checkpoint(str(hippocampus_model / "fold_0" / "checkpoint_final.pth"))
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    folders = {"student": tmp_path / "student", "teacher": tmp_path / "teacher"}
    for folder in (*folders.values(), tmp_path / "expected"):
        folder.mkdir()
    cases, pool = sorted(hippocampus["validation"])[:2], Pool()
    _predict_cases(trainer, cases, list(folders), pool, folders, True)
    assert len(pool.submitted) == len(cases)
    for case, (logits, *_), pickled in zip(cases, pool.submitted, pool.pickled):
        assert set(logits) == set(folders) and all(isinstance(of, torch.Tensor) for of in logits.values())
        properties = trainer.dataset_class(trainer.preprocessed_dataset_folder).load_case(case)[3]
        others = len(ForkingPickler.dumps(properties))  # they hold the places of the classes
        assert pickled - others < sum(of.nbytes for of in logits.values()) / 10
        # the files are those that nnU-Net's export writes from an array of the branch's own
        for branch, folder in folders.items():
            expected = tmp_path / "expected" / case
            export_prediction_from_logits(np.ascontiguousarray(logits[branch].numpy()), properties, trainer.configuration_manager,
                                          trainer.plans_manager, trainer.dataset_json, str(expected), True)
            assert (folder / f"{case}.nii.gz").read_bytes() == expected.with_name(f"{case}.nii.gz").read_bytes()
            ours, nnunets = (np.load(of.with_name(f"{case}.npz"))["probabilities"] for of in (folder / case, expected))
            np.testing.assert_array_equal(ours, nnunets)


@pytest.fixture
def split(nnunet, hippocampus):
    """Writes the one fold of the split; the former file comes back at the end."""
    file = nnunet.preprocessed(HIPPOCAMPUS) / "splits_final.json"
    before = file.read_text()
    yield lambda train, val: file.write_text(json.dumps([{"train": train, "val": val}]))
    file.write_text(before)


def test_cases_of_a_former_split_are_moved_out_of_the_way_and_counted_by_nobody(nnunet, hippocampus, split, tmp_path):
    a, b, c = sorted(hippocampus["validation"])[:3]
    configuration = nnunet.configure(HIPPOCAMPUS, "former_split", "2d", SHORT)
    split(hippocampus["full"] + hippocampus["partial"][:2], [a, b])
    fold = nnunet.train(HIPPOCAMPUS, configuration, export_validation_probabilities=True)
    (fold / "validation" / "notes.txt").write_text("not nnU-Net's")
    split(hippocampus["full"] + hippocampus["partial"][:2], [b, c])
    nnunet.train(HIPPOCAMPUS, configuration, only_run_validation=True)
    for name in ("validation", "validation_teacher"):
        summary = json.loads((fold / name / "summary.json").read_text())
        assert [case["prediction_file"].split("/")[-1] for case in summary["metric_per_case"]] == [f"{b}.nii.gz", f"{c}.nii.gz"]
        old, = fold.glob(f"{name}_old_*")
        assert {file.name for file in old.iterdir()} == {f"{a}.nii.gz", f"{a}.npz", f"{a}.pkl"}
    assert (fold / "validation" / "notes.txt").is_file()
    log = "".join(file.read_text() for file in fold.glob("training_log*.txt"))
    assert f"validation: moved the files of 1 cases that this fold does not validate to {fold / 'validation_old_'}" in log
    assert "were training cases" not in log
    # what nnUNetv2_find_best_configuration collects
    accumulate_cv_results(str(fold.parent), str(tmp_path / "merged"), (0,), num_processes=1)
    assert {file.name for file in (tmp_path / "merged").glob("*.nii.gz")} == {f"{b}.nii.gz", f"{c}.nii.gz"}

    trained = hippocampus["full"][0]
    split([case for case in hippocampus["full"] if case != trained] + hippocampus["partial"][:2], [b, trained])
    nnunet.train(HIPPOCAMPUS, configuration, only_run_validation=True)
    log = "".join(file.read_text() for file in fold.glob("training_log*.txt"))
    assert f"WARNING: 1 of the 2 validation cases were training cases of this network (see {fold / 'confkd.json'}): {trained}." in log
    shutil.rmtree(fold.parent)
