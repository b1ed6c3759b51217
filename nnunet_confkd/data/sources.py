"""A list of sources: files that were annotated alike, found in the layouts that people have."""
from __future__ import annotations

import filecmp
import os
import re
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunet_confkd.data.images import ENDINGS
from nnunet_confkd.data.listing import CASE, listed
from nnunet_confkd.data.meanings import Labels, Meaning
from nnunet_confkd.data.names import Named, cases_of, channel_problems, looks_like_label, matched
from nnunet_confkd.data.supervision import FULL, PARTIAL, UNLABELLED
from nnunet_confkd.errors import InputError, counted, some

IMAGES, LABELS = ("images", "imagesTr"), ("labels", "labelsTr")
ROWS = 5  # of a source, in a table that is not to show all


@dataclass(frozen=True)
class CaseFiles:
    """The files of one case.

    Attributes:
        name: Of the case.
        images: Files, or folders of DICOM slices: one for each channel, or one of several channels.
        label: A file, or a folder; None without a label.
    """
    name: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass
class Source:
    """Files that were annotated alike.

    Attributes:
        kind: "full" (each voxel of each label has a meaning), "partial" or "unlabelled".
        cases: The files.
        meaning: What the labels mean; None for unlabelled images.
        name: Of a source that was given by name; else empty.
        prefixed: Whether the names of the cases begin with it.
        known: The labels of the data set, and how this source writes them; None for unlabelled images.
    """
    kind: str
    cases: list[CaseFiles]
    meaning: Meaning | None = None
    name: str = ""
    prefixed: bool = False
    known: Labels | None = None

    @property
    def labels(self) -> list[Path]:
        """The labels of the cases."""
        return [case.label for case in self.cases if case.label is not None]

    @property
    def listed(self) -> tuple[str, ...] | None:
        """The classes that the cases are annotated for; None: all, or the images are unlabelled."""
        return None if self.kind == UNLABELLED or self.known is None else self.known.listed

    @property
    def kind_of_cases(self) -> str:
        """The kind of the cases. Those that are not annotated for all classes are partially annotated."""
        return PARTIAL if self.listed else self.kind

    @property
    def title(self) -> str:
        """The kind, and the classes if they are not all."""
        return f"{self.kind}: {', '.join(self.listed)}" if self.listed else self.kind


@dataclass(frozen=True)
class NamedFolder:
    """A source that was given by name, because its labels have values or classes of their own.

    Attributes:
        name: The name, which becomes the prefix of names of cases if two sources share one.
        folder: Holds `images` and `labels` (or `imagesTr` and `labelsTr`). Where the images are given apart, it is a
            folder, a file or a pattern of labels.
        classes: As in --classes: NAME, NAME=VALUE, NAME=VALUE,VALUE or NAME=SEGMENT. None: those of its dataset.json.
    """
    name: str
    folder: Path
    classes: list[str] | None = None

    @property
    def words(self) -> list[str]:
        """The words of a command that give this source."""
        classes = [] if self.classes is None else ["--classes", *self.classes]
        return ["--source", f"{self.name}={self.folder}", *classes]


@dataclass
class Layout:
    """What the options say about where the files are. One of `full`, `images` and `named` must be given.

    Attributes:
        full: Holds `images` and `labels` (or `imagesTr` and `labelsTr`).
        partial: As `full`.
        unlabelled: Holds images, itself or in `images` or `imagesTr`.
        images: Folders, files or patterns of the images.
        full_labels: The same of complete masks.
        partial_labels: The same of partial masks.
        pattern: One pattern with {case} for each channel, for the folders that hold images.
        label_pattern: The same for the folders that hold labels.
        named: Sources that have values and classes of their own. Either `unlabelled` or `images` may be given, too.
    """
    full: Path | None = None
    partial: Path | None = None
    unlabelled: Path | None = None
    images: list = field(default_factory=list)
    full_labels: list = field(default_factory=list)
    partial_labels: list = field(default_factory=list)
    pattern: list[str] | None = None
    label_pattern: str | None = None
    named: list[NamedFolder] = field(default_factory=list)

    @property
    def label_patterns(self) -> list[str] | None:
        """The pattern of labels as a list."""
        return None if self.label_pattern is None else [self.label_pattern]

    @property
    def description_folder(self) -> Path:
        """The folder whose dataset.json describes the data."""
        if self.named:
            return self.named[0].folder
        places = self.full_labels or self.images
        return self.full if self.full is not None else Path(places[0]) if places else Path()

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that were given."""
        if not self.images:
            folders = (*(named.folder for named in self.named), self.full, self.partial, self.unlabelled)
            return tuple(Path(folder) for folder in folders if folder is not None)
        places = [str(place) for place in (*self.images, *self.full_labels, *self.partial_labels,
                                           *(named.folder for named in self.named))]
        given = [place if Path(place).is_dir() else _fixed_part(place) for place in places]
        return tuple(Path(folder) for folder in dict.fromkeys(given))


def _fixed_part(place: str) -> str:
    """Return the folder of a file or of a pattern, up to the first part with a wildcard."""
    fixed: list[str] = []
    for part in Path(place).parent.parts:
        if any(sign in part for sign in "{*?") or "[" in part and not Path(*fixed, part).exists():
            break
        fixed.append(part)
    return str(Path(*fixed))


def found(layout: Layout) -> tuple[list[Source], list[str], list[str]]:
    """Find the files of a layout, and which label belongs to which image.

    Returns:
        The sources, what is wrong with them, and notes on what was left out.

    Raises:
        InputError: A folder is missing, or holds nothing.
    """
    if layout.named:
        if layout.full is not None or layout.partial is not None or layout.full_labels or layout.partial_labels \
                or layout.images and layout.unlabelled is not None:
            raise InputError("give either --source, or --images with its labels, or --full and --partial; only "
                             "--unlabelled or --images goes with --source")
        return _in_named_folders(layout)
    if layout.full is not None and layout.images:
        raise InputError("give either --full, --partial and --unlabelled, or --images with --full-labels and "
                         "--partial-labels")
    if layout.full is None and not layout.images:
        raise InputError("no images are given: --images FOLDER --full-labels FOLDER --partial-labels FOLDER, or --full "
                         "FOLDER, which holds images and labels")
    return _in_one_folder(layout) if layout.images else _in_three_folders(layout)


# ---- one folder of images, and folders of labels ---------------------------------------------------------------------

def _in_one_folder(layout: Layout) -> tuple[list[Source], list[str], list[str]]:
    if not layout.full_labels:
        raise InputError("--full-labels is missing: at least one image must be fully annotated")
    labels = _of_narrowest_pattern({FULL: _labels(layout, layout.full_labels),
                                    PARTIAL: _labels(layout, layout.partial_labels)})
    paths = [named.path for kind in labels for named in labels[kind]]
    images = _images(layout, paths)
    problems = [f"{path}: is given as a full label and as a partial one; give patterns, as in --full-labels "
                f"'masks/*_seg.nii.gz'" for path in dict.fromkeys(paths) if paths.count(path) > 1]
    cases = cases_of(images, [*labels[FULL], *labels[PARTIAL]])
    problems += _channel_problems(cases, images, layout)
    sources, label_of = [], {}
    for kind, named in labels.items():
        places = [*layout.full_labels, *layout.partial_labels]
        option = f"--{kind}-labels '" if len(places) > 1 or not Path(places[0]).is_dir() else ""
        fits, wrong = matched(cases, named, some(layout.images), option)
        problems += wrong
        problems += [f"{cases[case][0]}: has a full label, {label_of[case].path}, and a partial one, {label.path}; "
                     f"leave one of them out" for case, label in fits.items()
                     if case in label_of and label.path != label_of[case].path]
        label_of.update(fits)
        if named:
            sources.append(Source(kind, [CaseFiles(case, tuple(cases[case]), label.path)
                                         for case, label in fits.items()]))
    if not any(source.kind == FULL and source.cases for source in sources):
        problems += _exchanged(layout, images, labels[FULL])
    rest = _rest(cases, label_of)
    return [*sources, *rest], problems, _notes_on_leftovers(rest, cases)


def _notes_on_leftovers(rest: list[Source], cases: Container[str]) -> list[str]:
    """Ask whether unlabelled images are labels, if they are named as another case with a word behind it."""
    found = [case.images[0] for source in rest for case in source.cases
             if any(case.name[:end.start()] in cases for end in re.finditer(r"[_\-. ](?=\D)", case.name))]
    return [f"WARNING: {counted(len(found), 'image')} without a label, and named as another case with a word behind "
            f"it: {some(found, 3)}. If these are labels, move them away"] if found else []


def _exchanged(layout: Layout, images: list[Named], labels: list[Named]) -> list[str]:
    """Ask whether images and full labels are exchanged, if the names of the images are those of labels of the others.
    """
    fits, _ = matched(cases_of(labels, images), images, "")
    question = "the names are like those of labels; are --images and --full-labels exchanged?"
    return [f"{some(layout.images)}: {question}"] if fits else []


def _of_narrowest_pattern(labels: dict[str, list[Named]]) -> dict[str, list[Named]]:
    """Take files that fit the patterns of several kinds from all but the one that leaves the shortest name.

    `{case}.nrrd` also fits the files of `{case}_scribbles.nrrd`.
    """
    shortest: dict[Path, int] = {}
    for label in (label for of_kind in labels.values() for label in of_kind if label.exact):
        shortest[label.path] = min(len(label.name), shortest.get(label.path, len(label.name)))
    return {kind: [label for label in of_kind if not label.exact or len(label.name) == shortest[label.path]]
            for kind, of_kind in labels.items()}


def _images(layout: Layout, labels: Collection[Path]) -> list[Named]:
    """Find the images, in folders that may hold labels, too."""
    images = [image for image in listed(layout.images, layout.pattern) if image.path not in labels]
    if not images:
        raise InputError(f"{some(layout.images)}: holds no images ({', '.join(ENDINGS)}, folders of DICOM slices)")
    return images


def _channel_problems(cases: Mapping[str, list[Path]], images: list[Named], layout: Layout) -> list[str]:
    return channel_problems(cases, images, layout.pattern or [place for place in layout.images if CASE in str(place)])


def _rest(cases: Mapping[str, list[Path]], labelled: Container[str], name: str = "") -> list[Source]:
    """Return a source of the cases without a label, if there are any."""
    rest = [CaseFiles(case, tuple(files)) for case, files in cases.items() if case not in labelled]
    return [Source(UNLABELLED, rest, name=name)] if rest else []


def _labels(layout: Layout, places: list) -> list[Named]:
    """Find labels. In a folder that holds the images, too, they are the files whose names tell."""
    of_images = {Path(place).resolve() for place in layout.images}
    labels = []
    for place in places:
        found_there = listed([place], layout.label_patterns, labels=True)
        shared = Path(place).is_dir() and Path(place).resolve() in of_images
        labels += [label for label in found_there if label.exact or not shared or looks_like_label(label.name)]
    if places and not labels:
        raise InputError(f"{some(places)}: holds no labels ({', '.join(ENDINGS)}, .dcm, folders with one file for "
                         f"each class)")
    return labels


# ---- a folder for each kind ------------------------------------------------------------------------------------------

def _in_three_folders(layout: Layout) -> tuple[list[Source], list[str], list[str]]:
    sources, problems = [], []
    for kind, folder in ((FULL, layout.full), (PARTIAL, layout.partial), (UNLABELLED, layout.unlabelled)):
        if folder is not None:
            source, wrong = _of_one_kind(Path(folder), kind, layout, _files_of_a_case(sources))
            sources.append(source)
            problems += wrong
    return sources, problems, _leave_out_labelled(sources)


def _files_of_a_case(sources: list[Source]) -> int | None:
    """Return how many images each case has; None if there are no cases, or if they differ."""
    numbers = {len(case.images) for source in sources for case in source.cases}
    return numbers.pop() if len(numbers) == 1 else None


def _leave_out_labelled(sources: list[Source]) -> list[str]:
    """Take the images of labelled cases from the unlabelled ones. Return a note that says so."""
    notes = []
    labelled: dict[str, list[CaseFiles]] = {}
    for source in sources:
        if source.kind != UNLABELLED:
            for case in source.cases:
                labelled.setdefault(case.name, []).append(case)
    for source in sources:
        if source.kind == UNLABELLED:
            twice = [case for case in source.cases
                     if any(_same(case, other) for other in labelled.get(case.name, []))]
            source.cases = [case for case in source.cases if case not in twice]
            if twice:
                notes.append(f"note: {len(twice)} unlabelled images are left out, because they are the images of "
                             f"labelled cases: {some(case.name for case in twice)}")
    return notes


def _same(one: CaseFiles, other: CaseFiles) -> bool:
    """Whether two cases have the same images."""
    pairs = list(zip(one.images, other.images))
    return len(one.images) == len(other.images) and all(
        a.is_file() and b.is_file() and filecmp.cmp(a, b, shallow=False) for a, b in pairs)


# ---- a folder for each source ---------------------------------------------------------------------------------------

def _in_named_folders(layout: Layout) -> tuple[list[Source], list[str], list[str]]:
    names = [named.name for named in layout.named]
    again = sorted({name for name in names if [*map(str.lower, names), UNLABELLED].count(name.lower()) > 1})
    if again:
        raise InputError(f"--source: there are two sources of the name {some(again)}; give each another name")
    if layout.images:
        sources, problems = _labels_in_named_folders(layout)
        return sources, problems, _with_prefixes(sources)
    sources, problems = [], []
    given = [(named.name, named.folder, FULL) for named in layout.named]
    if layout.unlabelled is not None:
        given.append((UNLABELLED, layout.unlabelled, UNLABELLED))
    for name, folder, kind in given:
        source, wrong = _of_one_kind(Path(folder), kind, layout, _files_of_a_case(sources))
        source.name = name
        sources.append(source)
        problems += wrong
    return sources, problems, [*_leave_out_labelled(sources), *_with_prefixes(sources)]


def _labels_in_named_folders(layout: Layout) -> tuple[list[Source], list[str]]:
    """Find the cases of sources whose folders hold labels, of images that are given apart."""
    labels = _of_narrowest_pattern({named.name: _labels(layout, [named.folder]) for named in layout.named})
    found_there = [label for of_source in labels.values() for label in of_source]
    images = _images(layout, {label.path for label in found_there})
    cases = cases_of(images, found_there)
    sources, problems = [], _channel_problems(cases, images, layout)
    for name, of_source in labels.items():
        fits, wrong = matched(cases, of_source, some(layout.images), f"--source '{name}=" if len(labels) > 1 else "")
        problems += wrong
        sources.append(Source(FULL, [CaseFiles(case, tuple(cases[case]), label.path) for case, label in fits.items()],
                              name=name))
    labelled = {case.name for source in sources for case in source.cases}
    return [*sources, *_rest(cases, labelled, UNLABELLED)], problems


def _with_prefixes(sources: list[Source]) -> list[str]:
    """Put the names of the sources before those of all cases, if two sources share a name. Return a note on it."""
    count = Counter(name for source in sources for name in {case.name.lower() for case in source.cases})
    shared = list(dict.fromkeys(case.name for source in sources for case in source.cases
                                if count[case.name.lower()] > 1))
    if not shared:
        return []
    for source in sources:
        source.prefixed = True
        source.cases = [replace(case, name=f"{source.name}_{case.name}") for case in source.cases]
    return [f"note: {len(shared)} names are in several sources ({some(shared, 3)}), so the name of each case begins "
            f"with that of its source. Cases of one name count as one patient, unless --patient-pattern says otherwise"]


def prefix_pattern(sources: Iterable[Source], pattern: str | None) -> str | None:
    """Return the patient pattern for the names that sources have given to their cases.

    Args:
        sources: Those of :func:`found`.
        pattern: A patient pattern for the names in the folders; None: each case is a patient. Cases of the same name in
            several sources are cases of the same patient then.
    """
    # the longest name first: of "heart" and "heart_2" the shorter one also begins the cases of the other
    names = sorted((source.name for source in sources if source.prefixed), key=len, reverse=True)
    prefixes = [re.escape(name) for name in names]
    if not prefixes:
        return pattern
    pattern = pattern or ".+"
    try:
        groups = re.compile(pattern).groups
    except re.error:
        return pattern  # patients_of says what is wrong with it
    flags = re.match(r"(?:\(\?[aimsux]+\))?", pattern)[0]  # such as (?i), which must come first
    rest = re.sub(r"^(\((?:\?P<\w+>)?)?(?:\^|\\A)", r"\1", pattern[len(flags):])  # names begin with the prefix now
    return f"{flags}(?:{'|'.join(prefixes)})_(?:{rest if groups else f'({rest})'})"


def _of_one_kind(folder: Path, kind: str, layout: Layout, channels: int | None = None) -> tuple[Source, list[str]]:
    """Find the cases of a folder; `channels` is how many files a labelled case has, if that is known."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    images = next((folder / name for name in IMAGES if (folder / name).is_dir()),
                  folder if kind == UNLABELLED else None)
    labels = next((folder / name for name in LABELS if (folder / name).is_dir()), None)
    if layout.pattern:
        images, labels = folder, folder if layout.label_pattern else labels
    if images is None or labels is None and kind != UNLABELLED:
        raise InputError(f"{folder}: needs two folders, \"images\" and \"labels\" (or \"imagesTr\" and \"labelsTr\"); "
                         f"for other layouts: --images with --full-labels and --partial-labels, or --pattern")
    image_files = listed([images], layout.pattern)
    if not image_files:
        raise InputError(f"{images}: holds no images ({', '.join(ENDINGS)}, folders of DICOM slices)")
    if kind == UNLABELLED:
        cases = cases_of(image_files)
        if channels == 1 and len(cases) == 1 and not layout.pattern:
            # scan_0000, scan_0001, ...: the numbers are those of cases, and not of channels
            cases = {image.name: [image.path] for image in image_files}
        return Source(kind, [CaseFiles(name, tuple(files)) for name, files in cases.items()]), _channel_problems(
            cases, image_files, layout)
    label_files = listed([labels], layout.label_patterns, labels=True)
    cases = cases_of(image_files, label_files)
    fits, problems = matched(cases, label_files, str(images))
    without = [f"{file}: has no label in {labels}" for case, files in cases.items() if case not in fits
               for file in files]
    return Source(kind, [CaseFiles(case, tuple(cases[case]), label.path) for case, label in fits.items()]), [
        *_channel_problems(cases, image_files, layout), *without, *problems]


# ---- what was matched ------------------------------------------------------------------------------------------------

def table(sources: Iterable[Source], whole: bool = False) -> str:
    """Return which label belongs to which image, as a table.

    Args:
        sources: The sources.
        whole: Whether to list all cases instead of the first ones of each kind.
    """
    sources = list(sources)
    paths = [path for source in sources for case in source.cases for path in (*case.images, case.label) if path]
    common = Path(os.path.commonpath([path.resolve().parent for path in paths])) if paths else Path()
    rows = [("case", "kind", "images", "label")]
    for source in sources:
        shown = source.cases if whole else source.cases[:ROWS]
        rows += [(case.name, source.title, some((_relative(path, common) for path in case.images), 2),
                  _relative(case.label, common) if case.label else "-") for case in shown]
        if len(shown) < len(source.cases):
            rows.append((f"... and {len(source.cases) - len(shown)} more", source.title, "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([f"in {common}:", *lines])


def _relative(path: Path, folder: Path) -> str:
    path = path.resolve().parent / path.name  # a link keeps its name
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
