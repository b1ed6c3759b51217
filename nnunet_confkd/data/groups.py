"""The files below a folder, in groups of the same place and naming: images of one channel, masks, scribbles."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from nnunet_confkd.data import dicom
from nnunet_confkd.data.images import ENDINGS, ending_of
from nnunet_confkd.data.listing import CASE, stem
from nnunet_confkd.data.measures import Measure
from nnunet_confkd.data.names import CHANNEL, without_affixes

USUAL = re.compile(r"(images?|labels?|masks?|segmentations?|scribbles?|strokes?|gt|full|partial|unlabell?ed)(Tr|Ts)?",
                   re.IGNORECASE)


@dataclass
class Group:
    """Files of the same place and naming.

    Attributes:
        root: The folder that all of them are in.
        pattern: The rest of their paths, with {case}; as a name in a flat folder, where the ending may differ.
        flat: Whether they lie in `root` itself.
        files: {path: what was measured}.
        alone: Whether the folder holds no other group.
    """
    root: Path
    pattern: str
    flat: bool
    files: dict[Path, Measure] = field(default_factory=dict)
    alone: bool = True

    @property
    def place(self) -> str:
        """What `confkd mix` takes for these files."""
        if self.flat and self.alone:
            return str(self.root)
        return f"{self.root}/{self.pattern}"


def units_below(folder: Path) -> list[Path]:
    """Return the images and labels in a folder and its folders: files, and folders of DICOM slices."""
    if folder.is_file():
        return [folder]
    if dicom.is_dicom_folder(folder):
        return [folder]
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            found += units_below(entry)
        elif ending_of(entry, (*ENDINGS, ".dcm")):
            found.append(entry)
    return found


def grouped_files(folder: Path, units: Iterable[Path]) -> list[Group]:
    """Group what :func:`units_below` has found.

    If names such as T1.nii.gz are repeated in many folders, the folders are the cases. Otherwise each folder is a
    place, and the prefixes and suffixes of annotation tools tell groups in it apart.
    """
    root = folder if folder.is_dir() else folder.parent
    groups: dict[tuple[Path, str], Group] = {}
    for deep, units_there in _by_depth(root, units).items():
        patterns = _patient_patterns(root, units_there) if deep else None
        for unit in units_there:
            where, pattern = (root, patterns[unit]) if patterns else (unit.parent, _flat_pattern(unit))
            group = groups.setdefault((where, pattern), Group(where, pattern, not patterns))
            group.files[unit] = Measure("")
    found = list(groups.values())
    for group in found:
        group.alone = sum(other.root == group.root for other in found) == 1
    return found


def _by_depth(root: Path, units: Iterable[Path]) -> dict[int, list[Path]]:
    found: dict[int, list[Path]] = defaultdict(list)
    for unit in units:
        found[len(unit.relative_to(root).parts) - 1].append(unit)
    return dict(found)


def _flat_pattern(unit: Path) -> str:
    name = stem(unit)
    match = CHANNEL.fullmatch(name)
    names = without_affixes(match[1] if match else name)
    # each word was taken off the beginning or the end, so the core need not be the first place where its letters occur
    start = sum(len(longer) - len(shorter) for longer, shorter in zip(names, names[1:]) if longer.endswith(shorter))
    end = start + len(names[-1])
    return name[:start] + CASE + (name[end:] if not match else name[end:-4] + "*") + unit.name[len(name):]


def _patient_patterns(root: Path, units: list[Path]) -> dict[Path, str] | None:
    """Return the pattern of each unit if the folders on one level below the root are the cases, otherwise None."""
    parts = [unit.relative_to(root).parts for unit in units]
    for level in range(len(parts[0]) - 1):
        names = {part[level] for part in parts}
        patterns = {unit: _with_case(unit.relative_to(root), level) for unit in units}
        kinds = set(patterns.values())
        if len(names) > 1 and len(kinds) <= len(names) and not any(USUAL.fullmatch(name) for name in names) and (
                len(kinds) < len(units)):
            return patterns
    return None


def _with_case(path: Path, level: int) -> str:
    parts = list(PurePosixPath(path.as_posix()).parts)
    case = parts[level]
    return "/".join(parts[:level] + [CASE] + [part.replace(case, CASE) for part in parts[level + 1:]])
