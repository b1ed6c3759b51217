"""The `confkd mix --source` command that fits folders whose labels are annotated for different classes."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nnunet_confkd.data.class_sources import IGNORE
from nnunet_confkd.data.groups import Group
from nnunet_confkd.data.images import ENDINGS
from nnunet_confkd.data.json_files import is_whole
from nnunet_confkd.data.listing import CASE
from nnunet_confkd.data.meanings import BACKGROUND, described
from nnunet_confkd.data.measures import IMAGE, MASK, SCRIBBLES, Measure, markers_of
from nnunet_confkd.data.sources import IMAGES, LABELS
from nnunet_confkd.data.supervision import UNLABELLED
from nnunet_confkd.errors import InputError, some

CALLED_BACKGROUND = re.compile(r"(back ?ground|bg|hintergrund|fondo|fond)", re.IGNORECASE)


def plain_name(text: str) -> str:
    """Return a name for a class or a source: letters and digits, and underscores for all else between them."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def background_of(segments: Iterable[str]) -> str | None:
    """Return the first segment that is called background; None if none is."""
    return next((name for name in segments if CALLED_BACKGROUND.fullmatch(name)), None)


def spellings(measures: Iterable[Measure]) -> dict[str, str]:
    """Return the most frequent spelling of each segment: capitals do not count in `confkd mix`.

    Returns:
        {name in lower case: name}, in alphabetical order.
    """
    count = Counter(str(name) for measure in measures for name in measure.drawn)
    usual: dict[str, str] = {}
    for name in sorted(count, key=lambda name: (-count[name], name)):
        usual.setdefault(name.casefold(), name)
    return dict(sorted(usual.items()))


def word_of(name: str, segment: str) -> str:
    """Return the word of `confkd mix` for a class and its segment. The segment is left out if it has the same name."""
    return name if name.casefold() == segment.casefold() else f"{name}={segment}"


@dataclass
class LabelPlace:
    """The labels of one place that have the same kind.

    Attributes:
        group: The files of the place.
        scribbles: Whether the labels are scribble-like.
        classes: {value, or name of a segment: name of the class} of the classes that the labels are annotated for.
        background: The value or the segment of the background; None: 0, or what lies in no segment. "?": it cannot be
            told.
        ignore: The value of voxels that are not annotated.
        name: The name of the source.
        regions: Whether a dataset.json beside says that the classes are regions.
    """
    group: Group
    scribbles: bool
    classes: dict
    background: int | str | None = None
    ignore: int | None = None
    name: str = ""
    regions: bool = False

    @property
    def measures(self) -> list[Measure]:
        """What was measured of the labels."""
        kind = SCRIBBLES if self.scribbles else MASK
        return [measure for measure in self.group.files.values() if measure.kind == kind]

    @property
    def named(self) -> bool:
        """Whether the labels have segments."""
        return any(measure.named for measure in self.measures)

    @property
    def words(self) -> list[str]:
        """The words after --classes."""
        words = [f"{name}={value}" if is_whole(value) else word_of(name, value)
                 for value, name in self.classes.items()]
        if self.background is not None:
            words.append(BACKGROUND if self.background == BACKGROUND else f"{BACKGROUND}={self.background}")
        if self.scribbles:
            words.append(IGNORE if self.named else f"{IGNORE}={self.ignore}")
        return words


@dataclass
class Proposal:
    """A command, and what is to be said of it.

    Attributes:
        words: The arguments of `confkd mix`. None: there is no command.
        instead: Other arguments, for the case that these do not fit.
        notes: What was concluded, and what the user has to decide.
        otherwise: Other arguments, for the case that equal values mean different classes.
    """
    words: list[str] = field(default_factory=list)
    instead: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    otherwise: list[str] = field(default_factory=list)


def propose_sources(places: Sequence[LabelPlace], groups: Iterable[Group]) -> Proposal | None:
    """Return the command for folders that are annotated for different classes; None if all masks are for the same.

    Args:
        places: Those of :func:`places_of_labels`.
        groups: The files, of which some are images.
    """
    if len({frozenset(place.classes.values()) for place in places if not place.scribbles}) < 2:
        return None
    together = {place.group.place for place in places if sum(place.group is other.group for other in places) > 1}
    if together:
        return Proposal(notes=[f"no command: {some(sorted(together))} holds both masks and scribbles, and the masks of "
                               f"other folders are annotated for other classes; move the scribbles to a folder of "
                               f"their own, and inspect again"])
    images = [group for group in groups if any(measure.kind == IMAGE for measure in group.files.values())]
    in_folders, apart = _words_of_folders(places, images), _words_of_places(places, images)
    return Proposal(in_folders or apart, instead=apart if in_folders else [], notes=_notes(places))


# ---- what the labels are annotated for ------------------------------------------------------------------------------

def places_of_labels(groups: Iterable[Group]) -> list[LabelPlace]:
    """Find the places of masks, then those of scribbles, and what they are annotated for."""
    found = []
    for group in groups:
        for kind in (MASK, SCRIBBLES):
            if any(measure.kind == kind for measure in group.files.values()):
                found.append(LabelPlace(group, kind == SCRIBBLES, {}))
    found.sort(key=lambda place: place.scribbles)
    values: set[int] = set()
    usual = spellings(measure for place in found if place.named for measure in place.measures)
    for place in found:
        if place.named:
            _name_segments(place, usual)
        elif place.scribbles:
            _name_scribbles(place, values)
        else:
            values |= _name_values(place)
    _name_sources(found)
    return found


def _name_segments(place: LabelPlace, usual: Mapping[str, str]) -> None:
    names = [usual[name] for name in spellings(place.measures)]
    place.background = background_of(names)
    place.classes = {name: plain_name(name) for name in names if name != place.background}


def _name_values(place: LabelPlace) -> set[int]:
    """Name the classes of masks by the dataset.json beside them, or by their values. Return the values that occur."""
    held = sorted({value for measure in place.measures for value in measure.voxels}, key=lambda v: (v != 0, v))
    names = _described_names(place, held)
    if names is None:
        names = {value: f"class_{value}" for value in held[1:]}
        place.background = held[0] or None
    place.classes = names
    return set(held)


def _name_scribbles(place: LabelPlace, masks: set[int]) -> None:
    """Tell the value that is not annotated, and the classes; `masks` are the values of all masks."""
    held: Counter = Counter()
    for measure in place.measures:
        held.update(measure.voxels)
    place.ignore = next(iter(markers_of(place.measures)), max(held, key=held.__getitem__))
    others = sorted(set(held) - masks - {place.ignore})
    if place.ignore == 0 and others:
        place.background = others[0] if len(others) == 1 else "?"
    place.classes = {value: f"class_{value}" for value in sorted(set(held) - {0, place.ignore, place.background})}


def _described_names(place: LabelPlace, held: Iterable[int]) -> dict | None:
    """Return {value: name} of the dataset.json beside the labels; None if there is none, or if it does not fit."""
    group = place.group
    folder = group.root.parent if group.flat and group.root.name in LABELS else group.root
    try:
        labels = described(folder).get("labels") or {}
    except InputError:
        return None
    if all(str(key).isdigit() and isinstance(name, str) for key, name in labels.items()):  # MSD: value to name
        labels = {name: int(value) for value, name in labels.items()}
    labels = {name: value for name, value in labels.items() if name != IGNORE and value != 0}
    place.regions = any(isinstance(value, list) for value in labels.values())
    values = {number for value in labels.values() for number in (value if isinstance(value, list) else [value])}
    if not values or not set(held) - {0} <= values:
        place.regions = False
        return None
    return {",".join(map(str, value)) if isinstance(value, list) else value: name for name, value in labels.items()}


def _name_sources(places: Iterable[LabelPlace]) -> None:
    """Name the sources after their folders."""
    taken = {UNLABELLED}
    for place in places:
        group = place.group
        root = group.root.resolve()
        text = root.parent.name if root.name in LABELS else root.name
        if not (group.flat and group.alone):
            text = re.sub("|".join(re.escape(ending) for ending in (*ENDINGS, CASE)), "", group.pattern) or text
        text = plain_name(text) or "source"
        for name in (text, f"{root.parent.name}_{text}", *(f"{text}_{number}" for number in range(2, 1000))):
            if name.lower() not in taken and re.fullmatch(r"\w+(?<!_seg)", name):
                place.name = name
                taken.add(name.lower())
                break


# ---- the options ----------------------------------------------------------------------------------------------------

def _words_of_places(places: Iterable[LabelPlace], images: Iterable[Group]) -> list[str]:
    """Return the options of images that lie apart from the labels."""
    words = ["--images", *(group.place for group in images)]
    for place in places:
        words += ["--source", f"{place.name}={place.group.place}", "--classes", *place.words]
    return words


def _words_of_folders(places: Sequence[LabelPlace], images: Iterable[Group]) -> list[str]:
    """Return the options of folders that hold images and labels each; none if that is not how the files lie."""
    rest = {group.root: group for group in images if group.flat and group.alone}
    words = []
    for place in places:
        root = place.group.root
        beside = next((root.parent / name for name in IMAGES if root.parent / name in rest), None)
        if not (place.group.flat and place.group.alone and root.name in LABELS and beside):
            return []
        del rest[beside]
        words += ["--source", f"{place.name}={root.parent}"]
        words += [] if place.regions else ["--classes", *place.words]
    if len(rest) > 1 or any(not (group.flat and group.alone) for group in images):
        return []
    return words + [word for folder in rest for word in ("--unlabelled", str(folder))]


def _notes(places: Iterable[LabelPlace]) -> list[str]:
    """Say what was concluded."""
    places = list(places)
    classes = dict.fromkeys(name for place in places for name in place.classes.values())
    notes = []
    for place in places:
        lacking = [name for name in classes if name not in place.classes.values()]
        if lacking:
            notes.append(f"{place.group.place}: taken to be not annotated for {some(lacking)}. If some of these were "
                         f"looked for there, add them to --classes of {place.name}")
        if place.scribbles and not place.named:
            notes.append(f"{place.group.place}: {place.ignore} = not annotated, which is most of what it holds")
        if place.background == "?":
            notes.append(f"{place.group.place}: which of {some(place.classes)} marks scribbles in the background? Put "
                         f"it in the place of the question mark, and take it out of the classes")
    if any(re.fullmatch(r"class_-?\d+", name) for name in classes):
        notes.append("equal values are taken for the same class in all folders. Where they are different classes, give "
                     "them different names; where different values are one class, give them the same name")
    return notes


def proposal_of_other_classes(places: Sequence[LabelPlace], images: Sequence[Group]) -> list[str]:
    """Return the arguments for the case that folders whose masks have the same values are of different organs.

    Args:
        places: Those of :func:`places_of_labels`, whose masks are all annotated for the same classes.
        images: The groups that hold images.

    Returns:
        The arguments of `confkd mix`; none if there is one such folder, or if names tell the classes.
    """
    if len(places) < 2 or any(place.scribbles or place.named or set(place.classes.values()) != {
            f"class_{value}" for value in place.classes} for place in places):
        return []
    places = [replace(place, classes={value: f"{place.name}_{value}" for value in place.classes}) for place in places]
    return _words_of_folders(places, images) or _words_of_places(places, images)
