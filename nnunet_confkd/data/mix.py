"""Make one data set from three folders: images with complete masks, with partial masks, and without masks."""
from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_confkd.data.images import ENDINGS, ITK, Volume, ending_of
from nnunet_confkd.data.json_files import NEEDED, malformed, read_json
from nnunet_confkd.data.patients import FOLDS, patients_of
from nnunet_confkd.data.raw_format import Case, Dataset, label_values, summary, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError, shown, some
from nnunet_confkd.processes import PROCESSES

IMAGES, LABELS = ("images", "imagesTr"), ("labels", "labelsTr")
CHANNEL = re.compile(r"(.+)_(\d{4})")


def mix(full: Path, dataset_id: int, *, partial: Path | None = None, unlabelled: Path | None = None,
        name: str = "Mixed", labels: list[str] | None = None, channels: list[str] | None = None,
        ignore_value: int | None = None, background_value: int | None = None, validation: list[str] | None = None,
        patient_pattern: str | None = None, seed: int = 0, processes: int = PROCESSES, link: bool = False) -> Path:
    """Write the three folders as one data set of nnU-Net.

    Args:
        full: Holds `images` and `labels` (or `imagesTr` and `labelsTr`) with files of the same names. Several channels
            have nnU-Net's names (`case_0000`, `case_0001`).
        dataset_id: The 27 in Dataset027_NAME.
        partial: As `full`, with partial masks.
        unlabelled: Holds images, itself or in a folder `images` or `imagesTr`.
        name: The NAME in Dataset027_NAME.
        labels: Names of the values 0, 1, ..., from the background on, or NAME=VALUE; None: from `full`'s dataset.json.
        channels: Names of the channels, which choose nnU-Net's normalisation ("CT"); None: from `full`'s dataset.json,
            or channel_0, channel_1, ... (z-score).
        ignore_value: The value of voxels that are not annotated in the partial labels; None: dataset.json's "ignore".
        background_value: The value of background there, if `ignore_value` is the background's value elsewhere.
        validation: Patients that are held back to validate in the only fold: names, or one number. None: up to five
            folds, in which the fully annotated patients validate in turn.
        patient_pattern: A regular expression whose first group in the name of a case is the patient; None: each case is
            a patient of its own.
        seed: Of the choice of `validation`.
        processes: How many processes write cases.
        link: Whether images become hard links instead of copies.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the folders.
    """
    full = Path(full)
    problems: list[str] = []
    described = _described(full)
    values = _label_values(full, labels, described)
    training = _cases(full, FULL, values.full, problems)
    if partial is not None:
        ignore_value = values.ignore if ignore_value is None else ignore_value
        training += _cases(Path(partial), PARTIAL, _partial_values(values, ignore_value, background_value), problems)
    if unlabelled is not None:
        training += _cases(Path(unlabelled), UNLABELLED, None, problems)
    if not any(case.kind == FULL for case in training) and not problems:
        raise InputError(f"{full}: holds no images with labels")
    if partial is not None and not problems:
        _require_ignored_voxels(Path(partial), training, ignore_value, values)
    ending = _common_ending(training, problems)
    mixed = partial is not None or unlabelled is not None
    return write_dataset(Dataset(
        name=name, channel_names=channels or _channel_names(described, training),
        labels=with_ignore(values.names) if mixed else values.names, file_ending=ending, training=training,
        validation=[] if validation is None else _validation(training, patient_pattern, seed, validation),
        folds=1 if validation else FOLDS, patient_pattern=patient_pattern, regions_class_order=values.regions,
        licence=described.get("licence", described.get("license", "unknown")),
        reference=described.get("reference", ""),
        roots=tuple(Path(folder) for folder in (full, partial, unlabelled) if folder is not None),
        problems=problems), dataset_id, processes, link)


def _common_ending(training: list[Case], problems: list[str]) -> str:
    """Return the ending that most fully annotated images have. It is a problem if other images cannot get it."""
    endings = [ending_of(case.images[0].file) for case in training if case.kind == FULL]
    ending = max(sorted(set(endings)), key=endings.count) if endings else ".nii.gz"
    problems += [f"{case.images[0].file}: cannot be converted to {ending}, the format of the other images"
                 for case in training if ending_of(case.images[0].file) != ending
                 and not {ending, ending_of(case.images[0].file)} <= set(ITK)]
    return ending


def _channel_names(described: dict, training: list[Case]) -> list[str]:
    """Return the names in dataset.json, or channel_0, channel_1, ... for the channels of the first case."""
    names = described.get("channel_names", described.get("modality", {}))
    if names:
        return list(map(str, names.values()))
    count = sum(len(volume.read().voxels) for volume in training[0].images) if training else 1
    return [f"channel_{i}" for i in range(count)]


# ---- labels ---------------------------------------------------------------------------------------------------------

@dataclass
class _Labels:
    """What the values in the label files mean.

    Attributes:
        names: dataset.json's labels, without "ignore".
        full: {value in complete masks: value to write}.
        background: The background's value in the files.
        ignore: The value of "ignore" in the given dataset.json; None if it has none.
        regions: nnU-Net's order of regions; None if the labels are no regions.
    """
    names: Mapping[str, int | list[int]]
    full: dict[int, int]
    background: int
    ignore: int | None
    regions: list[int] | None = None


def _described(full: Path) -> dict:
    if not full.is_dir():
        raise InputError(f"{full}: there is no such folder")
    file = full / "dataset.json"
    if not file.is_file():
        return {}
    described = read_json(file)
    for key in ("labels", "channel_names", "modality"):
        if not isinstance(described.get(key, {}), dict):
            raise InputError(f'{file}: "{key}" must be an object; got {shown(described[key])}')
    return described


def _label_values(full: Path, labels: list[str] | None, described: dict) -> _Labels:
    named = _labels_of_description(full, described) if labels is None else _labels_of_options(labels)
    ignore = named.pop("ignore", None)
    if any(isinstance(value, list) for value in named.values()):
        return _Labels(named, {value: value for value in label_values(named)}, 0, ignore,
                       described.get("regions_class_order"))
    if len(set(named.values())) < len(named):
        raise InputError(f"two labels have the same value: {named}")
    if len(named) < 2:
        raise InputError("at least two labels are needed, the background and one more")
    names = {name: number for number, name in enumerate(named)}
    return _Labels(names, {named[name]: number for name, number in names.items()}, next(iter(named.values())), ignore)


def _labels_of_description(full: Path, described: dict) -> dict[str, Any]:
    """Return {name: value} of dataset.json's labels."""
    if not described.get("labels"):
        raise InputError(f"{full / 'dataset.json'}: has no labels; give their names, from the background on: --labels "
                         f"background NAME ...")
    named = dict(described["labels"])
    if all(key.isdigit() and isinstance(name, str) for key, name in named.items()):  # MSD: value to name
        named = {name: int(value) for value, name in named.items()}
    if malformed({"labels": named}).keys() & {"labels"}:
        raise InputError(f"{full / 'dataset.json'}: \"labels\" must be {NEEDED['labels']}; got "
                         f"{shown(described['labels'])}")
    return named


def _labels_of_options(labels: list[str]) -> dict[str, Any]:
    """Return {name: value} of texts such as "organ" or "organ=3"."""
    named = {}
    for number, text in enumerate(labels):
        label, _, value = text.partition("=")
        if value and not re.fullmatch(r"-?\d+", value) or label in named or not label:
            raise InputError(f"--labels: {text!r}; give names, each once, or NAME=VALUE with whole numbers")
        named[label] = int(value) if value else number
    return named


def _partial_values(values: _Labels, ignore_value: int | None, background_value: int | None) -> dict[int, int]:
    """Return {value in the partial labels: value to write}."""
    if ignore_value is None:
        raise InputError("--ignore-value is missing: which value do the partial labels have where nothing is "
                         "annotated?")
    mapping, background = dict(values.full), values.background
    if background_value is not None and background_value != background:
        if background_value in mapping:
            raise InputError(f"--background-value {background_value} is the value of a class")
        mapping[background_value] = mapping[background]
    if ignore_value == background_value:
        raise InputError(f"--ignore-value and --background-value are both {ignore_value}")
    if ignore_value in mapping and ignore_value != background:
        raise InputError(f"--ignore-value {ignore_value} is the value of a class")
    mapping[ignore_value] = max(values.full.values()) + 1
    return mapping


def _require_ignored_voxels(folder: Path, training: list[Case], ignore_value: int, values: _Labels) -> None:
    """Raise InputError if no partial label has the ignore value. Most likely it is another one then."""
    labels = [case.label for case in training if case.kind == PARTIAL]
    if any((label.read().voxels == ignore_value).any() for label in labels):
        return
    held: Counter = Counter()
    for label in labels:
        found, counts = np.unique(label.read().voxels, return_counts=True)
        held.update(dict(zip(found.tolist(), counts.tolist())))
    total = sum(held.values())
    shares = [f"{value:g}: {100 * count / total:.2g} %" if count < 0.1 * total else f"{value:g}: "
                                                                                    f"{100 * count / total:.1f} %"
              for value, count in sorted(held.items())[:20]]
    likely = max(held, key=held.__getitem__)
    advice = "correct --ignore-value: which of them means \"not annotated\"?"
    if likely == values.background:
        others = [value for value in sorted(held) if value not in values.full]
        advice += f" If it is {likely:g}: --ignore-value {likely:g}"
        if others:
            advice += f" --background-value {others[0]:g}, where {others[0]:g} marks the strokes in the background"
    raise InputError(f"{folder}: no label holds the value {ignore_value}, which is said to mark what is not annotated. "
                     f"The labels hold {', '.join(shares)}; {advice}")


# ---- files ----------------------------------------------------------------------------------------------------------

def _cases(folder: Path, kind: str, values: dict[int, int] | None, problems: list[str]) -> list[Case]:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    images = next((folder / name for name in IMAGES if (folder / name).is_dir()),
                  folder if kind == UNLABELLED else None)
    labels = next((folder / name for name in LABELS if (folder / name).is_dir()), None)
    if images is None or labels is None and kind != UNLABELLED:
        raise InputError(f"{folder}: needs two folders, \"images\" and \"labels\" (or \"imagesTr\" and "
                         f"\"labelsTr\")")
    image_files = _files(images)
    if not image_files:
        raise InputError(f"{images}: holds no images ({', '.join(ENDINGS)})")
    if kind == UNLABELLED:
        return [Case(name, tuple(map(Volume, files)), None, kind) for name, files in _by_case(image_files).items()]
    label_files = {_stem(file): file for file in _files(labels)}
    channels: dict[str, list[Path]] = {}
    for file in image_files:
        stem, match = _stem(file), CHANNEL.fullmatch(_stem(file))
        name = stem if stem in label_files else match[1] if match and match[1] in label_files else None
        if name is None:
            problems.append(f"{file}: has no label in {labels}")
        else:
            channels.setdefault(name, []).append(file)
    problems += [f"{file}: has no image in {images}" for name, file in label_files.items() if name not in channels]
    return [Case(name, tuple(map(Volume, files)), Volume(label_files[name]), kind, values)
            for name, files in channels.items()]


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if ending_of(f) and not f.name.startswith(".") and not f.is_dir())


def _stem(file: Path) -> str:
    return file.name[:-len(ending_of(file))]


def _by_case(files: list[Path]) -> dict[str, list[Path]]:
    """Return {case: its files} by nnU-Net's channel numbers; without such numbers, each file is a case.

    All names must have the numbers, and each case must have 0000, 0001, ...
    """
    cases: dict[str, list[Path]] = {}
    for file in files:
        match = CHANNEL.fullmatch(_stem(file))
        cases.setdefault(match[1] if match else "", []).append(file)
    if "" not in cases and all([_stem(file)[-4:] for file in channels] == [f"{i:04d}" for i in range(len(channels))]
                               for channels in cases.values()):
        return cases
    return {_stem(file): [file] for file in files}


# ---- validation -----------------------------------------------------------------------------------------------------

def _validation(training: list[Case], pattern: str | None, seed: int, wanted: list[str]) -> list[str]:
    """Return the cases of the patients that are to validate. All cases of these patients must be fully annotated."""
    try:
        patients = patients_of([case.name for case in training], pattern)
    except InputError:
        return []  # the writer reports it
    weak = {patients[case.name] for case in training if case.kind != FULL}
    order = sorted({patients[case.name] for case in training} - weak)
    random.Random(seed).shuffle(order)
    if not (len(wanted) == 1 and wanted[0].isdigit()):
        unknown = sorted(set(wanted) - set(order))
        if unknown:
            raise InputError(f"--validation: these are no patients all of whose cases are full: {some(unknown)}")
        chosen = set(wanted)
    else:
        count = int(wanted[0])
        if not 0 < count < len(order):
            raise InputError(f"--validation: {count} of {len(order)} fully annotated patients would leave none to "
                             f"{'train on' if count else 'validate on'}")
        chosen = set(order[:count])
    return [case.name for case in training if patients[case.name] in chosen]


def main(argv: list[str]) -> None:
    """Run `confkd mix`."""
    parser = argparse.ArgumentParser(prog="confkd mix", description=__doc__, epilog=(
        "--full and --partial hold two folders each, images and labels (or imagesTr and labelsTr), with files of the "
        "same names. Several channels have nnU-Net's names (case_0000, case_0001). Formats: " + ", ".join(ENDINGS)))
    parser.add_argument("--full", required=True, type=Path, metavar="DIR")
    parser.add_argument("--partial", type=Path, metavar="DIR")
    parser.add_argument("--unlabelled", type=Path, metavar="DIR", help="images, in it or in its folder images")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", default="Mixed")
    parser.add_argument("--labels", nargs="+", metavar="NAME[=VALUE]", help="names of the labels, from the background "
                        "on, with the values 0, 1, ... or those given; default: those in the dataset.json of --full")
    parser.add_argument("--channels", nargs="+", metavar="NAME", help="names of the channels; \"CT\" chooses nnU-Net's "
                        "CT normalisation; default: those in the dataset.json of --full, or z-score")
    parser.add_argument("--ignore-value", type=int, metavar="V",
                        help="value of voxels that are not annotated in the partial labels")
    parser.add_argument("--background-value", type=int, metavar="V", help="value of background in the partial labels, "
                        "if --ignore-value is the background's value elsewhere")
    parser.add_argument("--validation", nargs="+", metavar="N|PATIENT", help="fully annotated patients that validate "
                        "in one fold and never train: a number, or names; default: up to five folds, in which they "
                        "validate in turn")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="a regular expression whose first group in the name "
                        "of a case is the patient; default: each case is a patient")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of --validation N")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies of images: they take no "
                        "space, but a program that writes to one writes to the other")
    args = vars(parser.parse_args(argv))
    print(summary(mix(args.pop("full"), args.pop("id"), **args)))
