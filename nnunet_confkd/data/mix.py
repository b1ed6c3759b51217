"""One data set out of three folders: images with full masks, images with partial ones, images with nothing."""
from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np

from nnunet_confkd.data.images import ENDINGS, ITK, Volume, ending_of
from nnunet_confkd.data.json_files import NEEDED, malformed, read_json
from nnunet_confkd.data.patients import FOLDS, patients_of
from nnunet_confkd.data.raw_format import Case, Dataset, label_values, summary, with_ignore, write_dataset
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError, shown
from nnunet_confkd.processes import PROCESSES

IMAGES, LABELS = ("images", "imagesTr"), ("labels", "labelsTr")
CHANNEL = re.compile(r"(.+)_(\d{4})")


def mix(full: Path, dataset_id: int, *, partial: Path | None = None, unlabelled: Path | None = None, name: str = "Mixed",
        labels: list[str] | None = None, channels: list[str] | None = None, ignore_value: int | None = None,
        background_value: int | None = None, validation: list[str] | None = None, patient_pattern: str | None = None,
        seed: int = 0, processes: int = PROCESSES, link: bool = False) -> Path:
    """Write the three folders as one data set of nnU-Net; returns its folder.

    full, partial: hold `images` and `labels` (or `imagesTr` and `labelsTr`) with files of the same names; several channels
    by nnU-Net's names (`case_0000`, `case_0001`). unlabelled: holds images, itself or in such a subfolder.
    labels: names from the background on, of the values 0, 1, ..., or NAME=VALUE; None: from `full`'s dataset.json.
    channels: names, which choose nnU-Net's normalisation ("CT"); None: from dataset.json, else channel_0, ... (z-score).
    ignore_value: what marks voxels that are not annotated in the partial labels; None: dataset.json's "ignore".
    background_value: what marks background there, where `ignore_value` is the background's value.
    validation: patients that are held back to validate in the only fold, names or one number (seeded). None: up to five
    folds, in which the fully annotated patients validate in turn.

    Raises InputError with all that is wrong with the folders.
    """
    full = Path(full)
    problems: list[str] = []
    described = _described(full)
    known_ignore, values, regions = _label_values(full, labels, described)
    folders = {FULL: full, PARTIAL: partial, UNLABELLED: unlabelled}
    training = []
    for kind, folder in folders.items():
        if folder is None:
            continue
        mapping = None
        if kind == FULL:
            mapping = values["full"]
        elif kind == PARTIAL:
            ignore_value = known_ignore if ignore_value is None else ignore_value
            mapping = _partial_values(values, ignore_value, background_value)
        training += _cases(Path(folder), kind, mapping, problems)
    if not any(case.kind == FULL for case in training) and not problems:
        raise InputError(f"{full}: holds no images with labels")
    if partial is not None and not problems:
        _require_ignored_voxels(Path(partial), training, ignore_value, values)
    mixed = partial is not None or unlabelled is not None
    names = with_ignore(values["names"]) if mixed else values["names"]
    endings = [ending_of(case.images[0].file) for case in training if case.kind == FULL]
    ending = max(sorted(set(endings)), key=endings.count) if endings else ".nii.gz"
    problems += [f"{case.images[0].file}: cannot be converted to {ending}, the format of the other images"
                 for case in training if ending_of(case.images[0].file) != ending
                 and not {ending, ending_of(case.images[0].file)} <= set(ITK)]
    if channels is None:
        channels = [*map(str, described.get("channel_names", described.get("modality", {})).values())] or _count_channels(training)
    return write_dataset(Dataset(
        name=name, channel_names=channels, labels=names, file_ending=ending, training=training,
        validation=[] if validation is None else _validation(training, patient_pattern, seed, validation),
        folds=1 if validation else FOLDS, patient_pattern=patient_pattern,
        regions_class_order=regions, licence=described.get("licence", described.get("license", "unknown")),
        reference=described.get("reference", ""), roots=tuple(Path(f) for f in folders.values() if f is not None),
        problems=problems), dataset_id, processes, link)


# ---- labels ---------------------------------------------------------------------------------------------------------

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


def _label_values(full: Path, labels: list[str] | None, described: dict) -> tuple[int | None, dict, list[int] | None]:
    """The ignore value that dataset.json names; {"names": labels to write, "full": {value in the files: value to write},
    "background": the background's value in the files}; nnU-Net's order of regions."""
    if labels is None:
        if not described.get("labels"):
            raise InputError(f"{full / 'dataset.json'}: has no labels; give their names, from the background on: --labels "
                             f"background NAME ...")
        named = dict(described["labels"])
        if all(key.isdigit() and isinstance(name, str) for key, name in named.items()):  # MSD: value to name
            named = {name: int(value) for value, name in named.items()}
        if malformed({"labels": named}).keys() & {"labels"}:
            raise InputError(f"{full / 'dataset.json'}: \"labels\" must be {NEEDED['labels']}; got {shown(described['labels'])}")
    else:
        named = {}
        for number, text in enumerate(labels):
            label, _, value = text.partition("=")
            if value and not re.fullmatch(r"-?\d+", value) or label in named or not label:
                raise InputError(f"--labels: {text!r}; give names, each once, or NAME=VALUE with whole numbers")
            named[label] = int(value) if value else number
    ignore = named.pop("ignore", None)
    regions = described.get("regions_class_order") if labels is None else None
    if any(isinstance(value, list) for value in named.values()):
        return ignore, {"names": named, "full": {value: value for value in label_values(named)}, "background": 0}, regions
    if len(set(named.values())) < len(named):
        raise InputError(f"two labels have the same value: {named}")
    if len(named) < 2:
        raise InputError("at least two labels are needed, the background and one more")
    names = {name: number for number, name in enumerate(named)}
    return ignore, {"names": names, "full": {named[name]: number for name, number in names.items()},
                    "background": next(iter(named.values()))}, None


def _partial_values(values: dict, ignore_value: int | None, background_value: int | None) -> dict[int, int]:
    """{value in the partial labels: value to write}."""
    if ignore_value is None:
        raise InputError("--ignore-value is missing: which value do the partial labels have where nothing is annotated?")
    mapping, background = dict(values["full"]), values["background"]
    if background_value is not None and background_value != background:
        if background_value in mapping:
            raise InputError(f"--background-value {background_value} is the value of a class")
        mapping[background_value] = mapping[background]
    if ignore_value == background_value:
        raise InputError(f"--ignore-value and --background-value are both {ignore_value}")
    if ignore_value in mapping and ignore_value != background:
        raise InputError(f"--ignore-value {ignore_value} is the value of a class")
    mapping[ignore_value] = max(values["full"].values()) + 1
    return mapping


def _require_ignored_voxels(folder: Path, training: list[Case], ignore_value: int, values: dict) -> None:
    """Raise InputError where no partial label has the value: then it is most likely another one."""
    labels = [case.label for case in training if case.kind == PARTIAL]
    if any((label.read().voxels == ignore_value).any() for label in labels):
        return
    held: Counter = Counter()
    for label in labels:
        found, counts = np.unique(label.read().voxels, return_counts=True)
        held.update(dict(zip(found.tolist(), counts.tolist())))
    total = sum(held.values())
    shares = [f"{value:g}: {100 * count / total:.2g} %" if count < 0.1 * total else f"{value:g}: {100 * count / total:.1f} %"
              for value, count in sorted(held.items())[:20]]
    likely = max(held, key=held.__getitem__)
    advice = "correct --ignore-value: which of them means \"not annotated\"?"
    if likely == values["background"]:
        others = [value for value in sorted(held) if value not in values["full"]]
        advice += f" If it is {likely:g}: --ignore-value {likely:g}"
        if others:
            advice += f" --background-value {others[0]:g}, where {others[0]:g} marks the strokes in the background"
    raise InputError(f"{folder}: no label holds the value {ignore_value}, which is said to mark what is not annotated. The labels hold "
                     f"{', '.join(shares)}; {advice}")


# ---- files ----------------------------------------------------------------------------------------------------------

def _cases(folder: Path, kind: str, values: dict[int, int] | None, problems: list[str]) -> list[Case]:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    images = next((folder / name for name in IMAGES if (folder / name).is_dir()), folder if kind == UNLABELLED else None)
    labels = next((folder / name for name in LABELS if (folder / name).is_dir()), None)
    if images is None or labels is None and kind != UNLABELLED:
        raise InputError(f"{folder}: needs two folders, \"images\" and \"labels\" (or \"imagesTr\" and \"labelsTr\")")
    image_files = _files(images)
    if not image_files:
        raise InputError(f"{images}: holds no images ({', '.join(ENDINGS)})")
    if kind == UNLABELLED:
        return [Case(name, tuple(Volume(f) for f in files), None, kind) for name, files in _by_case(image_files).items()]
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
    return [Case(name, tuple(Volume(f) for f in files), Volume(label_files[name]), kind, values)
            for name, files in channels.items()]


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if ending_of(f) and not f.name.startswith(".") and not f.is_dir())


def _stem(file: Path) -> str:
    return file.name[:-len(ending_of(file))]


def _by_case(files: list[Path]) -> dict[str, list[Path]]:
    """By nnU-Net's channel numbers, if all names have them and each case begins with 0000; else a file a case."""
    cases: dict[str, list[Path]] = {}
    for file in files:
        match = CHANNEL.fullmatch(_stem(file))
        cases.setdefault(match[1] if match else "", []).append(file)
    if "" not in cases and all([_stem(f)[-4:] for f in of] == [f"{i:04d}" for i in range(len(of))] for of in cases.values()):
        return cases
    return {_stem(file): [file] for file in files}


def _count_channels(training: list[Case]) -> list[str]:
    """Names for the channels of the first case: one a file, or several in a coloured PNG."""
    if not training:
        return ["channel_0"]
    return [f"channel_{i}" for i in range(sum(len(volume.read().voxels) for volume in training[0].images))]


# ---- validation -----------------------------------------------------------------------------------------------------

def _validation(training: list[Case], pattern: str | None, seed: int, wanted: list[str]) -> list[str]:
    """The wanted cases, of patients all of whose cases are full."""
    try:
        patients = patients_of([case.name for case in training], pattern)
    except InputError:
        return []  # the writer tells
    weak = {patients[case.name] for case in training if case.kind != FULL}
    order = sorted({patients[case.name] for case in training} - weak)
    random.Random(seed).shuffle(order)
    if not (len(wanted) == 1 and wanted[0].isdigit()):
        unknown = sorted(set(wanted) - set(order))
        if unknown:
            raise InputError(f"--validation: these are no patients all of whose cases are full: {', '.join(unknown)}")
        chosen = set(wanted)
    else:
        count = int(wanted[0])
        if not 0 < count < len(order):
            raise InputError(f"--validation: {count} of {len(order)} fully annotated patients would leave none to "
                             f"{'train on' if count else 'validate on'}")
        chosen = set(order[:count])
    return [case.name for case in training if patients[case.name] in chosen]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="confkd mix", description=__doc__, epilog=(
        "--full and --partial hold two folders each, images and labels (or imagesTr and labelsTr), with files of the same "
        "names; several channels by nnU-Net's names (case_0000, case_0001). Formats: " + ", ".join(ENDINGS)))
    parser.add_argument("--full", required=True, type=Path, metavar="DIR")
    parser.add_argument("--partial", type=Path, metavar="DIR")
    parser.add_argument("--unlabelled", type=Path, metavar="DIR", help="images, in it or in its folder images")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", default="Mixed")
    parser.add_argument("--labels", nargs="+", metavar="NAME[=VALUE]", help="names of the labels, from the background on, of the "
                        "values 0, 1, ... or of those given; default: those in the dataset.json of --full")
    parser.add_argument("--channels", nargs="+", metavar="NAME", help="names of the channels; \"CT\" chooses nnU-Net's CT "
                        "normalisation; default: those in the dataset.json of --full, else z-score")
    parser.add_argument("--ignore-value", type=int, metavar="V", help="value of the partial labels where nothing is annotated")
    parser.add_argument("--background-value", type=int, metavar="V", help="value of the partial labels for background, where "
                        "--ignore-value is the background's own")
    parser.add_argument("--validation", nargs="+", metavar="N|PATIENT", help="fully annotated patients that validate in one "
                        "fold and never train, a number or names; default: up to five folds, in which they validate in turn")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="its first group in the name of a case is the patient; default: "
                        "a case a patient")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of --validation N")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies of images: no space, but what "
                        "writes to one writes to the other")
    args = vars(parser.parse_args(argv))
    print(summary(mix(args.pop("full"), args.pop("id"), **args)))
