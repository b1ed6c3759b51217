"""The one way to write files and folders: completely, or not at all."""
from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from secrets import token_hex


@contextmanager
def written_whole(file: str | Path, sole_writer: bool = False) -> Iterator[Path]:
    """Write a file atomically: yield a path to write to, which replaces `file` after it has been completely written.

    The path lies in the same folder and has the same ending, because many writers choose the format by the ending.
    After an error nothing is left of it, and `file` is as it was.

    Args:
        file: The file to write.
        sole_writer: Whether no other process writes this file at the same time. What killed processes have left of it
            is then removed.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with written_whole(Path(folder, "a.txt")) as new:
        ...         _ = new.write_text("all of it")
        ...     Path(folder, "a.txt").read_text()
        'all of it'
    """
    file = Path(file)
    if sole_writer:
        for left in file.parent.glob(f".[0-9]*.{escape(file.name)}"):
            left.unlink(missing_ok=True)
    # The number of the process is not unique: those of several containers may share a folder.
    aside = file.with_name(f".{os.getpid()}.{token_hex(4)}.{file.name}")
    try:
        yield aside
        with open(aside, "r+b") as written:  # Windows flushes only what is open for writing
            os.fsync(written.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name must reach the disk, too; Windows cannot open folders
        folder = os.open(file.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(file: str | Path, text: str) -> None:
    """Write a text file (UTF-8, unchanged line ends) atomically."""
    with written_whole(file) as aside:
        aside.write_text(text, encoding="utf-8", newline="")


def write_json(file: str | Path, content, indent: int | None = 2) -> None:
    """Write a JSON file atomically.

    Args:
        indent: Spaces per level; None writes all in one line.

    Raises:
        ValueError: A number is NaN or infinite, which JSON does not have.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_json(Path(folder, "a.json"), {"seed": 1}, indent=None)
        ...     Path(folder, "a.json").read_text().strip()
        '{"seed": 1}'
    """
    write_text(file, json.dumps(content, indent=indent, allow_nan=False) + "\n")


@contextmanager
def new_folder(target: str | Path, replace: bool = False) -> Iterator[Path]:
    """Write a folder atomically: yield a new, hidden folder beside `target`, which becomes `target` at the end.

    After an error nothing is left of it, and `target` is as it was.

    Args:
        target: The folder to make. Its parent is made if it is missing.
        replace: Whether `target` may exist. It is then removed after the new folder has been completely written.

    Raises:
        FileExistsError: `target` exists and must not be replaced.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with new_folder(Path(folder, "result")) as new:
        ...         _ = (new / "a.txt").write_text("all of it")
        ...     [file.name for file in Path(folder).iterdir()]
        ['result']
    """
    target = Path(target).resolve()  # "." has no name, and what a link leads to is meant
    aside, old = (target.with_name(f".{target.name}.{what}{os.getpid()}") for what in ("part", "old"))
    if target.exists() and not replace:
        raise FileExistsError(f"{target}: exists already")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process that had the same number
    aside.mkdir()
    try:
        yield aside
        if replace and target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
