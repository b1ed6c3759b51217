"""Make one data set from images with complete masks, with partial masks, with masks of some classes, and without masks.
"""
from __future__ import annotations

import argparse
import random
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from nnunet_confkd.arguments import Parser
from nnunet_confkd.data import dicom, meanings
from nnunet_confkd.data.case_files import Case
from nnunet_confkd.data.class_sources import labels_of_sources, require_all_classes
from nnunet_confkd.data.folders import WRITTEN_BY, folder_name, preprocessed_folder, raw_folder, require_free_id
from nnunet_confkd.data.grids import Fitting, covered
from nnunet_confkd.data.images import ENDINGS, ITK, Geometry, Volume, ending_of
from nnunet_confkd.data.meanings import Labels
from nnunet_confkd.data.patients import FOLDS, is_number, notes_on_names, patients_of
from nnunet_confkd.data.raw_format import (
    Dataset,
    check_dataset,
    name_problem,
    summary,
    with_ignore,
    write_dataset,
)
from nnunet_confkd.data.segments import has_segments, read_as_label, segment_names
from nnunet_confkd.data.sources import CaseFiles, Layout, NamedFolder, Source, found, prefix_pattern, table
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.data.survey import Content, survey
from nnunet_confkd.errors import InputError, counted, some
from nnunet_confkd.processes import PROCESSES, parallel


@dataclass
class Mixture:
    """A data set that is to be written, and where it comes from.

    Attributes:
        sources: The files.
        dataset: What is written.
        notes: What the user should know.
    """
    sources: list[Source]
    dataset: Dataset
    notes: list[str]


def mix(full: Path | None, dataset_id: int, *, processes: int = PROCESSES, link: bool = False, overwrite: bool = False,
        **options: Any) -> Path:
    """Write folders of images and labels as one data set of nnU-Net.

    Args:
        full: As in :class:`nnunet_confkd.data.sources.Layout`; None if `images` or `named` are given.
        dataset_id: The 27 in Dataset027_NAME.
        processes: How many processes read labels and write cases.
        link: Whether images become hard links instead of copies.
        overwrite: Whether to replace a data set of this id and name that this function wrote.
        **options: Those of :func:`mixture`.

    Returns:
        The raw folder.

    Raises:
        InputError: With all that is wrong with the folders.

    Examples:
        >>> mix(None, 27, images=["IMAGES"], full_labels=["MASKS"], partial_labels=["SCRIBBLES"],
        ...     labels=["background", "liver"], ignore_value=0, background_value=2)  # doctest: +SKIP
        PosixPath('raw/Dataset027_Mixed')
    """
    mixed = mixture(full=full, processes=processes, **options)
    return write_dataset(mixed.dataset, dataset_id, processes, link, overwrite)


def mixture(*, name: str = "Mixed", labels: list[str] | None = None, channels: list[str] | None = None,
            ignore_value: int | None = None, background_value: int | None = None, validation: list[str] | None = None,
            patient_pattern: str | None = None, seed: int = 0, resample_labels: bool = False,
            processes: int = PROCESSES, **places) -> Mixture:
    """Find the files of a data set, and what they mean. Nothing is written.

    Args:
        name: The NAME in Dataset027_NAME.
        labels: Names of the values 0, 1, ..., from the background on, or NAME=VALUE, or NAME=SEGMENT; None: from
            dataset.json in the folder of complete masks.
        channels: Names of the channels, which choose nnU-Net's normalisation ("CT"); None: from this dataset.json, or
            channel_0, channel_1, ... (z-score).
        ignore_value: The value of voxels that are not annotated in the partial labels; None: dataset.json's "ignore".
        background_value: The value of background there, if `ignore_value` is the background's value elsewhere.
        validation: Patients that are held back to validate in the only fold: names, or one number of fully annotated
            ones. None: up to five folds, in which the fully annotated patients validate in turn.
        patient_pattern: A regular expression whose first group in the name of a case is the patient; None: each case is
            a patient of its own.
        seed: Of the choice of `validation`.
        resample_labels: Whether labels on another grid than their image are resampled (nearest neighbour).
        processes: How many processes read labels.
        **places: Those of :class:`nnunet_confkd.data.sources.Layout`.

    Returns:
        The data set. What is wrong with the values of labels is among its problems.

    Raises:
        InputError: Folders are missing or empty, or options contradict each other.
    """
    layout = Layout(**places)
    if layout.full is not None and not layout.full.is_dir():
        raise InputError(f"{layout.full}: there is no such folder")
    if layout.named and (labels or ignore_value is not None or background_value is not None):
        raise InputError("--labels, --ignore-value and --background-value are those of all sources; with --source, "
                         "each has its own: --classes NAME=VALUE ... background=VALUE ignore=VALUE")
    description = _described(layout)
    known = (labels_of_sources(layout.named) if layout.named else
             [meanings.labels_of(layout.description_folder, labels, description)] * 2)
    sources, problems, notes = found(layout)
    for source, of_source in zip((source for source in sources if source.kind != UNLABELLED), known):
        source.known = of_source
    if not any(source.cases for source in sources if source.kind == FULL) and not problems:
        raise InputError(f"{layout.roots[0]}: holds no images with labels")
    if not layout.named:
        require_all_classes(sources)
    contents = survey([label for source in sources for label in source.labels if segment_names(label) is None],
                      processes)
    described = {named.name for named in layout.named if named.classes is None}
    sources = [part for source in sources for part in _by_completeness(source, contents, source.name in described)]
    values = _interpret(sources, contents, ignore_value, background_value)
    pattern = prefix_pattern(sources, patient_pattern)
    training = [_case(source, files, resample_labels) for source in sources for files in source.cases]
    complete = {files.name for source in sources if source.kind == FULL for files in source.cases}
    held_back = [] if validation is None else _validation(training, complete, pattern, seed, validation)
    training = [case for case in training if case.label is None or case.label.file not in values]
    cases, wrong = {case.name for case in training}, list(dict.fromkeys(values.values()))
    ending = _common_ending(training, problems)
    mixed = any(source.kind != FULL for source in sources)
    names = known[0].names
    dataset = Dataset(
        name=name, channel_names=channels or _channel_names(description, training),
        labels=with_ignore(names) if mixed else names, file_ending=ending, training=training,
        annotated_classes={files.name: list(source.listed) for source in sources if source.listed
                           for files in source.cases if files.name in cases},
        complete=complete, validation=[case for case in held_back if case in cases], folds=1 if validation else FOLDS,
        patient_pattern=pattern, regions_class_order=known[0].regions,
        licence=description.get("licence", description.get("license", "unknown")),
        reference=description.get("reference", ""), roots=layout.roots, problems=[*problems, *wrong],
        more={WRITTEN_BY: "confkd mix"})
    notes += [*_notes(sources, contents, known[0]), *_notes_on_missing_files(sources)]
    if patient_pattern is None:
        names_given = (files.name.removeprefix(f"{source.name}_" if source.prefixed else "")
                       for source in sources for files in source.cases)
        notes += notes_on_names(list(dict.fromkeys(names_given)))
    if resample_labels:
        notes += _notes_on_coverage(training, contents, processes)
    return Mixture(sources, dataset, notes)


def _by_completeness(source: Source, contents: dict[Path, Content], described: bool) -> list[Source]:
    """Divide a source that has a value for voxels that are not annotated: labels that lack this value are complete.

    Args:
        source: The source.
        contents: What its labels hold.
        described: Whether its dataset.json gives the value. Otherwise the user does, and no label may hold it because
            it is wrong; then all stay partial, and the error says what they hold.
    """
    if source.known is None or not source.known.partly:
        return [source]
    voxels = {label: contents[label].voxels for label in source.labels if label in contents
              and not contents[label].named and not contents[label].problem}
    complete = {label for label, held in voxels.items() if source.known.ignore not in held}
    if len(complete) == len(voxels) and not described:
        complete = set()
    parts = {kind: [files for files in source.cases if (files.label in complete) == (kind == FULL)]
             for kind in (FULL, PARTIAL)}
    return [replace(source, kind=kind, cases=cases) for kind, cases in parts.items() if cases]


def _notes_on_coverage(training: list[Case], contents: dict[Path, Content], processes: int) -> list[str]:
    """Say which labels do not cover their image, if what lies beyond them becomes background."""
    masks = [case for case in training if case.fitting is not None and case.fitting.outside == 0
             and case.label is not None and (content := contents.get(case.label.file)) and content.geometry
             and not content.named]
    shares = parallel(_share_covered, [(case.images[0], contents[case.label.file].geometry) for case in masks],
                      processes, "comparing grids")
    short = [f"{case.label.file.name} {share:.1%}" for case, share in zip(masks, shares) if share < 1]
    return [f"note: labels that do not cover their image: {len(short)} ({some(short, 3)}). What lies beyond them "
            f"becomes background; if it may be something else, give them as partial labels"] if short else []


def _share_covered(image: Volume, label: Geometry) -> float:
    """Return which share of an image a label covers; 1 if the image cannot be read, which is told elsewhere."""
    try:
        grid = image.read().geometry
    except InputError:
        return 1.0
    return covered(label, grid) if len(label.size) == len(grid.size) else 1.0


def _described(layout: Layout) -> dict:
    """Return the dataset.json of the complete masks. Of several, the first counts; licence and reference are joined."""
    several = [meanings.described(named.folder) for named in layout.named]
    if not several:
        return meanings.described(layout.description_folder)
    texts = {key: [str(text) for one in several for text in (one.get(key) or one.get(other),) if text]
             for key, other in (("licence", "license"), ("reference", ""))}
    joined = {key: "; ".join(dict.fromkeys(found)) for key, found in texts.items() if found}
    return {key: value for one in reversed(several) for key, value in one.items()} | joined


def _interpret(sources: list[Source], contents: dict[Path, Content], ignore_value: int | None,
               background_value: int | None) -> dict[Path, str]:
    """Give each source the meaning of its labels. Return {label that holds anything else: what is wrong}."""
    problems: dict[Path, str] = {}
    for source in sources:
        known = source.known
        if known is None:
            continue
        ignored = known.ignore if ignore_value is None else ignore_value
        held = {label: contents[label] for label in source.labels if label in contents}
        plain = {label: content for label, content in held.items() if not content.named and not content.problem}
        valued = next((label for label in source.labels if not has_segments(label)), None)
        if not known.full.segments and any(map(has_segments, source.labels)):
            raise InputError(f"{source.labels[0]}: has segments, but the labels are regions, which have values only")
        if source.kind == PARTIAL and valued is not None and ignored is None:
            raise meanings.missing_ignore_value(plain, known)
        source.meaning = known.full if source.kind == FULL else known.partial(ignored if valued else None,
                                                                             background_value)
        if valued and known.by_name:
            raise InputError(f"{known.option}: {known.by_name!r} names a segment, but {valued} holds values; give "
                             f"NAME=VALUE with whole numbers")
        if source.labels and source.kind == FULL:
            _require_files_of_classes(source, known)
        missing = source.kind == PARTIAL and meanings.ignore_value_problem(plain, known, ignored)
        problems |= dict.fromkeys(plain, missing) if missing else meanings.value_problems(
            held, source.kind, source.meaning, known)
    _ask_for_exchange(problems, sources, contents, ignore_value if background_value is None else background_value)
    return problems


def _ask_for_exchange(problems: dict[Path, str], sources: list[Source], contents: dict[Path, Content],
                      marker: int | None) -> None:
    """Add a question if full labels hold a value that only partial ones should hold, and no partial label holds it."""
    partial = [contents[label].voxels for source in sources if source.kind == PARTIAL for label in source.labels
               if label in contents]
    if not partial or any(marker in voxels for voxels in partial):
        return
    for source in (source for source in sources if source.kind == FULL and marker not in source.meaning.values):
        for label in source.labels:
            if label in problems and marker in contents[label].voxels:
                problems[label] += ". Are the full and the partial labels exchanged?"


def _require_files_of_classes(source: Source, known: Labels) -> None:
    """Raise InputError if a class has a file in none of the folders with one file for each class."""
    names = {label: segment_names(label) for label in source.labels}
    held = {name.casefold() for several in names.values() for name in several or []}
    missing = [name for name, number in known.full.segments.items() if number and name not in held]
    if held and missing and all(several is not None for several in names.values()):
        folder = source.labels[0]
        raise InputError(f"{folder}: has no file of {some(missing)}; correct {known.option}, it holds "
                         f"{some(names[folder], 150)}")


def _notes(sources: list[Source], contents: dict[Path, Content], known: Labels) -> list[str]:
    if known.source:
        return ["labels: " + ", ".join(f"{name} {value}" for name, value in known.names.items()),
                *(f"note: are {one} and {other} one class? Then give both the same name"
                  for one, other in combinations(known.names, 2) if _mistyped(one, other))]
    full, scribbles = ({label: contents[label] for source in sources if source.kind == kind for label in source.labels
                      if label in contents} for kind in (FULL, PARTIAL))
    return meanings.only_in_scribbles(full, scribbles, known)


def _notes_on_missing_files(sources: list[Source]) -> list[str]:
    """Name full labels, folders of one file for each class, that lack the file of a class that others have."""
    notes = []
    for source in sources:
        held = {label: {name.casefold() for name in segment_names(label) or []} for label in source.labels
                if source.kind == FULL and label.is_dir()}
        for name, number in (source.known.full.segments if source.known and held else {}).items():
            lacking = [label for label, names in held.items() if name not in names]
            if number and 0 < len(lacking) < len(held):
                notes.append(f"WARNING: {counted(len(lacking), 'full label')} without a file of '{name}', which is "
                             f"taken to be absent there: {some(lacking, 3)}. If nobody annotated it, leave the case "
                             f"out, or give a --source for each set of classes")
    return notes


def _mistyped(one: str, other: str) -> bool:
    """Whether two names have the same letters in another order, or one of them has one letter more."""
    short, long = sorted((one.casefold(), other.casefold()), key=len)
    if len(short) == len(long):
        digits = [[letter for letter in name if letter.isdigit()] for name in (short, long)]
        return sorted(short) == sorted(long) and digits[0] == digits[1]  # rib_12 is not rib_21
    return any(long[i].isalpha() and long[:i] + long[i + 1:] == short for i in range(len(long)))


def _case(source: Source, files: CaseFiles, resample: bool) -> Case:
    images = tuple(Volume(file, reader=dicom.read_series if file.is_dir() else None) for file in files.images)
    if files.label is None:
        return Case(files.name, images, None, source.kind)
    kind, meaning, label, values = source.kind_of_cases, source.meaning, Volume(files.label), source.meaning.values
    named = has_segments(files.label)
    if named:
        reader = partial(read_as_label, values=meaning.segments, outside=meaning.outside)
        label = Volume(files.label, reader=reader)
        values = {value: value for value in (*meaning.segments.values(), meaning.outside)}
    return Case(files.name, images, label, kind, dict(values),
                Fitting(meaning.outside, named, resample, kept=source.kind == PARTIAL))


def _common_ending(training: list[Case], problems: list[str]) -> str:
    """Return the ending that most fully annotated images have, or most images if there are none.

    It is a problem if other images cannot get it.
    """
    endings = [(case, (ending_of(case.images[0].file) or ".nii.gz").lower()) for case in training]
    of_full = [ending for case, ending in endings if case.kind == FULL] or [ending for _, ending in endings]
    ending = max(sorted(set(of_full)), key=of_full.count) if of_full else ".nii.gz"
    problems += [f"{case.images[0].file}: cannot be converted to {ending}, the format of the other images"
                 for case, other in endings if other != ending and not {ending, other} <= set(ITK)]
    return ending


def _channel_names(description: dict, training: list[Case]) -> list[str]:
    """Return the names in dataset.json, or channel_0, channel_1, ... for the channels of the first case."""
    names = description.get("channel_names", description.get("modality", {}))
    if names:
        try:
            return [str(names[key]) for key in sorted(names, key=int)]
        except ValueError as error:
            raise InputError(f"dataset.json: \"channel_names\" must be the names of the channels by number, "
                             f"{{\"0\": \"T1\", \"1\": ...}}, got {names}") from error
    count = sum(len(volume.read().voxels) for volume in training[0].images) if training else 1
    return [f"channel_{i}" for i in range(count)]


# ---- validation -----------------------------------------------------------------------------------------------------

def _validation(training: list[Case], complete: set[str], pattern: str | None, seed: int,
                wanted: list[str]) -> list[str]:
    """Return the cases of the patients that are to validate.

    All cases of these patients must be fully annotated. Patients that are named may lack classes in all cases instead,
    if each voxel is annotated for the others. `complete` are the cases without ignored voxels.
    """
    try:
        patients = patients_of([case.name for case in training], pattern)
    except InputError:
        return []  # the writer reports it
    weak = {patients[case.name] for case in training if case.kind != FULL}
    order = sorted({patients[case.name] for case in training} - weak)
    lacking = sorted(weak - {patients[case.name] for case in training
                             if case.kind == FULL or case.name not in complete})
    random.Random(seed).shuffle(order)
    if not is_number(wanted, patients.values()):
        unknown = sorted(set(wanted) - {*order, *lacking})
        if unknown:
            raise InputError("--validation: these are no patients all of whose cases are full"
                             + (", or all of whose cases lack classes alone" if lacking else "")
                             + f": {some(unknown)}")
        chosen = set(wanted)
    else:
        count = int(wanted[0])
        if lacking and not order:
            raise InputError(f"--validation {count}: no patient is annotated for all classes, and a number chooses "
                             f"among such patients alone; give names, as in --validation {' '.join(lacking[:2])}")
        if not 0 < count < len(order):
            raise InputError(f"--validation: {count} of {len(order)} fully annotated patients would leave none to "
                             f"{'train on' if count else 'validate on'}")
        chosen = set(order[:count])
    return [case.name for case in training if patients[case.name] in chosen]


# ---- command line ---------------------------------------------------------------------------------------------------

class _AddSource(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        name, _, folder = values.partition("=")
        reason = name_problem(name)
        if reason or not folder:
            parser.error(f"{option_string} {values}: give NAME=FOLDER" + (f"; the name {reason}" if reason else ""))
        namespace.named = [*namespace.named, NamedFolder(name, Path(folder))]


class _AddClasses(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if not namespace.named or namespace.named[-1].classes is not None:
            parser.error(f"{option_string} {' '.join(values)}: comes after the --source whose classes these are, once")
        namespace.named = [*namespace.named[:-1], replace(namespace.named[-1], classes=values)]


def arguments() -> argparse.ArgumentParser:
    """Return the parser of `confkd mix`."""
    parser = Parser(prog="confkd mix", description=__doc__, epilog=(
        "confkd inspect FOLDER ... prints the command that fits. A FOLDER may also be files, or a pattern such as "
        "'masks/*_seg.nii.gz' or 'data/{case}/seg.nii.gz'. Several channels have nnU-Net's names (case_0000, "
        "case_0001), or a --pattern each. Formats: " + ", ".join(ENDINGS) + ", DICOM; labels also .seg.nrrd and "
        "folders with one file for each class"))
    places = parser.add_argument_group("one folder of images, and folders of labels")
    places.add_argument("--images", nargs="+", default=[], metavar="FOLDER", help="an image without a label is "
                                                                                  "unlabelled")
    places.add_argument("--full-labels", nargs="+", default=[], metavar="FOLDER", help="complete masks")
    places.add_argument("--partial-labels", nargs="+", default=[], metavar="FOLDER", help="scribbles, points, or some "
                                                                                          "slices")
    folders = parser.add_argument_group("or a folder for each kind, which holds images and labels (or imagesTr and "
                                        "labelsTr)")
    folders.add_argument("--full", type=Path, metavar="DIR", help="images and their complete masks")
    folders.add_argument("--partial", type=Path, metavar="DIR", help="images and their partial masks")
    folders.add_argument("--unlabelled", type=Path, metavar="DIR", help="images, in it or in its folder images")
    sources = parser.add_argument_group("or a folder for each source, whose labels have classes and "
                                        "values of their own")
    sources.add_argument("--source", dest="named", action=_AddSource, default=[], metavar="NAME=FOLDER",
                         help="a folder as that of --full, or of labels alone if --images is given; once for each "
                         "source")
    sources.add_argument("--classes", nargs="+", action=_AddClasses, default=argparse.SUPPRESS, metavar="NAME[=VALUE]",
                         help="the classes of the --source before, with the values 1, 2, ... or those given, or "
                         "NAME=SEGMENT; also background=VALUE,VALUE (default: 0) and ignore=VALUE (not annotated); "
                         "default: those in its dataset.json")
    patterns = parser.add_argument_group("or a folder for each patient, within these folders")
    patterns.add_argument("--pattern", nargs="+", metavar="PATTERN", help="of the images, one for each channel, as in "
                          "'{case}/T1.nii.gz'")
    patterns.add_argument("--label-pattern", metavar="PATTERN", help="of the labels, as in '{case}/seg.nii.gz'")
    parser.add_argument("--dry-run", action="store_true", help="show which label belongs to which image, and what is "
                                                               "wrong, and write nothing")
    parser.add_argument("--id", required=True, type=int, help="id of the data set to write")
    parser.add_argument("--name", default="Mixed")
    parser.add_argument("--overwrite", action="store_true", help="replace the data set of this id and name, if this "
                        "command wrote it; what was preprocessed of it goes, too")
    parser.add_argument("--labels", nargs="+", metavar="NAME[=VALUE]", help="names of the labels, from the background "
                        "on, with the values 0, 1, ... or those given, or NAME=SEGMENT; default: those in the "
                        "dataset.json of the full labels")
    parser.add_argument("--channels", nargs="+", metavar="NAME", help="names of the channels; \"CT\" chooses nnU-Net's "
                        "CT normalisation; default: those in the same dataset.json, or z-score")
    parser.add_argument("--ignore-value", type=int, metavar="V",
                        help="value of voxels that are not annotated in the partial labels; segments need none")
    parser.add_argument("--background-value", type=int, metavar="V", help="value of background in the partial labels, "
                        "if --ignore-value is the background's value elsewhere")
    parser.add_argument("--resample-labels", action="store_true", help="resample labels that are on another grid than "
                        "their image (nearest neighbour)")
    _add_other_arguments(parser)
    return parser


def _add_other_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--validation", nargs="+", metavar="N|PATIENT", help="fully annotated patients that validate "
                        "in one fold and never train: a number, or names, also of patients that lack classes alone; "
                        "default: up to five folds, in which they validate in turn")
    parser.add_argument("--patient-pattern", metavar="REGEX", help="a regular expression whose first group in the name "
                        "of a case is the patient; default: each case is a patient")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of --validation N")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--link", action="store_true", help="hard links instead of copies of images: they take no "
                        "space, but a program that writes to one writes to the other")


def main(argv: list[str], written_by: str = "confkd mix") -> None:
    """Run `confkd mix`.

    Args:
        argv: The arguments.
        written_by: What dataset.json names as the writer.
    """
    args = vars(arguments().parse_args(argv))
    dataset_id, dry_run, link, overwrite = (args.pop(key) for key in ("id", "dry_run", "link", "overwrite"))
    if not dry_run:  # what no file can change comes first
        folders = [folder / folder_name(dataset_id, args["name"]) for folder in (raw_folder(), preprocessed_folder())]
        if folders[0].exists() and not overwrite:
            raise InputError(f"the id {dataset_id} is taken by {folders[0]}; choose another --id, or replace that data "
                             f"set: --overwrite")
        require_free_id(dataset_id, tuple(folders) if overwrite else ())
    mixed = mixture(**args)
    mixed.dataset.more[WRITTEN_BY] = written_by
    print("\n".join([table(mixed.sources, whole=dry_run), *mixed.notes, ""]))
    if dry_run:
        check_dataset(mixed.dataset, args["processes"])
        print("nothing was written: this was a dry run")
        return
    print(summary(write_dataset(mixed.dataset, dataset_id, args["processes"], link, overwrite)))
