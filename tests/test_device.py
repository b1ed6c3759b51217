"""The device that every command computes on."""
from __future__ import annotations

import os
import time

import pytest
import torch

from nnunet_confkd import device
from nnunet_confkd.device import choose_device, count_operations, operations_per_second
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


def test_operations_are_counted_as_the_layers_have_them():
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Conv2d(5, 7, 1))
    expected = 2 * 2 * 10 * 12 * (3 * 5 * 9 + 5 * 7)  # a multiplication and an addition each; B = 2
    assert count_operations(layers, (2, 3, 10, 12)) == expected


def test_the_speed_of_the_cpu_predicts_the_time_of_another_layer():
    """Within a factor of 10, because other processes may disturb either."""
    layer, image = torch.nn.Conv2d(24, 40, 3, padding=1), torch.rand(8, 24, 80, 80)
    with torch.inference_mode():
        layer(image)
        start = time.perf_counter()
        for _ in range(5):
            layer(image)
        seconds = (time.perf_counter() - start) / 5
    expected = count_operations(layer, (8, 24, 80, 80)) / operations_per_second(2)
    assert expected / 10 < seconds < expected * 10


def test_a_device_that_is_not_there_or_not_known_is_refused(monkeypatch):
    pretend(monkeypatch, cuda=False, mps=False)
    with pytest.raises(InputError, match="-device cuda: there is no CUDA device on this machine; use -device cpu"):
        choose_device("cuda")
    with pytest.raises(InputError, match="-device cuda:1: must be cuda, cpu or mps; .*CUDA_VISIBLE_DEVICES"):
        choose_device("cuda:1")
