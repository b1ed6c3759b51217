"""nnU-Net's folders: where they are, and how a data set is found in them or written, completely or not at all."""
from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nnunet_confkd.data.json_files import read_json
from nnunet_confkd.errors import InputError, some
from nnunet_confkd.files import write_json
from nnunet_confkd.processes import terminable

WRITTEN_BY = "written_by"  # the key in dataset.json by which confkd mix knows its own data sets
WRITTEN_FILES = ".confkd_files.json"  # {file: [bytes, time of its content in ns]} of a data set as it was written


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
    _finish_all_replacing()
    if text.isdigit():
        found = sorted(f.name for f in raw.glob(f"Dataset{int(text):03d}_*") if f.is_dir())
    else:
        found = [text] if (raw / text).is_dir() else []
    if len(found) != 1:
        raise InputError(f"{raw}: has " + (f"several data sets of the id {text}: {', '.join(found)}" if found else
                                           f"no data set {text}; set nnUNet_raw to the folder that holds it"))
    return found[0]


def require_free_id(dataset_id: int, but: tuple[Path, ...] = ()) -> None:
    """Raise InputError if any of nnU-Net's folders has a data set of this id: nnU-Net would not know which to take.

    Args:
        dataset_id: The id.
        but: Folders that do not count.
    """
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folder = Path(os.environ.get(variable) or os.devnull)
        found = sorted(folder.glob(f"Dataset{dataset_id:03d}_*")) if folder.is_dir() else []
        taken = [path for path in found if path not in but]
        other = next((path.name for path in taken if but and path.name != but[0].name), None)
        if other:
            raise InputError(f"the id {dataset_id} belongs to {other}: to replace this data set, give "
                             f"--name {other[11:]}; else choose another --id")
        if taken and but:
            raise InputError(f"{taken[0]}: was made of the data set that --overwrite would replace; choose another "
                             f"--id, or remove that folder")
        if taken:
            raise InputError(f"the id {dataset_id} is taken by {taken[0]}; choose another --id, or remove that folder")


@contextmanager
def new_dataset(dataset_id: int, name: str, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """Write a new data set completely or not at all.

    Yield two hidden folders, which become the raw and the preprocessed folder of the data set at the end. They are
    removed after an error. An empty preprocessed folder is not kept.

    Args:
        dataset_id: The 27 in Dataset027_ACDC.
        name: The ACDC in it.
        overwrite: Whether to replace a data set of this id and name that `confkd mix` wrote. If this process is killed
            while it replaces one, the next command that looks for the data set finishes or undoes it.

    Raises:
        InputError: The id is taken, another process is writing a data set of this id, a folder cannot be written to, or
            the disk is full.
    """
    raw, preprocessed = (folder / folder_name(dataset_id, name) for folder in (raw_folder(), preprocessed_folder()))
    try:
        with terminable(), _claim(_lock_file(raw)):
            _finish_replacing(raw, preprocessed)
            for left in (_old(folder) for folder in (raw, preprocessed)):
                if os.path.lexists(left):
                    raise InputError(f"{left}: is left of a data set that was replaced, and cannot be removed; remove "
                                     f"it yourself")
            replaced = overwrite and raw.exists()
            if replaced:
                _require_replaceable(raw, preprocessed)
            _require_free(raw, preprocessed, replaced)
            for folder in (raw.parent, preprocessed.parent):  # what a killed process has left could fill the disk
                for left in folder.glob(f".Dataset{dataset_id:03d}_*.part*"):
                    shutil.rmtree(left, ignore_errors=True)
            with _two_new_folders(raw, preprocessed) as parts:
                yield parts[0], parts[1]
                if _is_ours(parts[0]):
                    write_json(parts[0] / WRITTEN_FILES, _written_files(parts[0]), indent=None)
                _require_free(raw, preprocessed, replaced)
                try:
                    _exchange(raw, preprocessed, parts)
                finally:
                    _finish_replacing(raw, preprocessed)
    except OSError as error:
        raise InputError(f"{raw}: cannot be written, nothing was kept; check the permissions and the space of "
                         f"{raw.parent} and {preprocessed.parent} ({error})") from error


def _lock_file(raw: Path) -> Path:
    return raw.with_name(f".{raw.name[:10]}.lock")


def _require_free(raw: Path, preprocessed: Path, replaced: bool) -> None:
    """Raise InputError if the id is taken, but for the folders that are to be replaced."""
    require_free_id(int(raw.name[7:10]), (raw, preprocessed) if replaced else ())


def _written_files(folder: Path) -> dict[str, list[int]]:
    """Return {file: [bytes, time of its content in ns]} of all files but hidden ones."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")
             and path.name.lower() not in ("thumbs.db", "desktop.ini")]
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _is_ours(raw: Path) -> bool:
    """Whether dataset.json says that `confkd mix` wrote it."""
    try:
        return WRITTEN_BY in json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _require_replaceable(raw: Path, preprocessed: Path) -> None:
    """Raise InputError if `confkd mix` did not write a data set, or something in it was added or changed since."""
    link = next((folder for folder in (raw, preprocessed) if folder.is_symlink()), None)
    if link is not None:
        raise InputError(f"{link}: is a link, which --overwrite does not replace; remove it yourself, or choose "
                         f"another --id")
    if not _is_ours(raw) or not (raw / WRITTEN_FILES).is_file():
        raise InputError(f"{raw}: was not written by confkd mix, or by an early version of it, so --overwrite "
                         f"does not replace it; choose another --id, or remove it yourself")
    written = read_json(raw / WRITTEN_FILES)
    changed = [name for name, of_file in _written_files(raw).items() if written.get(name) != of_file]
    if changed:
        raise InputError(f"{raw}: these files were added or changed after the data set was written: {some(changed)}; "
                         f"copy what you need, and remove the folder yourself")


@contextmanager
def _two_new_folders(*targets: Path) -> Iterator[tuple[Path, ...]]:
    """Make a hidden folder beside each target, and remove what is left of them at the end."""
    parts = tuple(target.with_name(f".{target.name}.part{os.getpid()}") for target in targets)
    try:
        for part in parts:
            part.mkdir(parents=True)
        yield parts
    finally:
        for part in parts:
            shutil.rmtree(part, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _exchange(raw: Path, preprocessed: Path, parts: tuple[Path, ...]) -> None:
    """Put new folders in the place of old ones, if there are any. The third step decides which of them counts."""
    if preprocessed.exists():
        preprocessed.rename(_old(preprocessed))
    if raw.exists():
        raw.rename(_old(raw))
    else:
        _old(raw).mkdir()
    parts[0].rename(raw)
    if any(parts[1].iterdir()):
        parts[1].rename(preprocessed)


def _finish_replacing(raw: Path, preprocessed: Path) -> None:
    """Finish or undo what :func:`_exchange` has begun, wherever it was interrupted."""
    if raw.exists() and _old(raw).exists():  # the new one is in its place
        for part in preprocessed.parent.glob(f".{preprocessed.name}.part*"):
            if not preprocessed.exists() and any(part.iterdir()):
                part.rename(preprocessed)
        shutil.rmtree(_old(preprocessed), ignore_errors=True)
        shutil.rmtree(_old(raw), ignore_errors=True)
        return
    if _old(raw).exists():
        if any(_old(raw).iterdir()):
            _old(raw).rename(raw)
        else:
            _old(raw).rmdir()
    if _old(preprocessed).exists() and not preprocessed.exists():
        _old(preprocessed).rename(preprocessed)


def _finish_all_replacing() -> None:
    """Finish or undo the replacing of data sets by processes that were killed."""
    if not os.environ.get("nnUNet_preprocessed"):
        return
    folders = (raw_folder(), preprocessed_folder())
    names = {left.name[1:-4] for folder in folders for left in folder.glob(".Dataset[0-9][0-9][0-9]_*.old")}
    for name in names:
        with suppress(InputError, OSError), _claim(_lock_file(folders[0] / name)):  # held: it is going on
            _finish_replacing(*(folder / name for folder in folders))


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
