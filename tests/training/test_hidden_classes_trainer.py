"""The trainer on real images that are not annotated for all classes: steps, no full case, bad input, a whole run."""
from __future__ import annotations

import json
from copy import deepcopy

import numpy as np
import pytest
import torch

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.losses import TERMS

HIDDEN = "Dataset016_Hidden"
SHORT = {"epochs": 1, "iterations_per_epoch": 3, "seed": 0, "kl_ramp_start": 0, "kl_ramp_end": 0}


def started(workspace, configuration: str, trainer: str = "ConfKDTrainer", fold: int | str = 0):
    """A trainer up to its first batch."""
    made = workspace.trainer(HIDDEN, configuration, trainer, fold)
    made.on_train_start()
    made.on_train_epoch_start()
    return made


def log_of(trainer) -> str:
    with open(trainer.log_file) as log:
        return log.read()


@pytest.fixture
def own(nnunet, hidden_classes, tmp_path):
    """A private, active workspace with the data, for a test that changes them."""
    return nnunet.copy(tmp_path / "nnunet", HIDDEN)


def edit(workspace, change) -> None:
    """Change both copies of dataset.json."""
    for folder in (workspace.raw(HIDDEN), workspace.preprocessed(HIDDEN)):
        described = json.loads((folder / "dataset.json").read_text())
        change(described)
        (folder / "dataset.json").write_text(json.dumps(described))


def split(workspace, cases: dict, *roles: str, validation: str = "validation") -> None:
    """Let the cases of some roles train."""
    training = sorted(case for role in roles for case in cases[role])
    (workspace.preprocessed(HIDDEN) / "splits_final.json").write_text(json.dumps(
        [{"train": training, "val": cases[validation]}]))


# ---- steps ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["2d", "3d_fullres"])
def test_a_step_moves_every_part_and_reports_every_term(nnunet, hidden_classes, base):
    trainer = started(nnunet, nnunet.configure(HIDDEN, f"step_{base}", base, SHORT, batch_size=6))
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    seen = set()
    for _ in range(3):
        batch = next(trainer.dataloader_train)
        for listed, case in zip(batch["listed"], batch["keys"]):
            role = next(role for role in hidden_classes if case in hidden_classes[role])
            names = ["anterior", "body", "tail"] if role == "full" else role.removesuffix(" points").split()
            assert listed.tolist() == [True, *(name in names for name in ("anterior", "body", "tail"))]
        seen |= {tuple(listed) for listed in batch["hint_listed"][:batch["num_full"]].tolist()}
        result = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in result.values())
        assert all(result[f"loss_{term}"] != 0 for term in TERMS)
    assert any(not all(listed) for listed in seen)  # classes are hidden on full images
    moved = {name for name, p in trainer.network.named_parameters() if not torch.equal(p, before[name])}
    for part in ("encoder.", "decoder.", "teacher_decoder."):
        assert any(name.startswith(part) for name in moved)
    with torch.no_grad():
        counts = trainer.validation_step(next(trainer.dataloader_val))
    assert counts["tp_hard"].shape == counts["teacher_fn_hard"].shape == (3,)
    assert "; 7 not annotated for all classes" in log_of(trainer)


def test_the_teacher_sees_candidate_sets(nnunet, hidden_classes):
    trainer = started(nnunet, nnunet.configure(HIDDEN, "sets", "2d", SHORT, batch_size=8))
    hinted = []
    trainer.network.teacher_decoder.hints.register_forward_pre_hook(lambda _, inputs: hinted.append(inputs[1]))
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        hinted.clear()
        trainer.train_step(batch)
        images = torch.cat([hints.channels(4, [1, 1]) for hints in hinted])
        for image, listed in zip(images, batch["hint_listed"]):
            candidates = image[:, image[-1].bool()].bool()  # (heads + 1, voxels)
            merged = candidates[0]
            assert (candidates[:4][listed][1:].sum(0) + merged == 1).all()  # a listed class or the merged background
            assert (candidates[:4][~listed] == merged).all()


def test_what_is_hidden_costs_the_student_nothing(nnunet, hidden_classes):
    """A student that finds the hidden class has the loss of one that finds background there."""
    trainer = started(nnunet, nnunet.configure(HIDDEN, "nothing", "2d", SHORT, batch_size=6))
    dense = hidden_classes["anterior"] + hidden_classes["body tail"]
    batch = next(trainer.dataloader_train)
    while not set(dense) & set(batch["keys"]):
        batch = next(trainer.dataloader_train)
    image = next(i for i, case in enumerate(batch["keys"]) if case in dense)
    hidden = int((~batch["listed"][image]).nonzero()[0])
    target = batch["target"][0][image:image + 1]
    background = torch.nn.functional.one_hot(torch.where(target == 4, 0, target)[0].long(), 4).movedim(-1, 1) * 9.0
    found = background.clone()
    found[:, [0, hidden]] = background[:, [hidden, 0]]
    listed = batch["listed"][image:image + 1]
    losses = [trainer.loss.supervised(logits, target, listed) for logits in (background, found)]
    torch.testing.assert_close(*losses)
    assert trainer.loss.supervised(found, target) > trainer.loss.supervised(background, target) + 0.1

    weights = deepcopy(trainer.network.state_dict())
    merged = trainer.train_step({**batch, "target": [t.clone() for t in batch["target"]]})["loss_student"]
    trainer.network.load_state_dict(weights)
    del batch["listed"]
    assert trainer.train_step(batch)["loss_student"] != merged


def test_regions_train_and_validate(own, hidden_classes):
    lists = {"anterior": ["whole"], "body tail": ["whole", "hind"], "anterior body": ["whole"],
             "anterior tail": ["whole"], "tail points": ["hind"]}
    edit(own, lambda described: described.update(
        labels={"background": 0, "whole": [1, 2, 3], "hind": [2, 3], "ignore": 4}, regions_class_order=[1, 2],
        annotated_classes={case: names for role, names in lists.items() for case in hidden_classes[role]}))
    trainer = started(own, own.configure(HIDDEN, "regions", "2d", SHORT, batch_size=6))
    found = set()
    for _ in range(4):
        batch = next(trainer.dataloader_train)
        found |= {tuple(row) for row in batch["listed"].tolist()}
        assert all(np.isfinite(value) for value in trainer.train_step(batch).values())
    assert {(True, True), (True, False)} <= found
    with torch.no_grad():
        assert trainer.validation_step(next(trainer.dataloader_val))["tp_hard"].shape == (2,)


def test_a_data_set_without_an_ignore_label_may_hide_classes(own, hidden_classes):
    def change(described):
        del described["labels"]["ignore"]
        del described["supervision"]
        del described["annotated_classes"][hidden_classes["tail points"][0]]

    edit(own, change)
    for folder in own.preprocessed(HIDDEN).glob("nnUNetPlans_*"):
        for file in folder.glob(f"{hidden_classes['tail points'][0]}*"):
            file.unlink()
    split(own, hidden_classes, "full", "anterior", "body tail")
    trainer = started(own, own.configure(HIDDEN, "no_ignore", "2d", SHORT))
    assert trainer.kinds[hidden_classes["anterior"][0]] == "partial" and not trainer.label_manager.has_ignore_label
    for _ in range(2):
        batch = next(trainer.dataloader_train)
        assert "prior_shift" not in batch and torch.equal(batch["hint_mask"][2:], batch["inside"][2:])
        result = trainer.train_step(batch)
        assert all(np.isfinite(value) for value in result.values()) and result["annotated_share"] == 1


# ---- no full case ---------------------------------------------------------------------------------------------------

def test_without_a_full_case_the_baseline_trains(own, hidden_classes):
    split(own, hidden_classes, "anterior", "body tail")
    configuration = own.configure(HIDDEN, "none", "2d", SHORT)
    trainer = started(own, configuration, "ConfKDTrainer_partialOnly")
    for _ in range(2):
        batch = next(trainer.dataloader_train)
        assert batch["num_full"] == 0
        result = trainer.train_step(batch)
        assert np.isfinite(result["loss"]) and result["loss_student"] == result["loss"]
    with pytest.raises(InputError, match="none of the 4 training cases is fully annotated .*there is no teacher. Train "
                                         "without one .-tr ConfKDTrainer_partialOnly."):
        started(own, configuration)


def test_without_a_full_case_the_teacher_learns_from_cases_that_list_more_than_others(own, hidden_classes):
    split(own, hidden_classes, "anterior", "body tail", "anterior body", "anterior tail")
    teachers = hidden_classes["anterior body"] + hidden_classes["anterior tail"]
    trainer = started(own, own.configure(HIDDEN, "richer", "2d", SHORT))
    assert f"list more classes than others: {', '.join(sorted(teachers))}" in log_of(trainer)
    shown = set()
    for _ in range(8):
        batch = next(trainer.dataloader_train)
        assert batch["num_full"] == 2 and set(batch["keys"][:2]) <= set(teachers) and not set(
            batch["keys"][2:]) & set(teachers)
        shown |= {tuple(row) for row in batch["hint_listed"][:2].tolist()}
        result = trainer.train_step(batch)
        assert result["loss_teacher"] != 0 and all(np.isfinite(value) for value in result.values())
    assert (True, True, False, False) in shown


def test_a_class_that_no_training_case_lists_is_named(own, hidden_classes):
    split(own, hidden_classes, "anterior", "anterior body")
    with pytest.raises(InputError, match="no training case is annotated for tail"):
        started(own, own.configure(HIDDEN, "without", "2d", SHORT), "ConfKDTrainer_partialOnly")


def test_partially_annotated_validation_cases_count_their_own_classes(own, hidden_classes):
    split(own, hidden_classes, "full", "body tail", validation="anterior")
    trainer = started(own, own.configure(HIDDEN, "lacking", "2d", SHORT))
    with torch.no_grad():
        counts = trainer.validation_step(next(trainer.dataloader_val))
    assert counts["fp_hard"][1:].tolist() == [0, 0] and counts["fn_hard"][1:].tolist() == [0, 0]
    assert counts["tp_hard"][0] + counts["fn_hard"][0] > 0
    assert "2 validation case(s) are not annotated for all classes" in log_of(trainer)


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lists, text", [
    ({"stranger": ["body"]}, "stranger: there is no such case"),
    ({"full": ["bodi"]}, r"hippocampus_\d+: 'bodi' is no class in \"labels\" \(did you mean 'body'\?\)"),
    ({"full": ["body"]}, r"hippocampus_\d+: its label has \d+ voxels of value 1 \(anterior\), which it does not list")])
def test_a_wrong_list_stops_before_the_training_and_names_case_and_class(own, hidden_classes, lists, text):
    edit(own, lambda described: described.update(annotated_classes={
        hidden_classes.get(role, [role])[0]: names for role, names in lists.items()}))
    with pytest.raises(InputError, match=text):
        started(own, own.configure(HIDDEN, "wrong", "2d", SHORT))


# ---- a whole run ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base, with_lacking", [("2d", False), ("3d_fullres", False), ("3d_fullres", True)])
def test_a_whole_run_is_validated_and_recorded(own, hidden_classes, base, with_lacking):
    """The final validation is on a fully annotated case, or also on one that lists a single class."""
    lacking = hidden_classes["anterior"][1]
    if with_lacking:
        split(own, {**hidden_classes, "anterior": hidden_classes["anterior"][:1],
                    "validation": [*hidden_classes["validation"], lacking]},
              *(role for role in hidden_classes if role != "validation"))
    fold = own.train(HIDDEN, own.configure(HIDDEN, "run", base, SHORT, max_patch=56, batch_size=6, features=(2, 4, 4)))
    record = json.loads((fold / "confkd.json").read_text())
    assert record["annotated_classes"][hidden_classes["anterior"][0]] == ["anterior"]
    assert record["supervision"][hidden_classes["anterior"][0]] == "partial"
    assert len(record["annotated_classes"]) == (6 if with_lacking else 7)
    assert record["teacher_validated_with_hints"] != with_lacking
    expected = {hidden_classes["validation"][0]: ["1", "2", "3"], **({lacking: ["1"]} if with_lacking else {})}
    for branch in ("validation", "validation_teacher"):
        summary = json.loads((fold / branch / "summary.json").read_text())
        counted = {entry["prediction_file"].rpartition("/")[2].removesuffix(".nii.gz"):
                   [value for value, metrics in entry["metrics"].items() if not np.isnan(metrics["TP"])]
                   for entry in summary["metric_per_case"]}
        assert counted == expected, branch


def test_a_later_validation_leaves_out_the_same_classes(nnunet, hidden_classes):
    """In fold all, whose cases lack classes, and without a teacher, whose hints would read the labels."""
    block = {**SHORT, "iterations_per_epoch": 1, "weight_kl": 0}
    configuration = nnunet.configure(HIDDEN, "later", "2d", block, max_patch=56, batch_size=2, features=(2, 4, 4))
    options = dict(trainer="ConfKDTrainer_partialOnly", fold="all")
    fold = nnunet.train(HIDDEN, configuration, **options)
    first = json.loads((fold / "validation" / "summary.json").read_text())
    nnunet.train(HIDDEN, configuration, only_run_validation=True, **options)
    assert json.loads((fold / "validation" / "summary.json").read_text()) == first and first["confkd_not_annotated"]
