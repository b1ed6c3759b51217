"""Reading checkpoints and model folders, with errors that name the file."""
from __future__ import annotations

import pickle
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.serialization import safe_globals

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.network import add_teacher, has_teacher

# What nnU-Net's checkpoints hold beside tensors, numbers and text: single NumPy numbers, in the curves. NumPy 1 and 2 name their
# maker differently, in files of either.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list = [(_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
          *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool"))]


def load_checkpoint(path: str | Path) -> dict:
    """An nnU-Net checkpoint, on the CPU. Nothing in the file is executed, whoever made it; a file that passes may then be opened by
    nnU-Net, which would execute what is in it.

    Raises InputError where the file is missing, broken, something else, or holds more than weights, numbers and text.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such checkpoint")
    try:
        with safe_globals(_NUMPY):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken bytes lead to
        found = re.search(r"unsupported (global|class).*|blocked", str(error), re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and found:
            raise InputError(f"{path}: is not opened, because it is no checkpoint as nnU-Net writes them: it holds more than weights, "
                             f"numbers and text, which could run a program ({found.group()})") from error
        raise InputError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise InputError(f"{path}: is no nnU-Net checkpoint (it has no 'network_weights')")
    return checkpoint


@contextmanager
def pretrained_for_both_branches(path: str | Path):
    """Yields a checkpoint that -pretrained_weights takes for ConfKDTrainer.

    A ConfKD checkpoint is yielded as it is; of a stock one an adapted copy, in a temporary folder, whose decoder stands
    for both branches. (nnU-Net itself leaves out the segmentation layers.)
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint["network_weights"]
    if has_teacher(weights):
        yield str(path)
        return
    if not any(name.startswith("decoder.") for name in weights):
        raise InputError(f"{path}: holds no 'decoder.*' weights, so it is of no U-Net that ConfKDTrainer could start from")
    with tempfile.TemporaryDirectory(prefix="confkd_") as folder:
        adapted = Path(folder) / Path(path).name
        torch.save({"network_weights": add_teacher(weights)}, adapted)
        print(f"{path} is a stock nnU-Net checkpoint: its decoder starts both branches.")
        yield str(adapted)


def fold_folders(model: str | Path) -> list[Path]:
    """The `fold_*` folders of a trained model that hold checkpoints.

    Raises InputError where the folder is missing or is no trained model.
    """
    model = Path(model)
    if not model.is_dir():
        raise InputError(f"{model}: there is no such folder")
    missing = [name for name in ("plans.json", "dataset.json") if not (model / name).is_file()]
    if missing:
        raise InputError(f"{model}: is no trained model: {' and '.join(missing)} missing. Give the folder "
                         f"TRAINER__PLANS__CONFIGURATION under nnUNet_results.")
    folds = [fold for fold in sorted(model.glob("fold_*")) if any(fold.glob("checkpoint_*.pth"))]
    if not folds:
        raise InputError(f"{model}: holds no fold_*/checkpoint_*.pth: train first")
    return folds
