"""The device that every command computes on, and how long that may take on a CPU."""
from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunet_confkd.errors import InputError, counted

OPTION_HELP = "default: cuda where there is one, else mps (Apple) where it works, else cpu"
MOST_AUGMENTING = 2  # processes that load data; a network on a CPU needs no more


def choose_device(asked: str | None = None, expected: Callable[[], str | None] = lambda: None) -> str:
    """Check the device that was asked for, or choose one. A line is printed unless it is CUDA.

    Args:
        asked: "cuda", "cpu" or "mps". None: "cuda" if there is a CUDA device, else "mps" if Apple's GPU computes what
            a network needs, else "cpu".
        expected: Returns how long the work is expected to take on the CPU, for this line; None if it is not known.

    Returns:
        The device.

    Raises:
        InputError: There is no such device on this machine.

    Examples:
        >>> choose_device("cpu")
        running on the CPU...
        'cpu'
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked is not None and asked not in there:
        raise InputError(f"-device {asked}: must be cuda, cpu or mps; choose a GPU by CUDA_VISIBLE_DEVICES=1")
    if asked is not None and not there[asked]:
        raise InputError(f"-device {asked}: there is no {asked.upper()} device on this machine; use -device cpu")
    chosen = asked or ("cuda" if there["cuda"] else "mps" if there["mps"] and works("mps") else "cpu")
    if chosen == "cpu":
        time_text = expected()
        print(("" if there["cuda"] or asked else "no CUDA device: ") + "running on the CPU"
              + (f" with {counted(cpu_threads(), 'thread')}; {time_text}" if time_text else ""))
    elif chosen == "mps" and asked is None:
        print("no CUDA device: running on Apple's GPU, which is not tested (-device cpu is)")
    return chosen


def works(device: str) -> bool:
    """Whether a device computes the layers of a network, forwards and backwards, as the CPU does."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    results = []
    layers = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(),
                           nn.ConvTranspose3d(4, 2, 2, 2))
    image = torch.rand(2, 1, 8, 8, 8)
    try:
        for where in ("cpu", device):
            layers.zero_grad()
            layers.to(where)
            output = layers(image.to(where))
            nn.functional.cross_entropy(output, torch.zeros(2, 16, 16, 16, dtype=torch.long, device=where)).backward()
            results.append([output.detach().cpu(), *(weight.grad.cpu() for weight in layers.parameters())])
    except (RuntimeError, NotImplementedError):
        return False
    return all(torch.allclose(one, other, rtol=1e-2, atol=1e-3) for one, other in zip(*results))


# ---- the CPU --------------------------------------------------------------------------------------------------------

def available_cores() -> int:
    """Return how many cores this process may use, which is fewer than there are within most cluster jobs.

    Examples:
        >>> available_cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_threads(training: bool = False) -> int:
    """Return the number of threads of the network: the user's OMP_NUM_THREADS, or that of the cores.

    Args:
        training: Whether one of several cores is left for the data.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, available_cores() - training)


def prepare_for_cpu(argv: list[str]) -> None:
    """Set what OpenMP and nnU-Net read when they are imported, if the network may run on the CPU.

    PyTorch's threads sleep while they wait for each other. By default they spin, which slows small networks down
    several times if other processes use the cores, too. nnU-Net's numbers of processes, made for large machines, are
    those of the cores. What the user has set stays.

    Args:
        argv: The arguments of the command.
    """
    cores = available_cores()
    os.environ.setdefault("nnUNet_def_n_proc", str(min(8, cores)))  # nnU-Net's default is 8
    if {"cpu", "-device=cpu"} & {*argv} or not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("nnUNet_n_proc_DA", str(min(MOST_AUGMENTING, cores)))
        for variable in ("nnUNet_npp", "nnUNet_nps"):  # processes around the network, in a prediction
            os.environ.setdefault(variable, str(min(3, max(1, cores // 2))))


def seconds_per_pass(network, shape: Sequence[int], training: bool) -> float:
    """Measure how long a network takes for a batch on the CPU: the fastest of some passes within a second, or of two.

    Args:
        network: A network of one input and one output.
        shape: Of its input, `(B, C, *spatial)`.
        training: Whether to compute backwards, too.
    """
    import torch

    passes: list[float] = []
    image, before = torch.rand(*shape), torch.get_num_threads()
    torch.set_num_threads(cpu_threads(training))
    try:
        with torch.set_grad_enabled(training):
            while sum(passes) < 1 or len(passes) < 2 and passes[0] < 10:  # the first one is slower
                start = time.perf_counter()
                output = network(image)
                if training:
                    output.mean().backward()
                passes.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return min(passes)
