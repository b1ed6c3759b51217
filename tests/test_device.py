"""The device that every command computes on."""
from __future__ import annotations

import os

import pytest
import torch

from nnunet_confkd import device
from nnunet_confkd.device import choose_device, seconds_per_pass
from nnunet_confkd.errors import InputError


def pretend(monkeypatch, cuda: bool, mps: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_default_device_is_cuda_else_the_cpu_and_one_line_says_so(monkeypatch, capsys):
    pretend(monkeypatch, cuda=True, mps=False)
    assert choose_device() == choose_device("cuda") == "cuda"
    assert capsys.readouterr().out == ""
    assert choose_device("cpu") == "cpu" and capsys.readouterr().out == "running on the CPU\n"
    pretend(monkeypatch, cuda=False, mps=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_device() == "cpu" and capsys.readouterr().out == "no CUDA device: running on the CPU\n"
    assert choose_device(None, lambda: "it takes long") == "cpu"
    assert capsys.readouterr().out == "no CUDA device: running on the CPU with 3 threads; it takes long\n"


@pytest.mark.parametrize("works", (False, True))
def test_apples_gpu_is_chosen_where_it_works(monkeypatch, capsys, works):
    pretend(monkeypatch, cuda=False, mps=True)
    monkeypatch.setattr(device, "works", lambda name: works and name == "mps")
    assert choose_device() == ("mps" if works else "cpu") and choose_device("mps") == "mps"
    assert ("running on Apple's GPU" in capsys.readouterr().out) == works


def test_a_device_works_if_it_computes_what_the_cpu_computes(monkeypatch):
    assert device.works("cpu") and not device.works("meta") and not device.works("mps")
    moved = []

    def to(self, where):
        moved.append(where)
        if len(moved) == 2:  # the second device computes with other weights
            with torch.no_grad():
                next(self.parameters()).mul_(1.5)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    assert not device.works("cpu") and len(moved) == 2


def test_threads_and_processes_are_those_of_the_cores_unless_the_user_has_set_them(monkeypatch):
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "nnUNet_def_n_proc", "nnUNet_n_proc_DA", "nnUNet_npp", "nnUNet_nps")
    for name in names:
        monkeypatch.setenv(name, "x")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setattr(device, "available_cores", lambda: 4)
    assert (device.cpu_threads(), device.cpu_threads(training=True)) == (4, 3)
    device.prepare_for_cpu(["train", "-device", "cpu"])
    assert [os.environ.get(name) for name in names] == [None, "PASSIVE", "4", "2", "2", "2"]
    for name in names[1:]:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "6,2")
    device.prepare_for_cpu(["train", "-device", "cpu"])
    assert all(os.environ[name] == "7" for name in names[1:])
    assert device.cpu_threads() == device.cpu_threads(training=True) == 6


def test_a_pass_takes_as_long_as_it_takes(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))
    layer = torch.nn.Conv2d(2, 3, 1)
    assert seconds_per_pass(layer, (1, 2, 5, 5), training=False) == 1 and layer.weight.grad is None
    assert seconds_per_pass(layer, (1, 2, 5, 5), training=True) == 1 and layer.weight.grad is not None


def test_a_larger_batch_takes_longer_and_so_does_the_backward_pass():
    layer = torch.nn.Conv2d(16, 16, 3)
    small, large = ((number, 16, 60, 60) for number in (2, 40))
    once = seconds_per_pass(layer, small, training=False)
    assert seconds_per_pass(layer, large, training=False) > 3 * once
    assert seconds_per_pass(layer, large, training=True) > 3 * once


def test_a_device_that_is_not_there_or_not_known_is_refused(monkeypatch):
    pretend(monkeypatch, cuda=False, mps=False)
    with pytest.raises(InputError, match="-device cuda: there is no CUDA device on this machine; use -device cpu"):
        choose_device("cuda")
    with pytest.raises(InputError, match="-device cuda:1: must be cuda, cpu or mps; .*CUDA_VISIBLE_DEVICES"):
        choose_device("cuda:1")
