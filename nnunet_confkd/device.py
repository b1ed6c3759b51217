"""The device that every command computes on."""
from __future__ import annotations

from nnunet_confkd.errors import InputError


def choose_device(asked: str | None = None) -> str:
    """Check the device that was asked for, or choose one and print a line if it is the CPU.

    "mps" is never chosen, because nothing has been tested on it.

    Args:
        asked: "cuda", "cpu" or "mps". None: "cuda" if there is a CUDA device, else "cpu".

    Returns:
        The device.

    Raises:
        InputError: There is no such device on this machine.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked is None:
        if not there["cuda"]:
            apple = " (-device mps uses Apple's GPU, but is untested)" if there["mps"] else ""
            print(f"no CUDA device: running on the CPU{apple}")
        return "cuda" if there["cuda"] else "cpu"
    if asked not in there:
        raise InputError(f"-device {asked}: must be cuda, cpu or mps; choose a GPU by CUDA_VISIBLE_DEVICES=1")
    if not there[asked]:
        raise InputError(f"-device {asked}: there is no {asked.upper()} device on this machine; use -device cpu")
    return asked
