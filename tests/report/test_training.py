"""The section on the training."""
from __future__ import annotations

import pytest

from nnunet_confkd.report.model import Fold
from nnunet_confkd.report.training import _history


def fold(name, settings, *history):
    record = {"settings": settings, "history": [{"until_epoch": epoch, "settings": of} for epoch, of in history]}
    return Fold(name, "ConfKDTrainer", 5, {}, record, ["student", "teacher"])


@pytest.mark.parametrize("folds", [
    [fold("fold_0", {"seed": 1})], [Fold("fold_0", "nnUNetTrainer", 1, {}, None, ["student"])],
    [Fold("fold_0", "ConfKDTrainer", 1, {}, {"settings": {}}, ["student"])]])
def test_a_training_that_was_not_continued_has_no_history(folds):
    assert _history(folds) == ""


def test_earlier_settings_of_a_continued_training_are_shown():
    text = _history([fold("fold_0", {"epochs": 9, "same": 0}, (2, {"epochs": 3, "seed": 1, "same": 0}),
                          (5, {"epochs": 6, "same": 0})), fold("fold_1", {"epochs": 9})])
    assert [paragraph.removeprefix('<p class="notice">') for paragraph in text.split("</p>")] == [
        "Fold 0 was continued with other settings after epoch 2. Until then it was trained with epochs 3 (then 6), "
        "seed 1 (then none).",
        "Fold 0 was continued with other settings after epoch 5. Until then it was trained with epochs 6 (then 9).", ""]


def test_names_of_settings_are_escaped():
    assert "&lt;b&gt; 1 (then 2)" in _history([fold("fold_0", {"<b>": 2}, (1, {"<b>": 1}))])
