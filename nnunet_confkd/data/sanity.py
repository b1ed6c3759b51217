"""What `confkd check` warns of, because it is possible and seldom meant: it compares the cases with each other.

Nothing is read here. :mod:`nnunet_confkd.data.check_cases` has measured the cases.
"""
from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from nnunet_confkd.data.check_cases import CaseContent, CaseFiles
from nnunet_confkd.data.check_report import Report
from nnunet_confkd.data.raw_format import label_values
from nnunet_confkd.data.scribbles import suspects
from nnunet_confkd.data.supervision import FULL, PARTIAL
from nnunet_confkd.errors import counted, some

Folds = list[dict[str, list[str]]]  # of splits_final.json
SHOWN = 5  # how many files a warning names
OUTLIERS = 0.1  # of the cases may differ from the others, or one case; if more do, there is no rule that they break
FEWEST_GRIDS, FEWEST_SIDES = 5, 10  # with fewer cases there is nothing to compare with
CLOSE, APART = np.cos(np.radians(30)), np.cos(np.radians(45))  # of directions
# a class is on one side if its distance from the middle is so many times its spread, and such a share of the image
ONE_SIDED, ASIDE = 3.5, 0.12
AXES = ("left and right", "front and back", "top and bottom")  # of x, y, z


def warn_of_cases(files: Mapping[str, CaseFiles], contents: Mapping[str, CaseContent], kinds: Mapping[str, str],
                  report: Report, predicted: Container[str] = ()) -> None:
    """Warn of labels and grids that are not like those of the other cases.

    Args:
        files: {training case: its files}.
        contents: {training case: what they hold}.
        kinds: {case: kind} of the cases whose labels can be used.
        report: It gets the warnings.
        predicted: Cases whose labels a model has predicted. They are no scribbles, however little they hold.
    """
    full, partial = ({case: content for case, content in contents.items() if kinds.get(case) == kind}
                     for kind in (FULL, PARTIAL))
    drawn_full, drawn_partial = ({case: content for case, content in of.items() if case not in predicted}
                                 for of in (full, partial))
    _warn_of_scribbles(drawn_full, drawn_partial, report)
    _warn_of_empty_labels(files, full, report)
    _warn_of_orientations(files, contents, report)
    _warn_of_sides(files, full, report)


# ---- labels ---------------------------------------------------------------------------------------------------------

def _warn_of_scribbles(full: Mapping[str, CaseContent], partial: Mapping[str, CaseContent], report: Report) -> None:
    """Warn of cases whose labels look like scribbles though all, or nearly all, of their voxels count as annotated."""
    shapes = {case: content.shape for case, content in [*full.items(), *partial.items()] if content.shape is not None}
    scribbles = suspects(shapes)
    for cases, text, remedy in (
            (full, "fully annotated cases look like scribbles and not like complete masks",
             "give such cases to confkd mix as --partial, with --ignore-value 0 and the --background-value of the "
             "scribbles in the background"),
            (partial, "partially annotated cases look like scribbles, but nearly all their voxels count as annotated",
             "write the data set again: confkd mix --ignore-value 0, with the --background-value of the scribbles in "
             "the background")):
        if found := {case: reason for case, reason in scribbles.items() if case in cases}:
            listed = some((f"{case} ({reason})" for case, reason in found.items()), SHOWN)
            report.warnings.append(
                f"{len(found)} of {len(cases)} {text}: {listed}. Look at them. Where 0 means \"not annotated\", "
                f"training would take it for background: {remedy}")


def _warn_of_empty_labels(files: Mapping[str, CaseFiles], full: Mapping[str, CaseContent], report: Report) -> None:
    """Warn of fully annotated cases without any foreground: often nobody has annotated them yet."""
    empty = [str(files[case].label) for case, content in full.items()
             if not any(count for value, count in content.counts.items() if value)]
    if empty:
        ignore = report.labels.get("ignore")
        remedy = (f"write the ignore label, {ignore}, into all of their voxels" if ignore is not None else
                  "take their images out, or give them to confkd mix without a label")
        report.warnings.append(
            f"{len(empty)} of {len(full)} fully annotated cases have an empty label, background everywhere: "
            f"{some(empty, SHOWN)}. Training takes all of their voxels for background. If these images really show "
            f"none of the classes, this is right; if they are not annotated, {remedy}")


def warn_of_classes(files: Mapping[str, CaseFiles], folds: Folds, written: bool, report: Report) -> None:
    """Warn of classes that the teacher cannot learn, or that the student cannot learn from partial labels.

    Args:
        files: {training case: its files}.
        folds: The folds of splits_final.json, or those that the trainer will write.
        written: Whether they are those of the file.
        report: Its cases and totals tell what is annotated. It gets the warnings.
    """
    cases, totals = report.cases, report.totals
    parts = {"": list(cases), **{str(k): fold["train"] for k, fold in enumerate(folds)}}  # "": all cases
    full = {part: [cases[case] for case in names if cases[case]["kind"] == FULL] for part, names in parts.items()}
    partial = [case for case, described in cases.items() if described["kind"] == PARTIAL]
    for name in totals["all"]["voxels"]:
        without = [part for part, of_part in full.items() if of_part and not any(c["voxels"][name] for c in of_part)]
        holding = [str(files[case].label) for case in partial if cases[case]["voxels"][name]]
        if without and name != "background":
            of_folds = f" of fold {some(without)}" + ("" if written else " that the trainer will write")
            report.warnings.append(
                f"class {name}: annotated in no fully annotated training case{'' if without[0] == '' else of_folds}"
                f"{_only_in(holding) if without[0] == '' else ''}; the teacher cannot learn it, and takes it for "
                f"background. Annotate it completely in one of them" + (
                    ". If it is no class but scribbles in the background, write the data set again: confkd mix "
                    "--background-value" if without[0] == "" and holding else ""))
        if partial and not holding:
            what, remedy = "it", "annotate it in some of them"
            if name == "background":
                what, remedy = "what is background", "draw some scribbles in the background, too"
            report.warnings.append(
                f"class {name}: annotated nowhere among the partial cases; the student learns {what} from the full "
                f"ones alone. If they show it, {remedy}: {some((files[case].label for case in partial), SHOWN)}")


def _only_in(holding: list[str]) -> str:
    if not holding:
        return ""
    return f", but in {counted(len(holding), 'partial case')} ({some(holding, SHOWN)})"


# ---- copies ---------------------------------------------------------------------------------------------------------

def check_copies(files: Mapping[str, CaseFiles], contents: Mapping[str, CaseContent],
                 test_contents: Mapping[str, CaseContent], patients: Mapping[str, str], folds: Folds,
                 report: Report) -> None:
    """Warn of equal images. They are an error if a fold trains on one and validates on the other.

    Args:
        files: {training case: its files}.
        contents: {training case: what they hold}.
        test_contents: The same of the test cases.
        patients: {case: patient}; a case that is not in it is a patient of its own.
        folds: Those of splits_final.json.
        report: It gets the warnings and errors.
    """
    groups: dict[str, tuple[list[str], list[str]]] = {}  # (training cases, test cases) of the same image
    for is_test, results in enumerate((contents, test_contents)):
        for case, content in results.items():
            if content.digest is not None:
                groups.setdefault(content.digest, ([], []))[is_test].append(case)
    for training, test in groups.values():
        apart = [k for k, fold in enumerate(folds) if all(set(training) & set(fold[side]) for side in ("train", "val"))]
        images = some((files[case].images[0] for case in training), SHOWN)
        if len(training) > 1 and apart:
            report.errors.append(f"the images of {some(training)} are identical ({images}), and fold {some(apart)} "
                                 f"trains and validates on them; keep them on one side, or remove all but one")
        elif len(training) > 1:
            several = len({patients.get(case, case) for case in training}) > 1
            report.warnings.append(
                f"the images of {some(training)} are identical{', though of several patients' if several else ''} "
                f"({images}). Is one a copy by mistake? Remove it with its label, or find the right image")
        if len(test) > 1 or test and training:
            report.warnings.append(f"test: the images of {some(test)} (test)" + (
                f" and {some(training)} (training)" if training else "") + " are identical; remove them from the test "
                "cases, because they would be counted twice or have been trained on")


# ---- orientations and sides -----------------------------------------------------------------------------------------

def _warn_of_orientations(files: Mapping[str, CaseFiles], contents: Mapping[str, CaseContent], report: Report) -> None:
    """Warn of images whose axes point elsewhere than those of nearly all others."""
    directions = {case: np.reshape(content.grid.direction, (3, 3)) for case, content in contents.items()
                  if content.grid is not None and len(content.grid.size) == 3}
    usual, outliers = orientation_outliers(directions)
    if outliers:
        listed = some((f"{files[case].images[0]} ({axes_text(directions[case])})" for case in outliers), SHOWN)
        report.warnings.append(
            f"{len(outliers)} of {len(directions)} training images are stored in another orientation than the others "
            f"({axes_text(directions[usual])}): {listed}. nnU-Net does not turn images, so it sees these mirrored or "
            f"turned. Bring them and their labels into the orientation of the others, for example with "
            f"SimpleITK.DICOMOrient(image, \"{_code(directions[usual])}\"), and correct the header if it is wrong")


def orientation_outliers(directions: Mapping[str, np.ndarray]) -> tuple[str, list[str]]:
    """Find the cases whose axes point elsewhere than those of nearly all others.

    Args:
        directions: {case: cosines, (3, 3)}. Each column is an axis of the voxels.

    Returns:
        A case that is oriented as most are, and the cases an axis of which is more than 45 degrees away from its.
        There are none if there are few cases, or if so many differ that no orientation is usual.
    """
    names = list(directions)
    if len(names) < FEWEST_GRIDS:
        return "", []
    axes, inverse = np.unique(np.round(np.stack([directions[name] for name in names]), 3), axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    numbers = np.bincount(inverse)
    alike = np.stack([np.einsum("kij,ij->kj", axes, one).min(1) for one in axes])
    usual = int(np.argmax((alike >= CLOSE) @ numbers))
    outliers = [name for name, kind in zip(names, inverse) if alike[usual, kind] < APART]
    return names[int(np.argmax(inverse == usual))], outliers if len(outliers) <= _most(len(names)) else []


def axes_text(direction: np.ndarray) -> str:
    """Return where the axes x, y and z of the voxels point, for example "axes to L, P, S"."""
    return f"axes to {', '.join(_code(direction))}"


def _code(direction: np.ndarray) -> str:
    import SimpleITK as sitk

    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(np.ravel(direction).tolist())


def _most(total: int) -> int:
    """Return how many of the cases may differ from the others."""
    return max(1, int(OUTLIERS * total))


def _warn_of_sides(files: Mapping[str, CaseFiles], full: Mapping[str, CaseContent], report: Report) -> None:
    """Warn of classes that are on the other side than in nearly all other fully annotated cases."""
    found: dict[str, dict[str, list[str]]] = {}
    full = {case: content for case, content in full.items() if content.shape and content.grid}
    names = {value: name for name, values in report.labels.items()
             for value in label_values({name: values}) if not isinstance(values, list)}
    for value in sorted({value for content in full.values() for value in content.shape.volumes}):
        for case, axis in mirrored({case: middles(content, value) for case, content in full.items()
                                    if value in content.shape.volumes}).items():
            found.setdefault(case, {}).setdefault(AXES[axis], []).append(names.get(value, f"value {value}"))
    if found:
        listed = some((f"{files[case].label} ({'; '.join(f'{axis}: {some(classes)}' for axis, classes in of.items())})"
                       for case, of in found.items()), SHOWN)
        report.warnings.append(
            f"{len(found)} of {len(full)} fully annotated cases have classes on the other side than the others: "
            f"{listed}. Look at them: are the labels of two sides exchanged, is the image mirrored, or is the "
            f"direction in its header wrong? Correct the label, or image and label")


def middles(content: CaseContent, value: int) -> np.ndarray:
    """Return where the middle of a class lies, seen from the middle of the image and of the whole foreground.

    Returns:
        (2, 3) or (2, 2), along the axes x, y, z of the patient. The first row is in shares of the image's size, the
        second one in edges of a cube as large as the foreground, so that large and small patients can be compared.
    """
    grid, shape = content.grid, content.shape
    axes = np.reshape(grid.direction, (len(grid.size),) * 2) * np.asarray(grid.spacing)
    total, size = sum(shape.volumes.values()), np.asarray(grid.size)
    of_foreground = sum(np.asarray(shape.centers[other]) * volume for other, volume in shape.volumes.items()) / total
    center = np.asarray(shape.centers[value])
    edge = (total * np.prod(grid.spacing)) ** (1 / len(size))
    return np.stack([axes @ (center[::-1] - (size - 1) / 2) / (np.abs(axes) @ size),
                     axes @ (center - of_foreground)[::-1] / edge])


def mirrored(places: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Find the cases in which a class is on the other side than in nearly all others.

    The median and the median absolute deviation say where a class usually is. It has a side if its distance from the
    middle is more than 3.5 times its spread. A case is mirrored if the class is about as far on the other side. All
    other cases must have it clearly on the usual side: where there is anything in between, the side is no rule.

    Args:
        places: {case: what :func:`middles` returns}.

    Returns:
        {case: axis}. There are none if there are few cases, or if more than a tenth of them would be mirrored.
    """
    names = list(places)
    if len(names) < FEWEST_SIDES or len({place.shape for place in places.values()}) > 1:
        return {}
    values = np.stack([places[name] for name in names])
    usual = np.median(values, axis=0)
    spread = 1.4826 * np.median(np.abs(values - usual), axis=0)  # the standard deviation of a normal distribution
    distance = np.maximum(np.abs(usual), 1e-9)
    sides = values * np.sign(usual) / distance  # 1: as usual, -1: mirrored
    one_sided = (distance > ONE_SIDED * spread) & (distance >= np.array([[ASIDE], [1e-6]]))
    found = (sides < -0.5) & (sides > -1 - np.maximum(0.5, 2 * spread / distance))
    one_sided &= (found | (sides > 0.25)).all(0) & (found.sum(0) <= _most(len(names)))
    return {name: int(np.argwhere(where)[0, -1]) for name, where in zip(names, found & one_sided) if where.any()}
