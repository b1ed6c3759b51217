"""nnU-Net's folders: where they are, how a data set is found in them, and how a new one gets there, completely or not at all."""
from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import terminable


def raw_folder() -> Path:
    return _nnunet_folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    return _nnunet_folder("nnUNet_preprocessed")


def _nnunet_folder(variable: str) -> Path:
    if not os.environ.get(variable):
        raise InputError(f"the environment variable {variable} is not set; nnU-Net's data sets lie in the folder that it "
                         f"names: export {variable}=/path/to/{variable}")
    return Path(os.environ[variable])


def folder_name(dataset_id: int, name: str) -> str:
    """nnU-Net's name of a data set. Raises InputError where it cannot be one."""
    if not 1 <= dataset_id <= 999:
        raise InputError(f"the id of a data set is a number from 1 to 999, not {dataset_id}")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise InputError(f"the name of a data set has letters, digits, _ and - only, not {name!r}")
    return f"Dataset{dataset_id:03d}_{name}"


def find_dataset(dataset: int | str) -> str:
    """The folder name of a data set in nnUNet_raw, given as 27, "27" or "Dataset027_ACDC". Raises InputError."""
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
    """Raise InputError where any of nnU-Net's folders holds a data set of this id: nnU-Net would not know which to take."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = Path(os.environ.get(variable) or os.devnull)
        taken = sorted(folder.glob(f"Dataset{dataset_id:03d}_*")) if folder.is_dir() else []
        if taken:
            raise InputError(f"the id {dataset_id} is taken by {taken[0]}; choose another --id, or remove that folder")


@contextmanager
def new_dataset(dataset_id: int, name: str) -> Iterator[tuple[Path, Path]]:
    """Two hidden folders to write to, which become the raw and the preprocessed folder of a new data set at the end, or
    vanish on an error. An empty preprocessed one is not kept.

    Raises InputError where the id is taken, another process is writing it, the folders cannot be written to, or an OSError
    ends it.
    """
    finished = [folder / folder_name(dataset_id, name) for folder in (raw_folder(), preprocessed_folder())]
    unfinished = [target.with_name(f".Dataset{dataset_id:03d}.unfinished") for target in finished]
    # of its own name: what a process that was killed still writes, it does not write here
    content = unfinished[0] / f"by-{os.getpid()}"
    try:
        with terminable():
            require_free_id(dataset_id)
            _claim(unfinished[0])
            try:
                content.mkdir()
                shutil.rmtree(unfinished[1], ignore_errors=True)  # of a run that was killed
                unfinished[1].mkdir(parents=True)
                yield content, unfinished[1]
                require_free_id(dataset_id)
                if any(unfinished[1].iterdir()):
                    unfinished[1].rename(finished[1])
                try:
                    content.rename(finished[0])
                except BaseException:
                    if not finished[0].exists():  # else it was interrupted just afterwards
                        shutil.rmtree(finished[1], ignore_errors=True)
                    raise
            finally:
                shutil.rmtree(unfinished[1], ignore_errors=True)
                shutil.rmtree(content, ignore_errors=True)
                if not content.exists():  # else the next run needs to know whose it was
                    shutil.rmtree(unfinished[0], ignore_errors=True)
    except OSError as error:
        raise InputError(f"{finished[0]}: cannot be written, nothing was kept; check the permissions and the space of "
                         f"{finished[0].parent} and {finished[1].parent} ({error})") from error


def _claim(folder: Path) -> None:
    """Make the folder, or take over one that a killed process of this machine left behind."""
    me = {"host": socket.gethostname(), "process": os.getpid()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        owner = _owner_of(folder)
        if owner["host"] != me["host"] or _is_running(owner["process"]):
            raise _claimed(folder, owner) from None
        try:  # of several that find it, one makes this folder, and knows then that nobody was faster
            (folder / f"left-by-{owner['process']}").mkdir()
        except FileExistsError:
            raise _claimed(folder, owner) from None
        if _owner_of(folder) != owner:
            raise _claimed(folder, _owner_of(folder)) from None
        for left in folder.glob("by-*"):
            shutil.rmtree(left, ignore_errors=True)
    try:
        (folder / "owner.json").write_text(json.dumps(me))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _owner_of(folder: Path) -> dict:
    try:
        owner = json.loads((folder / "owner.json").read_text())
        return {"host": owner["host"], "process": int(owner["process"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"host": "an unknown machine", "process": "unknown"}


def _claimed(folder: Path, owner: dict) -> InputError:
    return InputError(f"{folder}: another process (number {owner['process']} on {owner['host']}) is writing a data set of "
                      f"this id. Wait for it; if there is none any more, remove the folder")


def _is_running(process: int) -> bool:
    if os.name == "nt":  # there os.kill ends it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
