"""The labels of sources that annotate different classes, each with values of its own, and their union."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from nnunet_confkd.data.annotated_classes import CLASSES_KEY
from nnunet_confkd.data.json_files import is_whole
from nnunet_confkd.data.meanings import Labels, Meaning, described
from nnunet_confkd.data.sources import NamedFolder
from nnunet_confkd.errors import InputError, shown, some

BACKGROUND, IGNORE = "background", "ignore"  # in --classes, these are no classes
Meant = dict[str, list]  # {class, "background" or "ignore": values, and names of segments}


def labels_of_sources(folders: Sequence[NamedFolder]) -> list[Labels]:
    """Return how each source writes the labels of the data set, which are the union of all their classes.

    The classes get the values 1, 2, ... in the order in which they are named.

    Args:
        folders: The sources.

    Raises:
        InputError: The classes of some sources are missing, or contradict each other. The text has all of it.
    """
    problems: list[str] = []
    meant: list[Meant] = []
    for folder in folders:
        try:
            meant.append(_described_by(folder) if folder.classes is None else _given_by(folder.name, folder.classes))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    classes = dict.fromkeys(name for of_source in meant for name in of_source if name not in (BACKGROUND, IGNORE))
    numbers = {name: number for number, name in enumerate([BACKGROUND, *classes])}
    return [_labels(folder.name, of_source, numbers) for folder, of_source in zip(folders, meant)]


def _labels(source: str, meant: Meant, numbers: Mapping[str, int]) -> Labels:
    written = {name: numbers[name] for name in meant if name != IGNORE}
    values = {value: number for name, number in written.items() for value in meant[name] if is_whole(value)}
    named = {name: [value for value in meant[name] if isinstance(value, str)] for name in written}
    segments = {segment.casefold(): number for name, number in written.items() for segment in named[name] or [name]}
    listed = tuple(name for name in written if name != BACKGROUND)
    return Labels(
        numbers, Meaning(values, segments, 0), next((value for value in meant[BACKGROUND] if is_whole(value)), 0),
        next(iter(meant.get(IGNORE, ())), None), source=source, partly=IGNORE in meant,
        by_name=next((f"{name}={value[0]}" for name, value in named.items() if value), ""),
        listed=None if len(listed) == len(numbers) - 1 else listed)


def _given_by(source: str, texts: Sequence[str]) -> Meant:
    """Return what --classes says, such as "liver=1", "liver=1,2", "liver=Liver 1", "liver" or "ignore=255".

    Classes without a value have 1, 2, ... in their order, and the background has 0 unless that means "not annotated".
    """
    meant: Meant = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or name in meant or equals and not value:
            raise InputError(f"--classes of {source}: {text!r}; give names, each once, or NAME=VALUE, "
                             f"NAME=VALUE,VALUE or NAME=SEGMENT")
        numbers = list(map(int, value.split(","))) if re.fullmatch(r"-?\d+(,-?\d+)*", value) else []
        number = 1 + sum(other not in (BACKGROUND, IGNORE) for other in meant)
        meant[name] = numbers or ([value] if value else [] if name in (BACKGROUND, IGNORE) else [number])
    ignored = meant.get(IGNORE, [])
    if any(isinstance(value, str) for value in ignored) or len(ignored) > 1:
        raise InputError(f"--classes of {source}: ignore takes one whole number, got {some(ignored)}; what lies in no "
                         f"segment is not annotated if ignore stands alone")
    if not meant.get(BACKGROUND):
        meant[BACKGROUND] = [] if 0 in ignored else [0]
    return _without_contradictions(f"--classes of {source}", meant)


def _described_by(folder: NamedFolder) -> Meant:
    """Return what the labels in a source's dataset.json say."""
    content, file = described(folder.folder), folder.folder / "dataset.json"
    advice = f"; name the classes: --source {folder.name}={folder.folder} --classes NAME=VALUE ..."
    labels = content.get("labels")
    if not labels:
        raise InputError(f"{file}: has no labels{advice}")
    if all(key.isdigit() and isinstance(name, str) for key, name in labels.items()):  # MSD: value to name
        labels = {name: int(value) for value, name in labels.items()}
    if content.get(CLASSES_KEY):
        raise InputError(f"{file}: has \"{CLASSES_KEY}\", but all cases of a source are annotated for the same "
                         f"classes; make a source of each list of classes")
    if not all(map(is_whole, labels.values())):
        raise InputError(f"{file}: \"labels\" must be whole numbers here, and no regions; got {shown(labels)}{advice}")
    if labels.get(BACKGROUND, 0) != 0:
        raise InputError(f"{file}: \"background\" must be 0; got {shown(labels)}{advice}")
    return _without_contradictions(str(file), {BACKGROUND: [0], **{name: [value] for name, value in labels.items()}})


def _without_contradictions(where: str, meant: Meant) -> Meant:
    """Return what is meant; raise InputError if no class is named, or a value has two meanings."""
    if not set(meant) - {BACKGROUND, IGNORE}:
        raise InputError(f"{where}: names no class; at least one besides the background is needed")
    first: dict = {}
    for name, values in meant.items():
        for value in values:
            key = value.casefold() if isinstance(value, str) else value
            if first.setdefault(key, name) != name:
                raise InputError(f"{where}: {value} means {first[key]} and {name}; give each value one meaning")
    return meant
