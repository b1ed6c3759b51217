"""What the report reads from a model's folder."""
from __future__ import annotations

from types import SimpleNamespace

import pytest

from nnunet_confkd.report.model import Fold, Model


@pytest.mark.parametrize("record, table, curves", [
    ({"teacher_validated_with_hints": True}, "teacher without hints", "teacher with simulated hints"),
    ({"teacher_validated_with_hints": False}, "teacher", "teacher"), ({}, "teacher", "teacher"),
    (None, "teacher", "teacher")])
def test_the_teachers_name_says_whether_it_had_hints(record, table, curves):
    fold = Fold("fold_0", "ConfKDTrainer", 1, {}, record, ["student", "teacher"])
    assert fold.names == {"student": "student", "teacher": table}
    assert fold.curve_names == {"student": "student", "teacher": curves}


def test_a_single_branch_is_nobodys_student():
    assert Fold("fold_0", "nnUNetTrainer", 1, {}, None, ["student"]).names == {"student": "network"}


def test_classes_and_regions_have_their_labels():
    labels = {"background": 0, "whole": [1, 2], "part": [2], "other": 4, "ignore": 5}
    found = Model.classes.fget(SimpleNamespace(dataset_json={"labels": labels}))
    assert found == {"whole": (1, 2), "part": (2,), "other": (4,)}
