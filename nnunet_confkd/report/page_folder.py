"""A folder with a page and its pictures, which replaces an earlier one and nothing else."""
from __future__ import annotations

import json
import re
from pathlib import Path

from nnunet_confkd.errors import InputError, some

FILES_LINE = re.compile(r"<!-- confkd [a-z]+, files: (\[.*?\]) -->")


def require_replaceable(output: Path, page: str, what: str, option: str) -> None:
    """Require that a folder can be written.

    Args:
        output: The folder.
        page: The name of the page in it.
        what: What it is a page of, such as "report".
        option: What to do otherwise.

    Raises:
        InputError: It is a file, or it holds files that are not of an earlier page.
    """
    if not output.is_dir():
        if output.exists():
            raise InputError(f"{output}: cannot be written (it is a file). {option}.")
        return
    own = _own_files(output, page)
    foreign = sorted(entry.name for entry in output.iterdir() if entry.name not in own)
    if foreign:
        raise InputError(f"{output}: holds files that are not of a {what} ({some(foreign, 5)}). {option}; "
                         "nothing was written.")


def _own_files(folder: Path, page: str) -> set[str]:
    """Return the files of an earlier page, which it lists."""
    try:
        found = FILES_LINE.search((folder / page).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return set()
    return {page, *json.loads(found.group(1))} if found else set()


def write_page(folder: Path, page: str, what: str, html: str) -> None:
    """Write a page into a folder that holds its pictures. The next page may replace these files, and no others."""
    files = sorted(file.name for file in folder.iterdir())
    (folder / page).write_text(f"{html}<!-- confkd {what}, files: {json.dumps(files)} -->\n",
                               encoding="utf-8")


def picture_name(number: int, case: str) -> str:
    """Return a unique name for a PNG file that is safe on every system, whatever the case is called."""
    return f"case_{number:02d}_{re.sub(r'[^A-Za-z0-9._-]+', '_', case)[:60].strip('._')}.png"
