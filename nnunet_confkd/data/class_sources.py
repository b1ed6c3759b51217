"""The labels of sources that annotate different classes, each with values of its own, and their union.

With regions there is no union: the regions are those in the dataset.json of one source, and the others are annotated
for some of them. A region is annotated in a case if the label tells for each voxel whether it belongs to the region. A
label is written with values that belong to the same annotated regions; whether they belong to others does not matter.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_confkd.data.annotated_classes import CLASSES_KEY, heads_of
from nnunet_confkd.data.json_files import NEEDED, is_whole, malformed, read_json
from nnunet_confkd.data.listing import stem
from nnunet_confkd.data.meanings import BACKGROUND, Labels, Meaning, described, require_separate
from nnunet_confkd.data.sources import NamedFolder, Source
from nnunet_confkd.data.supervision import FULL, TABLE_KEY
from nnunet_confkd.errors import InputError, shown, some

IGNORE = "ignore"  # in --classes, this and the background are no classes
Meant = dict[str, list]  # {class, "background" or "ignore": values, and names of segments}


@dataclass(frozen=True)
class _Regions:
    """The regions of a data set.

    Attributes:
        file: The dataset.json that describes them.
        labels: Those in this file, without "ignore".
        order: Its "regions_class_order".
    """
    file: Path
    labels: dict[str, int | list[int]]
    order: list[int]

    @property
    def values(self) -> dict[str, frozenset[int]]:
        """{region: its values}."""
        return {name: values for name, (_, values) in heads_of(self.labels).items()}


def labels_of_sources(folders: Sequence[NamedFolder]) -> list[Labels]:
    """Return how each source writes the labels of the data set, which are the union of all their classes.

    The classes get the values 1, 2, ... in the order in which they are named. Regions keep the values of the source
    that describes most of them.

    Args:
        folders: The sources.

    Raises:
        InputError: The classes of some sources are missing, or contradict each other. The text has all of it.
    """
    problems: list[str] = []
    read: list[tuple[NamedFolder, Meant]] = []
    spaces: list[_Regions] = []
    for folder in folders:
        try:
            meant, regions = _meant_by(folder)
            read.append((folder, meant))
            spaces += [regions] if regions else []
        except InputError as error:
            problems.append(str(error))
    names = dict.fromkeys(name for _, meant in read for name in meant if name not in (BACKGROUND, IGNORE))
    numbers = {name: number for number, name in enumerate([BACKGROUND, *names])}
    space = max(spaces, key=lambda regions: len(regions.labels), default=None)
    labels = []
    for folder, meant in read:
        try:
            labels.append(_labels_of_regions(folder, meant, space) if space else _labels(folder, meant, numbers))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return labels


def _where(folder: NamedFolder) -> str:
    """Return what says the classes of a source."""
    return str(folder.folder / "dataset.json") if folder.classes is None else f"--classes of {folder.name}"


def _labels(folder: NamedFolder, meant: Meant, numbers: Mapping[str, int]) -> Labels:
    _require_one_meaning(folder, meant)
    written = {name: numbers[name] for name in meant if name != IGNORE}
    values = {value: number for name, number in written.items() for value in meant[name] if is_whole(value)}
    named = {name: [value for value in meant[name] if isinstance(value, str)] for name in written}
    segments = {segment.casefold(): number for name, number in written.items() for segment in named[name] or [name]}
    return _written(folder, meant, Meaning(values, segments, 0), numbers, by_name=next(
        (f"{name}={value[0]}" for name, value in named.items() if value), ""))


def _written(folder: NamedFolder, meant: Meant, meaning: Meaning, names: Mapping, **more) -> Labels:
    listed = tuple(name for name in meant if name not in (BACKGROUND, IGNORE))
    return Labels(names, meaning, next((value for value in meant[BACKGROUND] if is_whole(value)), 0),
                  next(iter(meant.get(IGNORE, ())), None), source=folder.name, partly=IGNORE in meant,
                  listed=None if set(listed) == {*names} - {BACKGROUND} else listed, **more)


def _labels_of_regions(folder: NamedFolder, meant: Meant, regions: _Regions) -> Labels:
    """Return how a source writes the labels of a data set with regions, of which it may be annotated for some."""
    where, heads = _where(folder), regions.values
    own = {name: values for name, values in meant.items() if name not in (BACKGROUND, IGNORE)}
    if unknown := sorted(set(own) - set(heads)):
        raise InputError(f"{where}: {some(unknown)} is no region of {regions.file}, which has {some(heads)}")
    if names := [value for values in meant.values() for value in values if isinstance(value, str)]:
        raise InputError(f"{where}: {names[0]!r} names a segment, but the labels are regions, which have values only")
    _require_one_meaning(folder, {**{name: meant.get(name, []) for name in (BACKGROUND, IGNORE)},
                                  "regions": list({value for values in own.values() for value in values})})
    places = [*regions.order, *sorted(frozenset().union(*heads.values()))]
    values = dict.fromkeys(meant[BACKGROUND], 0)
    for value in dict.fromkeys(value for values_of_one in own.values() for value in values_of_one):
        held = {name for name in own if value in own[name]}
        fits = [place for place in ([value, *places] if folder.classes is None else places)
                if {name for name in own if place in heads[name]} == held]
        if not fits:
            raise InputError(f"{where}: {value} belongs to {some(sorted(held))} and not to "
                             f"{some(sorted(set(own) - held)) or 'others'}; no value in {regions.file} does. Give all "
                             f"values of a region: NAME=VALUE,VALUE")
        values[value] = fits[0]
    return _written(folder, meant, Meaning(values, {}, 0), regions.labels, regions=regions.order)


def _meant_by(folder: NamedFolder) -> tuple[Meant, _Regions | None]:
    """Return what the labels of a source mean, and the regions of the data set if the source describes them."""
    if folder.classes is None:
        return _described_by(folder)
    return _given_by(folder.name, folder.classes), None


def _given_by(source: str, texts: Sequence[str]) -> Meant:
    """Return what --classes says, such as "liver=1", "liver=1,2", "liver=Liver 1", "liver" or "ignore=255".

    Classes without a value have 1, 2, ... in their order, and the background has 0 unless that means "not annotated".
    """
    require_separate(f"--classes of {source}", list(texts))
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
    if not set(meant) - {BACKGROUND, IGNORE}:
        raise InputError(f"--classes of {source}: names no class; at least one besides the background is needed")
    return meant


def _described_by(folder: NamedFolder) -> tuple[Meant, _Regions | None]:
    """Return what the labels in a source's dataset.json say, and the regions if they are some."""
    content, file = described(folder.folder), folder.folder / "dataset.json"
    advice = f"; name the classes: --source {folder.name}={folder.folder} --classes NAME=VALUE ..."
    labels = content.get("labels")
    if not labels:
        raise InputError(f"{file}: {'has no labels' if file.is_file() else 'there is no such file'}{advice}")
    if all(key.isdigit() and isinstance(name, str) for key, name in labels.items()):  # MSD: value to name
        labels = {name: int(value) for value, name in labels.items()}
    if content.get(CLASSES_KEY):
        raise InputError(f"{file}: has \"{CLASSES_KEY}\", but all cases of a source are annotated for the same "
                         f"classes; make a source of each list of classes")
    if malformed({"labels": labels}).keys() & {"labels"}:
        raise InputError(f"{file}: \"labels\" must be {NEEDED['labels']}; got {shown(labels)}{advice}")
    if labels.get(BACKGROUND, 0) != 0:
        raise InputError(f"{file}: \"background\" must be 0; got {shown(labels)}{advice}")
    meant = {name: list(value) if isinstance(value, list) else [value] for name, value in labels.items()}
    meant = {BACKGROUND: [0], **meant}
    if not set(meant) - {BACKGROUND, IGNORE}:
        raise InputError(f"{file}: names no class; at least one besides the background is needed")
    if all(len(values) == 1 for values in meant.values()):
        return meant, None
    order = content.get("regions_class_order")
    if not isinstance(order, list) or len(order) != len(set(meant) - {BACKGROUND, IGNORE}):
        raise InputError(f"{file}: \"labels\" are regions, which need \"regions_class_order\", a list of one value for "
                         f"each of them; got {shown(order)}")
    return meant, _Regions(file, {name: value for name, value in labels.items() if name != IGNORE}, order)


def _require_one_meaning(folder: NamedFolder, meant: Meant) -> None:
    """Raise InputError if a value has two meanings."""
    first: dict = {}
    for name, values in meant.items():
        for value in values:
            key = value.casefold() if isinstance(value, str) else value
            if first.setdefault(key, name) != name:
                raise InputError(f"{_where(folder)}: {value} means {first[key]} and {name}; give each value one "
                                 f"meaning. Regions, which share values, need a source whose dataset.json has them")


# ---- sources of all classes -----------------------------------------------------------------------------------------

def require_all_classes(sources: Iterable[Source]) -> None:
    """Check what data sets say of labels that are given as annotated for all classes.

    Where a label lacks classes, these would become background. A dataset.json counts if it lies beside the labels, or
    in the folder above, and names the case.

    Args:
        sources: The sources, which have no classes of their own.

    Raises:
        InputError: By its dataset.json a label lacks classes, or a label that is given as full is not.
    """
    known: dict[Path, dict] = {}
    lacking: dict[Path, list[str]] = defaultdict(list)
    weaker: dict[Path, list[str]] = defaultdict(list)
    for source in sources:
        for label in source.labels:
            name = stem(label)
            for file in _descriptions(label):
                if file not in known:
                    known[file] = _tables(file)
                if name in known[file]["lacking"]:
                    lacking[file].append(name)
                elif source.kind == FULL and known[file]["kinds"].get(name, FULL) != FULL:
                    weaker[file].append(name)
    problems = [f'{file}: has "{CLASSES_KEY}", by which {some(names, 3)} lack classes, which would become background; '
                f"make a source of each list of classes: --source NAME=LABELS --classes NAME=VALUE ..."
                for file, names in lacking.items()]
    problems += [f'{file}: "{TABLE_KEY}" declares that {some(names, 3)} are not full; give partial labels with '
                 f"--partial or --partial-labels, and leave out labels without annotations" for file, names in
                 weaker.items()]
    if problems:
        raise InputError("\n".join(problems))


def _descriptions(label: Path) -> list[Path]:
    """Return the files that can describe a label, be it a link or not."""
    return list(dict.fromkeys(folder / "dataset.json" for path in (label.absolute(), label.resolve())
                              for folder in (path.parent, path.parent.parent)))


def _tables(file: Path) -> dict:
    """Return the cases that lack classes, and the kinds, that a dataset.json names. One that is none names nothing."""
    try:
        content = read_json(file) if file.is_file() else {}
    except InputError:
        content = {}
    labels, lists, kinds = (value if isinstance(value, dict) else {}
                            for value in map(content.get, ("labels", CLASSES_KEY, TABLE_KEY)))
    classes = set(labels) - {BACKGROUND, IGNORE}
    return {"lacking": {case for case, listed in lists.items() if not classes or not isinstance(listed, list)
                        or not classes.issubset(map(str, listed))}, "kinds": kinds}
