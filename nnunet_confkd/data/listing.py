"""Find the images and labels in folders, by patterns, or among single files."""
from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from nnunet_confkd.data.dicom import is_dicom_file, is_dicom_folder
from nnunet_confkd.data.images import ENDINGS, ending_of
from nnunet_confkd.data.names import Named
from nnunet_confkd.errors import InputError, some

CASE = "{case}"


def listed(places: Iterable[str | Path], patterns: Iterable[str] | None = None, labels: bool = False) -> list[Named]:
    """Find images or labels.

    Args:
        places: Folders, files, patterns of a shell (`masks/*_seg.nii.gz`), or patterns with {case} in them. If two of
            these find a case, each is one channel.
        patterns: Patterns with {case} in them, for the folders among `places`: one for each channel.
        labels: Whether to find labels. They may be folders with one file for each class, too.

    Raises:
        InputError: There is no such folder or file, or a pattern is wrong.
    """
    found: dict[Path, Named] = {}
    texts = [str(place) for place in places]
    templates = _by_templates([place for place in texts if CASE in place])
    for place in texts:
        if CASE in place:
            several = templates[place]
        elif Path(place).is_dir() and patterns:
            several = [named for number, pattern in enumerate(patterns)
                       for named in _by_template(f"{glob.escape(place)}/{pattern}", number)]
        elif Path(place).is_dir():
            several = _in_folder(Path(place), labels)
        elif Path(place).is_file():
            several = [Named(Path(place), stem(Path(place)))]
        else:
            several = [Named(Path(path), stem(Path(path))) for path in sorted(glob.glob(place))]
            if not several:
                raise InputError(f"{place}: there is no such folder or file")
        found.update((named.path, named) for named in several)
    return list(found.values())


def stem(path: Path) -> str:
    """Return the name of a file without its ending, or that of a folder, with composed accents."""
    ending = None if path.is_dir() else ending_of(path, (*ENDINGS, ".dcm"))
    return composed(path.name[:len(path.name) - len(ending or "")])


def composed(name: str) -> str:
    """Return a name with composed accents: macOS writes an umlaut as two characters, which look like one."""
    return unicodedata.normalize("NFC", name)


def holds_masks(folder: Path) -> bool:
    """Whether a folder holds files that could be one mask for each class."""
    return any(_is_image(file) for file in folder.iterdir())


def _is_image(file: Path) -> bool:
    return bool(ending_of(file)) and not file.name.startswith(".") and not file.is_dir()


def _in_folder(folder: Path, labels: bool) -> list[Named]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if _is_image(entry)]
    dicom = [entry for entry in entries if not entry.is_dir() and not _is_image(entry) and is_dicom_file(entry)]
    if dicom and not labels:
        if files:
            raise InputError(f"{folder}: holds images and DICOM files ({some([entry.name for entry in dicom])}); move "
                             f"each DICOM series into a folder of its own")
        return [Named(folder, folder.name)]  # one series
    inside = [entry for entry in entries if entry.is_dir()]
    series = {entry for entry in inside if is_dicom_folder(entry)}
    masks = [entry for entry in inside if labels and entry not in series and holds_masks(entry)]
    if files and masks:
        raise InputError(f"{folder}: holds label files, and folders of label files "
                         f"({some([entry.name for entry in masks])}). If these are no labels, give "
                         f"'{folder.as_posix()}/*{ending_of(files[0])}'; else move either kind into a folder of its "
                         f"own")
    return [Named(entry, stem(entry)) for entry in [*files, *dicom, *sorted([*series, *masks])]]


def _by_templates(templates: list[str]) -> dict[str, list[Named]]:
    """Return what each pattern finds. If two of them find a case, their order numbers the channels."""
    found = {template: _by_template(template) for template in templates}
    names = [name for several in found.values() for name in {named.name for named in several}]
    if len(names) > len(set(names)):
        for channel, (template, several) in enumerate(found.items()):
            found[template] = [replace(named, channel=channel) for named in several]
    return found


def _by_template(template: str, channel: int = 0) -> list[Named]:
    """Find what fits a path that holds {case}, which stands for a part of a name, the same one everywhere."""
    template = template.replace(os.sep, "/")
    if CASE not in template:
        raise InputError(f"{template!r}: a pattern needs {CASE} in the place of the name of the case, as in "
                         f"'{CASE}/T1.nii.gz'")
    root = re.match(r"([^{*?]*/)?", template)[0]
    rest = template[len(root):]
    parts = re.split(r"(\{case\}|\*|\?)", rest)
    expression, seen = "", False
    for part in parts:
        if part == CASE:
            expression += "(?P=case)" if seen else r"(?P<case>[^/]+)"
            seen = True
        else:
            expression += {"*": "[^/]*", "?": "[^/]"}.get(part) or re.escape(part)
    shell = "".join("*" if part == CASE else part if part in ("*", "?") else glob.escape(part) for part in parts)
    base = Path(re.sub(r"\[([*?\[])\]", r"\1", root) or ".")
    if not base.is_dir():
        raise InputError(f"{base}: there is no such folder")
    found = []
    for path in sorted(base.glob(re.sub(r"/+", "/", shell))):
        match = re.fullmatch(expression, path.relative_to(base).as_posix())
        if match and not match["case"].startswith("."):  # what macOS writes beside files begins with "._"
            found.append(Named(path, composed(match["case"]), exact=True, channel=channel))
    if not found:
        raise InputError(f"{base}: nothing in it fits the pattern {rest!r}")
    return found
