"""Folds whose teachers have come to different points: left behind, completed labels, or still training."""
from __future__ import annotations

import argparse

import pytest
import torch

from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.completion import TrainedModel
from nnunet_confkd.nnunet_commands import _with_checkpoint
from nnunet_confkd.training.network import LEFT_IN_EPOCH


def checkpoint(file, left: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {"decoder.x": torch.zeros(1), "teacher_decoder.x": torch.zeros(1), LEFT_IN_EPOCH: torch.tensor([left])}
    torch.save({"network_weights": weights}, file)


@pytest.mark.parametrize("branch", ["teacher", "mean"])
@pytest.mark.parametrize("folds", [(0, 1), (1, 0)])
def test_a_teacher_that_was_left_is_refused_in_any_fold(tmp_path, branch, folds):
    for fold, left in ((0, 0), (1, 7)):
        checkpoint(tmp_path / f"fold_{fold}" / "checkpoint_latest.pth", left)
    args = argparse.Namespace(chk="checkpoint_latest.pth")
    with pytest.raises(InputError, match="fold_1.*its teacher has completed labels"):
        _with_checkpoint(branch, [tmp_path / f"fold_{fold}" for fold in folds], ["-chk", args.chk], args)


def test_a_checkpoint_that_is_named_is_taken(tmp_path):
    for name in ("checkpoint_best.pth", "checkpoint_teacher.pth"):
        checkpoint(tmp_path / "fold_0" / name, 0)
    for argv in (["-chk", "checkpoint_best.pth"], ["-chk=checkpoint_best.pth"]):
        args = argparse.Namespace(chk="checkpoint_best.pth")
        assert _with_checkpoint("teacher", [tmp_path / "fold_0"], argv, args) == argv
        assert args.chk == "checkpoint_best.pth"


def test_a_fold_that_is_still_training_does_not_hide_the_teacher_of_another(tmp_path):
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_text("{}")
    checkpoint(tmp_path / "fold_0" / "checkpoint_final.pth", 7)
    checkpoint(tmp_path / "fold_0" / "checkpoint_teacher.pth", 0)
    checkpoint(tmp_path / "fold_1" / "checkpoint_latest.pth", 0)
    assert TrainedModel(tmp_path, "teacher").checkpoint_name == "checkpoint_teacher.pth"
    assert TrainedModel(tmp_path, "student").checkpoint_name == "checkpoint_final.pth"
