"""What several converters share."""
from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nnunet_confkd.data.patients import choose_patients
from nnunet_confkd.errors import InputError

NIFTI = r"[^.].*\.nii(\.gz)?"


def require_folder(folder: Path) -> Path:
    """Return the folder. Raises InputError if it does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    return folder


def find_files(folder: Path, pattern: str, levels: Iterable[int] = (1,)) -> list[Path]:
    """Find files by a regular expression that matches the whole name.

    Args:
        folder: Where to look. It may be missing: then nothing is found.
        pattern: For example `NIFTI`. macOS leaves files whose names begin with a dot in published archives.
        levels: How deep the files may lie: 1 for files in `folder` itself, 2 for those in its folders, and so on.

    Returns:
        The files in the order of their paths.
    """
    # not "**", which passes over folders that are links, without a word
    found = (file for level in levels for file in folder.glob("/".join("*" * level)))
    return sorted(file for file in found if re.fullmatch(pattern, file.name) and not file.is_dir())


def choose_roles(patients: Iterable[str], seed: int, full: list[str] | None, problems: list[str]) -> dict[str, str]:
    """Choose who validates and who stays fully annotated, as :func:`choose_patients` does; nobody if `full` is None.

    Raises:
        InputError: The patients that are asked for are not there. The text also has the problems that were found
            before, because these may be the cause.
    """
    try:
        return choose_patients(patients, seed, full) if full is not None else {}
    except InputError as error:
        raise InputError("\n  ".join([*problems, str(error)])) from error
