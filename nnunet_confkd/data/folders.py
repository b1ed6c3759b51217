"""nnU-Net's folders: where they are, and how a data set is found in them or written, completely or not at all."""
from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_confkd.errors import InputError
from nnunet_confkd.files import new_folder
from nnunet_confkd.processes import terminable


def raw_folder() -> Path:
    """Return the folder that the variable nnUNet_raw names. Raises InputError if it is not set."""
    return _nnunet_folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    """Return the folder that the variable nnUNet_preprocessed names. Raises InputError if it is not set."""
    return _nnunet_folder("nnUNet_preprocessed")


def _nnunet_folder(variable: str) -> Path:
    if not os.environ.get(variable):
        raise InputError(f"the environment variable {variable} is not set. It names the folder of nnU-Net's data sets: "
                         f"export {variable}=/path/to/{variable}")
    return Path(os.environ[variable])


def folder_name(dataset_id: int, name: str) -> str:
    """Return nnU-Net's name of a data set, for example Dataset027_ACDC.

    Raises:
        InputError: The id or the name is not one that nnU-Net takes.
    """
    if not 1 <= dataset_id <= 999:
        raise InputError(f"the id of a data set is a number from 1 to 999, not {dataset_id}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(f"the name of a data set has letters, digits, _ and - only, not {name!r}")
    return f"Dataset{dataset_id:03d}_{name}"


def find_dataset(dataset: int | str) -> str:
    """Find a data set in nnUNet_raw.

    Args:
        dataset: For example 27, "27" or "Dataset027_ACDC".

    Returns:
        The name of its folder.

    Raises:
        InputError: There is no such data set, or there are several of this id.
    """
    raw, text = raw_folder(), str(dataset)
    if text.isdigit():
        found = sorted(f.name for f in raw.glob(f"Dataset{int(text):03d}_*") if f.is_dir())
    else:
        found = [text] if (raw / text).is_dir() else []
    if len(found) != 1:
        raise InputError(f"{raw}: has " + (f"several data sets of the id {text}: {', '.join(found)}" if found else
                                           f"no data set {text}; set nnUNet_raw to the folder that holds it"))
    return found[0]


def require_free_id(dataset_id: int) -> None:
    """Raise InputError if any of nnU-Net's folders has a data set of this id: nnU-Net would not know which to take."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = Path(os.environ.get(variable) or os.devnull)
        taken = sorted(folder.glob(f"Dataset{dataset_id:03d}_*")) if folder.is_dir() else []
        if taken:
            raise InputError(f"the id {dataset_id} is taken by {taken[0]}; choose another --id, or remove that folder")


@contextmanager
def new_dataset(dataset_id: int, name: str) -> Iterator[tuple[Path, Path]]:
    """Write a new data set completely or not at all.

    Yield two hidden folders, which become the raw and the preprocessed folder of the data set at the end. They are
    removed after an error. An empty preprocessed folder is not kept.

    Raises:
        InputError: The id is taken, another process is writing a data set of this id, a folder cannot be written to, or
            the disk is full.
    """
    raw, preprocessed = (folder / folder_name(dataset_id, name) for folder in (raw_folder(), preprocessed_folder()))
    try:
        with terminable(), _claim(raw.with_name(f".Dataset{dataset_id:03d}.lock")):
            require_free_id(dataset_id)
            for folder in (raw.parent, preprocessed.parent):  # what a killed process has left could fill the disk
                for left in folder.glob(f".Dataset{dataset_id:03d}_*.part*"):
                    shutil.rmtree(left, ignore_errors=True)
            written = False
            try:
                with new_folder(raw) as new_raw:
                    with new_folder(preprocessed) as new_preprocessed:
                        yield new_raw, new_preprocessed
                        require_free_id(dataset_id)
                    written = True
                    with suppress(OSError):  # it is not empty
                        preprocessed.rmdir()
            except BaseException:
                if written and not raw.exists():
                    shutil.rmtree(preprocessed, ignore_errors=True)
                raise
    except OSError as error:
        raise InputError(f"{raw}: cannot be written, nothing was kept; check the permissions and the space of "
                         f"{raw.parent} and {preprocessed.parent} ({error})") from error


@contextmanager
def _claim(lock_file: Path) -> Iterator[None]:
    """Hold the lock of a data set's id. The system releases it however this process ends."""
    from filelock import FileLock, Timeout  # commands that write no data set need not wait for this import

    lock_file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(lock_file, timeout=0).acquire()
    except Timeout as error:
        raise InputError(f"{lock_file}: another process is writing a data set of this id. Wait for it, or choose "
                         f"another --id") from error
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):  # Windows does not remove open files; there filelock does it
                lock_file.unlink()
