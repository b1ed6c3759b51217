"""Whether a folder is a trained model. This needs no PyTorch, so that a mistyped path is told at once."""
from __future__ import annotations

import os
from pathlib import Path

from nnunet_confkd.errors import InputError, some

CONTENT = ("plans.json", "dataset.json")  # of a model's folder, beside its folds


def require_model(model: str | Path) -> None:
    """Check that a folder is that of a model.

    Args:
        model: The folder TRAINER__PLANS__CONFIGURATION.

    Raises:
        InputError: There is no such folder, or it is no model's. The text names the models that it holds. For 27 or
            Dataset027_NAME it names those of this data set in nnUNet_results.
    """
    model = Path(model)
    missing = [name for name in CONTENT if not (model / name).is_file()]
    if not missing:
        return
    problem = f"is no trained model: {' and '.join(missing)} missing" if model.is_dir() else "there is no such folder"
    folder = model if model.is_dir() else _of_dataset(model.name)
    models = [] if folder is None else sorted(folder.glob("*__*__*"))
    held = [path.name for path in models if (path / CONTENT[0]).is_file()]
    advice = "" if not held else f"; {'it' if folder == model else folder} holds: {some(held)}"
    raise InputError(f"{model}: {problem}. Give the folder TRAINER__PLANS__CONFIGURATION under nnUNet_results{advice}")


def _of_dataset(name: str) -> Path | None:
    """Return the folder of a data set, given by its name or id, in nnUNet_results; None if there is none."""
    results = Path(os.environ.get("nnUNet_results") or os.devnull)
    pattern = f"Dataset{int(name):03d}_*" if name.isdigit() else name
    return next((path for path in results.iterdir() if path.match(pattern)), None) if results.is_dir() else None
