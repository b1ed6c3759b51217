"""Which label file belongs to which image: by name, with the prefixes and suffixes that annotation tools add."""
from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_confkd.errors import some

CHANNEL = re.compile(r"(.+)_(\d{4})")
_LABEL = ("segmentations?|segs?|labelmaps?|labels?|masks?|ground_?truth|gt|manual|scribbles?|strokes?|points|"
          "annotations?|annot|rois?")
_IMAGE = "images?|img|volumes?|vol|scan|orig"


@dataclass(frozen=True)
class Named:
    """A file, or a folder of files that make up one image or label, and its name.

    Attributes:
        path: The file or folder.
        name: Its name without the ending, or what {case} stands for in the pattern that found it.
        exact: Whether a pattern found it. Nothing is then taken off the name.
        channel: The number of the pattern that found it, which is the number of the channel.
    """
    path: Path
    name: str
    exact: bool = False
    channel: int = 0


def without_affixes(name: str, words: str = _LABEL) -> list[str]:
    """Return the name, and what is left of it after each word that annotation tools add has been taken off."""
    names = [name]
    while True:
        shorter = re.sub(rf"[_\-. ](?:{words})$|^(?:{words})(?:[_\-. ]|(?=\d))", "", names[-1], count=1,
                         flags=re.IGNORECASE)
        if shorter in ("", names[-1]):
            return names
        names.append(shorter)


def looks_like_label(name: str) -> bool:
    """Whether the name has a prefix or a suffix that annotation tools add."""
    return len(without_affixes(name)) > 1


def cases_of(images: Iterable[Named], labels: Iterable[Named] = ()) -> dict[str, list[Path]]:
    """Return {case: its images} by nnU-Net's channel numbers. Without such numbers, each image is a case.

    All names must have the numbers, and each case must have 0000, 0001, ... Otherwise, the number belongs to the name
    of the case, unless a label is named without it.
    """
    images = list(images)
    cases: dict[str, list[Path]] = {}
    if any(image.exact for image in images):
        for image in sorted(images, key=lambda image: (image.name, image.channel)):
            cases.setdefault(image.name, []).append(image.path)
        return cases
    groups: dict[str, list[str]] = {}
    for image in images:
        match = CHANNEL.fullmatch(image.name)
        groups.setdefault(match[1] if match else "", []).append(match[2] if match else "")
    counted = "" not in groups and all(sorted(numbers) == [f"{i:04d}" for i in range(len(numbers))]
                                       for numbers in groups.values())
    one_channel = all(len(numbers) == 1 for numbers in groups.values())
    labelled = {name for label in labels for name in without_affixes(label.name)}
    channels = counted and (one_channel or not any(image.name in labelled for image in images))
    for image in images:
        match = CHANNEL.fullmatch(image.name)
        numbered = match and (channels or image.name not in labelled and match[1] in labelled)
        cases.setdefault(match[1] if numbered else image.name, []).append(image.path)
    return cases


def channel_problems(cases: Mapping[str, list[Path]], images: Iterable[Named],
                     patterns: Sequence[str | Path] = ()) -> list[str]:
    """Find cases that lack a channel, or have one twice: their other channels would get the wrong numbers.

    Args:
        cases: Those of :func:`cases_of`.
        images: The images.
        patterns: Those that found them, one for each channel, if any did.

    Returns:
        A text for each such case.
    """
    found, problems = {image.path: image for image in images}, []
    last = max((image.channel for image in found.values()), default=0)
    for case, files in cases.items():
        if all(found[file].exact for file in files):
            channels: list[int | None] = [found[file].channel for file in files]
            names = [str(pattern).replace("{case}", case) for pattern in patterns] or [case]
            wanted, remedy = range(last + 1), "give one pattern for each channel, which fits one file of each case"
        else:
            numbers = [CHANNEL.fullmatch(found[file].name) for file in files]
            channels = [int(match[2]) if match and match[1] == case else None for match in numbers]
            if channels == [None]:
                continue
            names = [f"{case}_{i:04d}" for i in range(len(files))]
            wanted, remedy = range(len(files)), "number the channels of a case from 0000 on, and rename the others"
        missing = [names[i] for i in wanted if i not in channels]
        if len(channels) > len(set(channels)):
            problems.append(f"{files[0]}: the case '{case}' has several files of one channel, {some(files, 3)}; "
                            f"{remedy}")
        elif missing:
            problems.append(f"{files[0]}: the case '{case}' has no image {some(missing)}, so its channels would get "
                            f"other numbers; add it, or leave out the case")
    return problems


def matched(cases: Mapping[str, list[Path]], labels: Iterable[Named], where: str,
            option: str = "") -> tuple[dict[str, Named], list[str]]:
    """Find the case of each label. As little as possible is taken off the names.

    Args:
        cases: {case: its images}.
        labels: The labels.
        where: The folder of the images, for messages.
        option: What to type before a pattern of these labels alone. Empty: one pattern is for all labels.

    Returns:
        {case: its label}, and what is wrong: labels that fit no case, or several, and cases that several labels fit.
    """
    names: dict[str, dict[str, int]] = {}  # {what a label may be called: {case: how much was taken off its name}}
    for case in cases:
        shorter = without_affixes(case, _IMAGE)
        for taken_off, name in enumerate([*shorter, *(f"{name}_0000" for name in shorter)]):
            names.setdefault(name, {}).setdefault(case, taken_off)
    found: dict[str, list[Named]] = {}
    problems = []
    for label in labels:
        shorter = [label.name] if label.exact else without_affixes(label.name)
        fits: dict[str, int] = {}
        for taken_off, name in enumerate(shorter):
            for case, more in names.get(name, {}).items():
                fits[case] = min(taken_off + more, fits.get(case, 99))
        best = [case for case, taken_off in fits.items() if taken_off == min(fits.values())]
        if len(best) > 1:
            problems.append(f"{label.path}: belongs to {cases[best[0]][0]} or to {cases[best[1]][0]}; rename it as its "
                            f"image")
        elif best:
            found.setdefault(best[0], []).append(label)
        else:
            problems.append(f"{label.path}: has no image in {where}{_advice(label, cases, option)}")
    for case, several in found.items():
        if len(several) > 1:
            problems.append(f"{cases[case][0]}: two labels belong to it, {several[0].path} and {several[1].path}; "
                            f"rename or move one")
    return {case: several[0] for case, several in found.items()}, problems


def _advice(label: Named, cases: Mapping[str, list[Path]], option: str) -> str:
    """Return which pattern would give a label an image, if its name holds the name of a case."""
    held = max((case for case in cases if case in label.name), key=len, default="")
    if not held or label.exact:
        return ""
    pattern = label.path.name.replace(held, "{case}", 1)
    typed = f"{option}{label.path.parent}/{pattern}'" if option else f"--label-pattern '{pattern}'"
    return f"; a pattern tells what the name of the case is: {typed}"
