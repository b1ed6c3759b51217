"""What is printed: nnU-Net's misleading lines, and durations."""
from __future__ import annotations

import sys

import pytest

from nnunet_confkd.output import duration, explained, explained_output


def test_lines_that_mislead_are_explained_or_left_out_and_all_others_stay(capsys):
    with explained_output():
        print("\n############################\nINFO: You are using the old nnU-Net default plans. We have updated our "
              "recommendations. Read more\n############################\n")
        print("Trainer 'ConfKDTrainer' not found in nnunetv2.training.nnUNetTrainer.\nSearching in external trainer "
              "paths from environment variable 'nnUNet_extTrainer'...")
        print("Searching in: /somewhere\n  Inspecting module: confkd_trainers")
        print("Found class ConfKDTrainer in confkd_trainers")
        print("Using trainer 'ConfKDTrainer' from: /somewhere")
        print("2026-01-02 03:04:05.678901: INFO: torch.compile disabled because device is CPU")
        print("in", "pieces", end="")
        sys.stdout.flush()
        print(" and whole")
        print("no end", end="")
    print(".")
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines[0].startswith("nnU-Net's default plans are used. They are fine")
    assert lines[1:] == ["Using trainer 'ConfKDTrainer' from: /somewhere", "in pieces and whole", "no end."]


def test_the_lines_are_still_nnunets(monkeypatch, tmp_path, capsys):
    """If nnU-Net changes one of them, this fails."""
    from nnunetv2.run import run_training
    from nnunetv2.utilities import find_objects

    monkeypatch.setattr(find_objects.nnUNet_extTrainer, "get", lambda: str(tmp_path))
    monkeypatch.setattr(find_objects.nnUNet_extTrainer, "is_set", lambda: True)
    with pytest.raises(RuntimeError):
        find_objects.recursive_find_trainer_class_by_name("NoTrainer")
    monkeypatch.setattr(run_training, "get_trainer_from_args", None)
    with pytest.raises(TypeError):
        run_training.run_training("Dataset001_A", "2d", 0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) == 7 and [explained(line) for line in lines if explained(line)] == [
        "nnU-Net's default plans are used. They are fine; for GPUs of 9 GB and more it recommends others: confkd plan "
        "-d ID -pl nnUNetPlannerResEncM"]


@pytest.mark.parametrize("seconds, expected", [
    (0.2, "about 1 second"), (59.6, "about 60 seconds"), (150, "about 2 minutes"), (5000, "about 83 minutes"),
    (7200, "about 2.0 hours"), (50000, "about 14 hours"), (300000, "about 3.5 days")])
def test_durations_are_rounded(seconds, expected):
    assert duration(seconds) == expected
