"""Say what the files in folders are, and print the `confkd mix` command that fits them."""
from __future__ import annotations

import itertools
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from nnunet_confkd.arguments import Parser
from nnunet_confkd.data.case_files import is_placed_by_image
from nnunet_confkd.data.folders import require_free_id
from nnunet_confkd.data.grids import lost_header
from nnunet_confkd.data.groups import Group, grouped_files, units_below
from nnunet_confkd.data.images import ENDINGS
from nnunet_confkd.data.measures import (
    EMPTY,
    FRACTIONS,
    IMAGE,
    MASK,
    SCRIBBLES,
    UNREADABLE,
    Measure,
    markers_of,
    measured,
    tell_scribbles_from_masks,
    tell_unusable_labels,
)
from nnunet_confkd.data.mix import arguments, mixture
from nnunet_confkd.data.source_proposal import (
    LabelPlace,
    Proposal,
    background_of,
    places_of_labels,
    plain_name,
    proposal_of_other_classes,
    propose_sources,
    spellings,
    word_of,
)
from nnunet_confkd.data.survey import shares_text
from nnunet_confkd.errors import InputError, counted, grouped, some
from nnunet_confkd.processes import PROCESSES, parallel

FIRST_ID = 100  # of the data sets that are proposed; nnU-Net's own examples have lower ones
AIR = -500  # intensities below are Hounsfield units


def inspect(folders: Iterable[Path], processes: int = PROCESSES) -> list[Group]:
    """Measure all files below folders.

    Args:
        folders: The folders, or files.
        processes: How many processes read files.

    Returns:
        The files, in groups of the same place and naming.

    Raises:
        InputError: There is no such folder, or it holds no images or labels.
    """
    groups: list[Group] = []
    for folder in map(Path, folders):
        if not folder.exists():
            raise InputError(f"{folder}: there is no such folder")
        units = units_below(folder)
        if not units:
            raise InputError(f"{folder}: holds no images or labels ({', '.join(ENDINGS)}, DICOM)")
        groups += grouped_files(folder, units)
    found = parallel(measured, [(path,) for group in groups for path in group.files], processes, "reading files")
    measures = iter(found)
    for group in groups:
        group.files = {path: next(measures) for path in group.files}
        tell_unusable_labels(group.files)
    groups = _joined_classes(groups)
    for alike in _with_common_classes(groups):
        tell_scribbles_from_masks({path: measure for group in alike for path, measure in group.files.items()})
    return groups


def _with_common_classes(groups: list[Group]) -> Iterator[list[Group]]:
    """Part groups, so that those of a part have a class in common with the group of the most solid labels in it.

    The masks of a small organ would be taken for scribbles beside those of another, large one.
    """
    rest = [group for group in groups if any(measure.kind == MASK for measure in group.files.values())]
    while rest:
        solid = max(rest, key=lambda group: max(sum(measure.core.values()) for measure in group.files.values()))
        part = [group for group in rest if group is solid or _held(group) & _held(solid)]
        rest = [group for group in rest if group not in part]
        yield part


def _held(group: Group) -> set:
    return {value for measure in group.files.values() if measure.kind == MASK for value in measure.voxels} - {0}


def _joined_classes(groups: list[Group]) -> list[Group]:
    """Join groups that are files of one class each, in a folder for each case: the folders are the labels then."""
    joined: list[Group] = []
    families: dict[tuple[Path, str], list[Group]] = {}
    for group in groups:
        families.setdefault((group.root, group.pattern.rpartition("/")[0]), []).append(group)
    for (root, parent), family in families.items():
        classes = [group for group in family if not group.flat and "{case}" not in group.pattern.rpartition("/")[2]
                   and all(measure.kind in (MASK, EMPTY) and len(measure.drawn) < 2
                           for measure in group.files.values())]
        if len(classes) < 2 or len(classes) < len(family):
            joined += family
            continue
        folders = sorted({path.parent for group in classes for path in group.files})
        joined.append(Group(root, parent, False, {folder: measured(folder) for folder in folders}))
    return joined


# ---- what is printed -------------------------------------------------------------------------------------------------

def _counted(kind: str, count: int) -> str:
    """Return for example "1 image", "4 mask-like labels" or "1 empty label"."""
    what = kind if kind == IMAGE else f"{kind} file" if kind == UNREADABLE else f"{kind} label"
    return f"{count} {what}" + ("s" if count > 1 else "")


def description(group: Group) -> str:
    """Return what the files of a group hold, in a few lines."""
    kinds = Counter(measure.kind for measure in group.files.values())
    lines = [f"{group.place}: {', '.join(_counted(kind, count) for kind, count in kinds.items())}"]
    readable = [measure for measure in group.files.values() if measure.geometry is not None]
    if readable:
        lines.append(f"  size {_range(m.geometry.size for m in readable)}, "
                     f"spacing {_range(m.geometry.spacing for m in readable)} mm")
    for kind in (MASK, SCRIBBLES, EMPTY):
        held: Counter = Counter()
        for measure in group.files.values():
            held.update(measure.voxels if measure.kind == kind else {})
        if held:
            named = any(measure.named for measure in group.files.values() if measure.kind == kind)
            lines.append(f"  {'segments' if named else 'values'} ({kind}): "
                         f"{_segments_text(held) if named else shares_text(held)}")
    images = [measure for measure in group.files.values() if measure.kind == IMAGE]
    if images:
        lines.append(f"  intensities {min(m.range[0] for m in images):.4g} to {max(m.range[1] for m in images):.4g}")
    lines += [f"  {measure.problem}" for measure in group.files.values() if measure.problem][:5]
    return "\n".join(lines)


def _segments_text(held: Counter) -> str:
    return shares_text({("in no segment" if key == 0 else key): count for key, count in held.items()})


def _range(tuples: Iterable[tuple[float, ...]]) -> str:
    """Return for example "512 x 512 x 80-120"."""
    axes = itertools.zip_longest(*tuples, fillvalue=1)
    return " x ".join(_span([round(number, 3) for number in axis]) for axis in axes)


def _span(numbers: list[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


# ---- the command -----------------------------------------------------------------------------------------------------

def propose(groups: list[Group]) -> Proposal:
    """Return the arguments of `confkd mix` for these files. It has none if no command can be made."""
    images = [group for group in groups if any(measure.kind == IMAGE for measure in group.files.values())]
    by_kind = {kind: [(group, [path for path, measure in group.files.items() if measure.kind == kind])
                      for group in groups] for kind in (MASK, SCRIBBLES)}
    full = [(group, paths) for group, paths in by_kind[MASK] if paths]
    scribbles = [(group, paths) for group, paths in by_kind[SCRIBBLES] if paths]
    if not images or not full:
        return Proposal(notes=["no command: " + ("no file looks like an image" if not images else
                               "no label looks like a complete mask, and training needs at least one")])
    places = places_of_labels(groups)
    proposal = propose_sources(places, groups) or _of_equal_classes(images, full, scribbles, places)
    if min(measure.range[0] for group in images for measure in group.files.values() if measure.kind == IMAGE) < AIR:
        for words in filter(None, (proposal.words, proposal.instead, proposal.otherwise)):
            words += ["--channels", "CT"]
    unreadable = [path for group in groups for path, measure in group.files.items() if measure.kind == UNREADABLE]
    if unreadable:
        proposal.notes.append(f"note: {counted(len(unreadable), 'file')} cannot be read: {some(unreadable, 3)}")
    broken = [path for group in groups for path, measure in group.files.items() if measure.kind == FRACTIONS]
    if broken:
        proposal.notes.append(f"note: the command would stop, because of values that are no integers in "
                              f"{some(broken, 3)}")
    return proposal


def _of_equal_classes(images: list[Group], full: list, scribbles: list, places: list[LabelPlace]) -> Proposal:
    """Return the command of masks that are all annotated for the same classes."""
    proposal = Proposal(["--images", *_places([(group, list(group.files)) for group in images])])
    proposal.words += ["--full-labels", *_places(full)]
    if scribbles:
        proposal.words += ["--partial-labels", *_places(scribbles)]
    masks, drawn = ([group.files[path] for group, paths in found for path in paths] for found in (full, scribbles))
    _name_labels(proposal, masks, drawn)
    proposal.otherwise = proposal_of_other_classes(places, images)
    return proposal


def _places(found: list[tuple[Group, list[Path]]]) -> list[str]:
    """Return folders and patterns; the files themselves where a group is not of one kind."""
    places: list[str] = []
    for group, paths in found:
        others = [path for path, measure in group.files.items() if path not in paths
                  and measure.kind in (IMAGE, MASK, SCRIBBLES, UNREADABLE)]
        places += [group.place] if not others else [str(path) for path in paths]
    return list(dict.fromkeys(places))


def _name_labels(proposal: Proposal, masks: list[Measure], scribbles: list[Measure]) -> None:
    """Add --labels, --ignore-value and --background-value."""
    valued = [[measure for measure in found if not measure.named] for found in (masks, scribbles)]
    if sum(map(len, valued)) < len(masks + scribbles):
        if any(valued):
            _name_segments_and_values(proposal, [m for m in masks + scribbles if m.named], *valued)
        else:
            _name_segments(proposal, masks, scribbles)
        return
    classes = {value for measure in masks for value in measure.voxels}
    held: Counter = Counter()
    for measure in scribbles:
        held.update(measure.voxels)
    ignore = next(iter(markers_of(scribbles)), max(held, key=held.__getitem__)) if held else None
    others = sorted(set(held) - classes - {ignore})
    if ignore != 0 or len(others) > 1:  # classes that no mask has
        classes |= set(others) if ignore != 0 else set()
    values = sorted(classes, key=lambda value: (value != 0, value))
    consecutive = values == list(range(len(values)))
    names = ["background", *(f"class_{value}" for value in values[1:])]
    drawn = {frozenset(measure.drawn) for measure in masks if measure.drawn}
    if len(drawn) > 1 and all(len(of_mask) == 1 for of_mask in drawn):
        mixed = ",".join(str(value) for value in sorted(frozenset().union(*drawn)))
        proposal.notes.append(f"note: each mask holds a single one of the values {mixed}. If they mean the same class, "
                              f"give --source masks=FOLDER --classes NAME={mixed} in place of --full-labels and "
                              f"--labels")
    proposal.words += ["--labels", *(names if consecutive else [f"{n}={v}" for n, v in zip(names, values)])]
    if ignore is None:
        return
    proposal.words += ["--ignore-value", str(ignore)]
    proposal.notes.append(f"{ignore} = not annotated: it is most of what the scribble-like labels hold")
    if ignore == values[0] and others:
        proposal.words += ["--background-value", str(others[0]) if len(others) == 1 else "?"]
        proposal.notes.append(f"{others[0]} = scribbles in the background: no mask holds it" if len(others) == 1 else
                              f"which of {some(others)} marks scribbles in the background? Put it in the place of the "
                              f"question mark, and name the others in --labels")
    elif ignore == values[0]:
        proposal.notes.append("no background is annotated in the scribble-like labels; a few scribbles there would "
                              "help")


def _name_segments_and_values(proposal: Proposal, named: list[Measure], masks: list[Measure],
                              scribbles: list[Measure]) -> None:
    """Add the options of labels with values, with question marks for the classes, which have the segments' names."""
    _name_labels(proposal, masks or [Measure(MASK, voxels={0: 1})], scribbles)
    proposal.words = [re.sub(r"^class_-?\d+(?==|$)", "?", word) for word in proposal.words]
    segments = list(spellings(named).values())
    background = background_of(segments)
    proposal.notes.append(f"some labels have the segments {some(name for name in segments if name != background)}, and "
                          f"others have values. Name the classes in --labels as the segments, in the order of the "
                          f"values, in the place of the question marks")


def _name_segments(proposal: Proposal, masks: list[Measure], scribbles: list[Measure]) -> None:
    segments = list(spellings(masks + scribbles).values())
    background = background_of(segments)
    labels = [word_of("background", background) if background else "background"]
    labels += [word_of(plain_name(name), name) for name in segments if name != background]
    proposal.words += ["--labels", *labels]
    others = sorted({str(name) for measure in masks + scribbles for name in measure.drawn} - set(segments))
    if others:
        proposal.notes.append(f"note: {some(map(repr, others))} is taken for the class of the same name in other "
                              f"capitals, which do not count")
    if scribbles and background is None:
        proposal.notes.append("no segment is called background; in the scribble-like labels, a segment of this name "
                              "would help")


def free_id() -> int:
    """Return the lowest id from 100 on that is free in all of nnU-Net's folders."""
    for number in range(FIRST_ID, 1000):
        try:
            require_free_id(number)
            return number
        except InputError:
            continue
    raise InputError("all ids of data sets from 100 to 999 are taken")


def command_text(words: list[str]) -> str:
    """Return a command of several lines, one for each option."""
    lines, line = [], ["confkd", "mix"]
    for word in words:
        if word.startswith("--"):
            lines.append(" ".join(line))
            line = ["   "]
        line.append(shlex.quote(word))
    return " \\\n".join([*lines, " ".join(line)])


def missing_variables() -> str:
    """Return the line that sets the variables of nnU-Net's folders that are not set; "" if all are."""
    missing = [name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results") if not os.environ.get(name)]
    return "export " + " ".join(f'{name}="$PWD/{name}"' for name in missing) if missing else ""


def checked(words: list[str], groups: list[Group], processes: int) -> tuple[list[str], list[str], list[str]]:
    """Try what was proposed, without writing. Return the words, with what they lack, notes, and what is wrong."""
    if any(re.match(r"(background=)?\?(=|$)", word) for word in words):
        return words, [], []
    args = vars(arguments().parse_args([*words, "--id", "1", "--processes", str(processes)]))
    for key in ("id", "dry_run", "link", "overwrite"):
        args.pop(key)
    try:
        mixed = mixture(**args)
    except InputError as error:
        return words, [], [str(error)]
    measures = {path: measure for group in groups for path, measure in group.files.items()}
    notes = []
    differing = [case for case in mixed.dataset.training if case.label is not None
                 and not measures[case.label.file].named and _differs(measures, case)]
    other_grid = [case.label.file for case in differing]
    lost = [case.label.file for case in differing
            if lost_header(measures[case.label.file].geometry, measures[case.images[0].file].geometry)]
    if lost:
        return words, mixed.notes, [*mixed.dataset.problems, (
            f"labels as large as their image, but without a place: {len(lost)} ({some(lost, 3)}). Their "
            f"header was probably lost when they were saved, so do not resample them. If their voxels lie on those of "
            f"the image, copy its header, with SimpleITK in Python: label.CopyInformation(image)")]
    if other_grid:
        words = [*words, "--resample-labels"]
        notes.append(f"note: labels on another grid than their image: {len(other_grid)} ({some(other_grid, 3)}); "
                     f"look at them: the command resamples them")
    return words, [*mixed.notes, *notes], mixed.dataset.problems


def _differs(measures: dict[Path, Measure], case) -> bool:
    image, label = measures.get(case.images[0].file), measures.get(case.label.file)
    return bool(image and label and image.geometry and label.geometry
                and label.geometry.differences(image.geometry)
                and not is_placed_by_image(case, label.geometry, image.geometry))


def _to_do(words: list[str], notes: list[str]) -> str:
    """Say what is left to do before a command is run: "" if nothing is."""
    to_do = ["give the classes names"] if any(word.startswith("class_") for word in words) else []
    to_do += ["check what is said above"] if notes else []
    return f"{', and '.join(to_do)}. ".capitalize() if to_do else ""


def main(argv: list[str]) -> None:
    """Run `confkd inspect`."""
    parser = Parser(prog="confkd inspect", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="images, labels, or both")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    args = parser.parse_args(argv)
    groups = inspect(args.folders, args.processes)
    print("\n".join(description(group) for group in groups) + "\n")
    proposal = propose(groups)
    words, notes, problems = checked(proposal.words, groups, args.processes) if proposal.words else ([], [], [])
    if problems and proposal.instead:
        other = checked(proposal.instead, groups, args.processes)
        words, notes, problems = (words, notes, problems) if other[2] else other
    print("\n".join([*proposal.notes, *notes]))
    if words:
        print("\nThis command comes near, but would stop, because of:\n  " + "\n  ".join(grouped(problems)) + "\n"
              if problems else f"\n{_to_do(words, [*proposal.notes, *notes])}The command:\n")
        print("\n".join(filter(None, [missing_variables(), command_text([*words, "--id", str(free_id())])])))
    if proposal.otherwise:
        print("\nIt takes equal values for the same classes. If the folders are annotated for different organs, the "
              "command is instead:\n\n" + command_text([*proposal.otherwise, "--id", str(free_id())]))
