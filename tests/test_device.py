"""The device that every command computes on."""
from __future__ import annotations

import pytest
import torch

from nnunet_confkd.device import choose_device
from nnunet_confkd.errors import InputError


def pretend(monkeypatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_default_device_is_cuda_else_the_cpu_and_one_line_says_so(monkeypatch, capsys):
    pretend(monkeypatch, cuda=True, mps=False)
    assert choose_device() == choose_device("cuda") == "cuda" and choose_device("cpu") == "cpu"
    assert capsys.readouterr().out == ""
    pretend(monkeypatch, cuda=False, mps=False)
    assert choose_device() == "cpu" and capsys.readouterr().out == "no CUDA device: running on the CPU\n"
    pretend(monkeypatch, cuda=False, mps=True)
    assert choose_device() == "cpu" and "-device mps" in capsys.readouterr().out and choose_device("mps") == "mps"


def test_a_device_that_is_not_there_or_not_known_is_refused(monkeypatch):
    pretend(monkeypatch, cuda=False, mps=False)
    with pytest.raises(InputError, match="-device cuda: there is no CUDA device on this machine; use -device cpu"):
        choose_device("cuda")
    with pytest.raises(InputError, match="-device cuda:1: must be cuda, cpu or mps; .*CUDA_VISIBLE_DEVICES"):
        choose_device("cuda:1")
