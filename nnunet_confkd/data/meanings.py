"""What the values and segments of label files mean, and which options say so if the files do not fit."""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunet_confkd.data.json_files import NEEDED, malformed, read_json
from nnunet_confkd.data.raw_format import label_values
from nnunet_confkd.data.supervision import FULL
from nnunet_confkd.data.survey import MOST_STRANGE, Content, shares_text, together
from nnunet_confkd.errors import InputError, shown, some

BACKGROUND = "background"  # nnU-Net's name of label 0


@dataclass(frozen=True)
class Meaning:
    """What the labels of a source mean.

    Attributes:
        values: {value in label maps: value to write}.
        segments: {name of a segment, in lower case: value to write}.
        outside: The value to write where nothing is drawn: in no segment, or beyond the end of a label.
    """
    values: Mapping[int, int]
    segments: Mapping[str, int]
    outside: int


@dataclass(frozen=True)
class Labels:
    """The labels of a data set.

    Attributes:
        names: dataset.json's labels, without "ignore".
        full: What complete masks mean.
        background: The background's value in them.
        ignore: The value of "ignore" in the given dataset.json; None if it has none.
        regions: nnU-Net's order of regions; None if the labels are no regions.
        by_name: A label that is named by its segment, as in --labels, so that it has no value.
        source: The name of the source whose labels are written like this (--source); empty: those of all sources are.
        listed: The classes that this source is annotated for; None: all.
        partly: Whether voxels of this source may be not annotated.
    """
    names: Mapping[str, int | list[int]]
    full: Meaning
    background: int
    ignore: int | None
    regions: list[int] | None = None
    by_name: str = ""
    source: str = ""
    listed: tuple[str, ...] | None = None
    partly: bool = False

    @property
    def option(self) -> str:
        """The option that says what the labels mean."""
        return f"--classes of {self.source}" if self.source else "--labels"

    @property
    def ignore_option(self) -> str:
        """The option for the value of voxels that are not annotated."""
        return f"ignore=VALUE in {self.option}" if self.source else "--ignore-value"

    def options(self, ignore: str | None, background: str | None) -> str:
        """Return what to type so that these values mean "not annotated" and the background."""
        words = ("ignore=", "background=") if self.source else ("--ignore-value ", "--background-value ")
        text = " ".join(f"{word}{value}" for word, value in zip(words, (ignore, background)) if value is not None)
        return f"{self.option}: {text}" if self.source else text

    @property
    def ignored(self) -> int:
        """The value to write where nothing is annotated."""
        return max(label_values(self.names)) + 1

    def partial(self, ignore_value: int | None, background_value: int | None) -> Meaning:
        """Return what partial labels mean.

        Args:
            ignore_value: The value where nothing is annotated; None: they have segments, and no values.
            background_value: The background's value, if it is not that of complete masks.

        Raises:
            InputError: One value is to mean two things.
        """
        mapping, background = dict(self.full.values), self.background
        if ignore_value is None:
            return replace(self.full, values={}, outside=self.ignored)
        if background_value is not None and background_value != background:
            if background_value in mapping:
                raise InputError(f"--background-value {background_value} is the value of a class")
            mapping[background_value] = mapping[background]
        if ignore_value == background_value:
            raise InputError(f"--ignore-value and --background-value are both {ignore_value}")
        if ignore_value in mapping and ignore_value != background:
            raise InputError(f"--ignore-value {ignore_value} is the value of a class")
        mapping[ignore_value] = self.ignored
        return replace(self.full, values=mapping, outside=self.ignored)


# ---- options and dataset.json ----------------------------------------------------------------------------------------

def described(folder: Path) -> dict:
    """Return the dataset.json of a folder of complete masks; {} if there is none."""
    file = folder / "dataset.json"
    if not file.is_file():
        return {}
    content = read_json(file)
    for key in ("labels", "channel_names", "modality"):
        if not isinstance(content.get(key, {}), dict):
            raise InputError(f'{file}: "{key}" must be an object; got {shown(content[key])}')
    return content


def labels_of(folder: Path, texts: list[str] | None, description: dict) -> Labels:
    """Return the labels that --labels names, or dataset.json.

    Args:
        folder: That of dataset.json.
        texts: Those of --labels; None: those of dataset.json count.
        description: The content of dataset.json.

    Raises:
        InputError: There are no labels, or they contradict each other.
    """
    named = _labels_of_description(folder, description) if texts is None else _labels_of_options(texts)
    ignore = named.pop("ignore", None)
    if any(isinstance(value, list) for value in named.values()):
        same = {value: value for value in label_values(named)}
        return Labels(named, Meaning(same, {}, 0), 0, ignore, description.get("regions_class_order"))
    if len(set(named.values())) < len(named):
        raise InputError(f"two labels have the same value: {named}")
    if len(named) < 2:
        raise InputError("at least two labels are needed, the background and one more")
    if BACKGROUND not in named:
        raise InputError(f"{'--labels' if texts else folder / 'dataset.json'}: none of {some(named)} is called "
                         f"\"{BACKGROUND}\", which nnU-Net needs; call it so")
    named = {BACKGROUND: named[BACKGROUND], **named}  # a file may name it anywhere, e.g. sorted by name
    names = {name: number for number, name in enumerate(named)}
    values = {named[name]: number for name, number in names.items() if isinstance(named[name], int)}
    segments = {str(named[name] if isinstance(named[name], str) else name).casefold(): number
                for name, number in names.items()}
    background = next(iter(named.values()))
    return Labels(
        names, Meaning(values, segments, 0), background if isinstance(background, int) else 0, ignore,
        by_name=next((f"{name}={value}" for name, value in named.items() if isinstance(value, str)), ""))


def _labels_of_description(folder: Path, description: dict) -> dict[str, Any]:
    """Return {name: value} of dataset.json's labels."""
    if not description.get("labels"):
        file = folder / "dataset.json"
        raise InputError(f"{file}: {'has no labels' if file.is_file() else 'there is no such file'}; give the names of "
                         f"the labels, from the background on: --labels background NAME ...")
    named = dict(description["labels"])
    if all(key.isdigit() and isinstance(name, str) for key, name in named.items()):  # MSD: value to name
        named = {name: int(value) for value, name in named.items()}
    if malformed({"labels": named}).keys() & {"labels"}:
        raise InputError(f"{folder / 'dataset.json'}: \"labels\" must be {NEEDED['labels']}; got "
                         f"{shown(description['labels'])}")
    return named


def _labels_of_options(texts: list[str]) -> dict[str, Any]:
    """Return {name: value or name of the segment} of texts such as "organ", "organ=3" or "organ=Liver 1"."""
    require_separate("--labels", texts)
    named: dict[str, Any] = {}
    for number, text in enumerate(texts):
        label, _, value = text.partition("=")
        if label in named or not label:
            raise InputError(f"--labels: {text!r}; give names, each once, or NAME=VALUE with whole numbers, or "
                             f"NAME=SEGMENT")
        same = next((other for other in named if other.casefold() == label.casefold()), None)
        if same:
            raise InputError(f"--labels: {same} and {label} differ in capitals alone, which do not count in the names "
                             f"of segments; leave one of them out")
        named[label] = int(value) if re.fullmatch(r"-?\d+", value) else value or number
    return named


def require_separate(option: str, texts: list[str]) -> None:
    """Raise InputError if names are separated by commas, as in "background,liver" or "background, liver".

    Args:
        option: The option that they are given with.
        texts: Its words.
    """
    joined = len(texts) == 1 and re.search(r"^[^=\s]+,[^=\s]+$|,[A-Za-z_]\w*=", texts[0])
    if joined or any(re.fullmatch("[^=]+,", text) for text in texts):
        words = " ".join(texts).replace(",", " ").split()
        raise InputError(f"{option}: names are separated by spaces, not by commas; give {' '.join(words)}")


# ---- do the files fit? -----------------------------------------------------------------------------------------------

def missing_ignore_value(contents: Mapping[Path, Content], labels: Labels) -> InputError:
    """Return the error that --ignore-value is missing, with what the partial labels hold."""
    return InputError(f"{labels.ignore_option} is missing: which value do the partial labels have where nothing is "
                      f"annotated? {_held_text(contents, labels)}")


def ignore_value_problem(contents: Mapping[Path, Content], labels: Labels, ignore_value: int) -> str | None:
    """Say that no partial label has the ignore value, so that it is most likely another one; None if some label has."""
    # the values of a label that holds very many of them are not known here
    if not contents or any(not content.voxels or ignore_value in content.voxels for content in contents.values()):
        return None
    return (f"{_place(contents)}: no label holds the value {ignore_value}, which is said to mark what is not "
            f"annotated. {_held_text(contents, labels)}")


def _held_text(contents: Mapping[Path, Content], labels: Labels) -> str:
    """Say what partial labels hold, and which options fit if the most frequent value means "not annotated"."""
    held = together(contents.values())
    if not held:
        return "The labels hold nothing."
    likely = max(held, key=held.__getitem__)
    background = None
    if likely == labels.background:
        others = [value for value in sorted(held) if value not in labels.full.values]
        background = f"{others[0]:g}" if others else None
    elif likely in labels.full.values:
        return f"The labels hold {shares_text(held)}; which of them means \"not annotated\"?"
    text = (f"The labels hold {shares_text(held)}; correct {labels.ignore_option}: if {likely:g} is *not annotated*: "
            f"{labels.options(f'{likely:g}', background)}")
    return text + (f", where {background} marks the scribbles in the background" if background else "")


def value_problems(contents: Mapping[Path, Content], kind: str, meaning: Meaning, labels: Labels) -> dict[Path, str]:
    """Find values and segments without a meaning, with the options that give them one.

    Args:
        contents: {label: what it holds} of one source.
        kind: Of the source.
        meaning: Of its labels.
        labels: Those of the data set.

    Returns:
        {label: what is wrong}. All labels that hold the same strange values have the same text.
    """
    strange: dict[tuple, list[Path]] = defaultdict(list)
    for path, content in contents.items():
        if content.named:
            found = [name for name in content.voxels if isinstance(name, str)
                     and name.casefold() not in meaning.segments and not path.is_dir()]
        else:
            found = [value for value in content.voxels if value not in meaning.values]
        if found and all(isinstance(value, str) or float(value).is_integer() for value in found):
            strange[(content.named, *sorted(found))].append(path)
    problems = {}
    for (named, *found), files in strange.items():
        held = together(contents[file] for file in files)
        text = f"{files[0]}: holds" if len(files) == 1 else f"{len(files)} labels hold"
        plural = "s" if len(found) > 1 else ""
        if named:
            text += (f" the segment{plural} {some(map(repr, found))}, which {labels.option} does not name. "
                     f"{_segment_advice(found, labels)}")
        else:
            image = "It looks like an image: are the images and the labels exchanged?"
            advice = image if len(found) > MOST_STRANGE else _value_advice(found, kind, held, labels)
            text += (f" the value{plural} {some(f'{value:g}' for value in found)}; a {kind} "
                     f"label may hold {some(sorted(meaning.values))}. {advice}")
        text += f" All that is held: {shares_text(held)}" + ("" if len(files) == 1 else f"; in {some(files, 3)}")
        problems.update(dict.fromkeys(files, text))
    return problems


def _segment_advice(found: list[str], labels: Labels) -> str:
    if labels.source:
        return (f"Name them: --classes ... 'NAME={found[0]}'; or say that they are background: "
                f"'background={found[0]}'.")
    names = " ".join(re.sub(r"[^A-Za-z0-9]+", "_", name) for name in found)
    return (f"Name them: --labels background {names}; or say which label they are, as in --labels ... "
            f"'NAME={found[0]}'.")


def _value_advice(found: list, kind: str, held: Mapping, labels: Labels) -> str:
    first, most = f"{found[0]:g}", max(held, key=held.__getitem__)
    name = f"name it: --{'classes' if labels.source else 'labels'} ... NAME={first}."
    if labels.source:
        all_background = ",".join(f"{value:g}" for value in sorted({labels.background, *found}))
        name += f" If it is a class that you do not need, it can be background: background={all_background}."
    if kind == FULL:
        options = labels.options(f"{most:g}", None if most in found else first)
        return f"If {first} is a class, {name} If {most:g} is *not annotated*, these are partial labels: {options}."
    advice = f"If {first} marks scribbles in the background: {labels.options(None, first)}. If it is a class, {name}"
    return f"If {most:g} is *not annotated*: {labels.options(f'{most:g}', None)}. {advice}" if most in found else advice


def only_in_scribbles(full: Mapping[Path, Content], partial: Mapping[Path, Content], labels: Labels) -> list[str]:
    """List classes that no complete mask holds, but partial labels: it may be the value of background scribbles."""
    notes = []
    complete, scribbles = together(full.values()), together(partial.values())
    for value, number in labels.full.values.items():
        name = next(iter(key for key, written in labels.names.items() if written == number), None)
        if number and name and value in scribbles and value not in complete and complete:
            notes.append(f"note: {name} (value {value}) is in partial labels only, in no full one. If it marks "
                         f"scribbles in the background, leave {name} out of --labels, and give "
                         f"--background-value {value}")
    return notes


def _place(contents: Iterable[Path]) -> Path:
    folders = {path.parent for path in contents}
    return folders.pop() if len(folders) == 1 else next(iter(contents))
