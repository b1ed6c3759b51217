"""Reading checkpoints and model folders, with errors that name the file."""
from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn import Module
from torch.serialization import safe_globals

from nnunet_confkd.errors import InputError
from nnunet_confkd.inference.model_folder import require_model
from nnunet_confkd.training.names import TEACHER_CHECKPOINT
from nnunet_confkd.training.network import (
    TEACHER_PREFIX,
    add_teacher,
    has_narrow_teacher,
    has_teacher,
    teacher_was_left,
)

# Besides tensors, numbers and text, nnU-Net's checkpoints hold single NumPy numbers, in the curves. NumPy 1 and NumPy 2
# use different names for the function that makes them.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list = [(_SCALAR, "numpy.core.multiarray.scalar"), (_SCALAR, "numpy._core.multiarray.scalar"), np.dtype,
          *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int32", "int64", "uint8", "bool"))]


def load_checkpoint(path: str | Path) -> dict:
    """Load an nnU-Net checkpoint to the CPU without executing anything that the file may hold.

    nnU-Net itself would execute it, so a checkpoint of unknown origin must pass this function before nnU-Net opens it.

    Args:
        path: The checkpoint.

    Returns:
        The checkpoint's dictionary.

    Raises:
        InputError: The file is missing or broken, is no checkpoint, or holds more than weights, numbers and text.

    Examples:
        >>> load_checkpoint("MODEL/fold_0/checkpoint_final.pth")["trainer_name"]  # doctest: +SKIP
        'ConfKDTrainer'
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
            raise InputError(f"{path}: is not opened, because it is no checkpoint as nnU-Net writes them: it holds "
                             f"more than weights, numbers and text, which could run a program ({found.group()}); use "
                             f"only checkpoints from a source that you trust") from error
        raise InputError(f"{path}: cannot be read as a checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise InputError(f"{path}: is no nnU-Net checkpoint (it has no 'network_weights')")
    return checkpoint


def has_own_teacher(branch: str, folds: Iterable[Path]) -> bool:
    """Whether a branch predicts with the checkpoint of a teacher that has completed labels, in all of these folds."""
    return branch == "teacher" and all((fold / TEACHER_CHECKPOINT).is_file() for fold in folds)


def require_teacher(path: str | Path, checkpoint: dict, option: str) -> None:
    """Raise InputError if a checkpoint has no teacher, or one that the encoder no longer fits.

    Args:
        path: The checkpoint, for the text.
        checkpoint: What it holds.
        option: The option that chooses a branch, for the text.
    """
    if not has_teacher(checkpoint["network_weights"]):
        what = "it is the network that labelled the unlabelled cases"
        reason = f": {what}" if Path(path).name == TEACHER_CHECKPOINT else ""
        raise InputError(f"{path}: holds no teacher{reason}, so {option} has nothing to choose from")
    if teacher_was_left(checkpoint["network_weights"]):
        raise InputError(f"{path}: its teacher has completed labels, and the encoder was trained without it after "
                         f"that, so {option} has no use. The teacher as it was is in {TEACHER_CHECKPOINT} beside it")


@contextmanager
def pretrained_for_both_branches(path: str | Path, build: Callable[[], Module]) -> Iterator[str]:
    """Yield a checkpoint from which `-pretrained_weights` can start ConfKDTrainer.

    A ConfKD checkpoint with the same teacher is yielded as it is. Else an adapted copy in a temporary folder is
    yielded. In it a teacher of the student's width starts from the stock decoder, and a narrow one as initialised.
    (nnU-Net itself leaves out the segmentation layers.)

    Args:
        path: The checkpoint.
        build: Builds the network that is to be trained.

    Raises:
        InputError: It is no checkpoint of a U-Net.
    """
    weights = load_checkpoint(path)["network_weights"]
    if teacher_was_left(weights):
        weights = {name: w for name, w in weights.items() if not name.startswith(TEACHER_PREFIX)}
    if not any(name.startswith("decoder.") for name in weights):
        raise InputError(f"{path}: has no 'decoder.*' weights, so it is no U-Net that ConfKDTrainer could start from")
    teacher = {name: w for name, w in build().state_dict().items() if name.startswith(TEACHER_PREFIX)}
    found = {name: w.shape for name, w in weights.items() if name.startswith(TEACHER_PREFIX)}
    if all(found.get(name) == w.shape for name, w in teacher.items() if ".seg_layers." not in name):
        yield str(path)
        return
    stock = {name: w for name, w in weights.items() if not name.startswith(TEACHER_PREFIX)}
    with tempfile.TemporaryDirectory(prefix="confkd_") as folder:
        adapted = Path(folder) / Path(path).name
        torch.save({"network_weights": add_teacher(stock, teacher)}, adapted)
        print(f"{path} has no teacher of this network: its decoder starts "
              + ("the student. The narrower teacher starts anew." if has_narrow_teacher(teacher) else "both branches."))
        yield str(adapted)


def fold_folders(model: str | Path) -> list[Path]:
    """List the folds of a trained model.

    Args:
        model: The folder TRAINER__PLANS__CONFIGURATION.

    Returns:
        Its `fold_*` folders that hold checkpoints, sorted.

    Raises:
        InputError: The folder is missing or is no trained model.

    Examples:
        >>> fold_folders("MODEL")  # doctest: +SKIP
        [PosixPath('MODEL/fold_0')]
    """
    model = Path(model)
    require_model(model)
    folds = [fold for fold in sorted(model.glob("fold_*")) if any(fold.glob("checkpoint_*.pth"))]
    if not folds:
        raise InputError(f"{model}: holds no fold_*/checkpoint_*.pth: train first")
    return folds
