"""Writing the results of a command into a folder that may hold other files."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from nnunet_confkd.errors import InputError
from nnunet_confkd.files import write_text, written_whole


def write_results(output: str | Path, made_by: str, files: Mapping[str, str | Callable[[Path], object]]) -> list[Path]:
    """Write files into a folder, each atomically. Earlier files of the same command are replaced, others never.

    Args:
        output: The folder. It is made if it is missing.
        made_by: The command. The first file is a JSON file that holds it under "made_by", which identifies its files.
        files: {name: text, or function that writes the file to a path}.

    Returns:
        The paths of the files.

    Raises:
        InputError: The folder holds a file of these names that the command has not made, or it cannot be written to.
    """
    output = Path(output)
    paths = [output / name for name in files]
    try:
        output.mkdir(parents=True, exist_ok=True)
        if any(path.exists() for path in paths) and not _is_made_by(paths[0], made_by):
            raise InputError(f"{output}: holds {' or '.join(files)} that {made_by} has not written; "
                             "give another --output")
        for path, content in zip(paths, files.values()):
            if isinstance(content, str):
                write_text(path, content)
            else:
                with written_whole(path) as aside:
                    content(aside)
    except OSError as error:
        raise InputError(f"{output}: cannot be written to ({error.strerror}); give another --output") from error
    return paths


def _is_made_by(file: Path, made_by: str) -> bool:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["made_by"] == made_by
    except (OSError, ValueError, KeyError, TypeError):
        return False
