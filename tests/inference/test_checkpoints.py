"""Checkpoints that others have made."""
from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
import torch

from nnunet_confkd import cli
from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.checkpoints import load_checkpoint


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_real_checkpoint_is_read_whole(hippocampus_model):
    file = hippocampus_model / "fold_0" / "checkpoint_final.pth"
    ours, nnunets = load_checkpoint(file), torch.load(file, weights_only=False)
    assert ours.keys() == nnunets.keys() and ours["init_args"] == nnunets["init_args"]
    for name, weight in ours["network_weights"].items():
        assert torch.equal(weight, nnunets["network_weights"][name])
    for key, values in nnunets["logging"].items():
        np.testing.assert_array_equal(np.asarray(ours["logging"][key], float), np.asarray(values, float))


@pytest.mark.parametrize("place", ("network_weights", "logging", "another"))
def test_a_checkpoint_that_would_run_a_program_is_refused_before_it_does(tmp_path, place):
    file, made = tmp_path / "checkpoint_final.pth", tmp_path / "made"
    torch.save({"network_weights": {}, "logging": {}} | {place: {"x": Payload(made)}}, file)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth: is not opened, .*mkdir"):
        load_checkpoint(file)
    assert not made.exists()
    torch.load(file, weights_only=False)
    assert made.exists()  # so nnU-Net's way of loading would have run it


@pytest.mark.parametrize("content", (b"", b"half", b"PK\x03\x04 half"), ids=("empty", "garbage", "zip"))
def test_broken_files_are_named(tmp_path, content):
    file = tmp_path / "checkpoint_final.pth"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth: cannot be read as a checkpoint"):
        load_checkpoint(file)


@pytest.mark.parametrize("command", ("export", "report", "complete"))
def test_no_command_opens_such_a_model(hippocampus_model, tmp_path, command, capsys):
    model, made = tmp_path / hippocampus_model.name, tmp_path / "made"
    shutil.copytree(hippocampus_model, model)
    file = model / "fold_0" / "checkpoint_final.pth"
    torch.save({**torch.load(file, weights_only=False), "note": Payload(made)}, file)
    arguments = {"export": ["--output", str(tmp_path / "out")], "report": ["--output", str(tmp_path / "out")],
                 "complete": ["-d", "4", "--id", "77", "-device", "cpu"]}[command]
    assert cli.main([command, "--model", str(model), *arguments]) == 1
    assert "is not opened" in capsys.readouterr().err and not made.exists() and not (tmp_path / "out").exists()
