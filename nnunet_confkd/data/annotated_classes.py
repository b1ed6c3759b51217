"""Classes that are annotated in some cases and not in others: the entry "annotated_classes" of dataset.json.

    "annotated_classes": {"case_017": ["liver"], "case_018": ["liver", "spleen"]}

A case without an entry is annotated for all classes. In a case with an entry a voxel of value 0 is background *or any
class that is not listed*. A class is a name in dataset.json's "labels". With regions it is the name of a region.

A network has one output channel (*head*) for each class, of which the background is the first, or one for each region.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping

from nnunet_confkd.data.supervision import FULL, OUTSIDE, PARTIAL, UNLABELLED, summary
from nnunet_confkd.errors import InputError, did_you_mean, shown, some

CLASSES_KEY = "annotated_classes"  # the entry's key in dataset.json: {case: [class, ...]}
Listed = tuple[bool, ...]  # for each head, whether a case is annotated for it


def heads_of(labels: Mapping) -> dict[str, tuple[int, frozenset[int]]]:
    """Find the head of each class.

    Args:
        labels: Those of dataset.json.

    Returns:
        {class: (head, values in label files)}, without the background and "ignore". The heads are those of nnU-Net.

    Examples:
        >>> heads_of({"background": 0, "liver": 1, "spleen": 2, "ignore": 3})["spleen"]
        (2, frozenset({2}))
    """
    values = {name: frozenset(map(int, value)) if isinstance(value, (list, tuple)) else frozenset((int(value),))
              for name, value in labels.items() if name != "ignore"}
    foreground = {name: found for name, found in values.items() if found != {0}}
    if any(len(found) > 1 for found in values.values()):
        return {name: (head, found) for head, (name, found) in enumerate(foreground.items())}
    return {name: (min(found), found) for name, found in foreground.items()}


def annotated_classes(described: Mapping, counts: Mapping[str, Mapping[int, int]]) -> dict[str, Listed]:
    """Read the entry "annotated_classes", and check it against the labels.

    Args:
        described: The content of dataset.json.
        counts: {case: {value: voxels}} of all cases, those of the ignore label and of `OUTSIDE` included.

    Returns:
        {case: for each head whether it is listed}, of the cases that do not list all classes. The background is always
        listed.

    Raises:
        InputError: The entry has another form, names a case or a class that does not exist, lists no class, or a label
            holds a class that is not listed. The text has all of it.

    Examples:
        >>> labels = {"background": 0, "liver": 1, "spleen": 2}
        >>> described = {"labels": labels, "annotated_classes": {"case_1": ["liver"]}}
        >>> annotated_classes(described, {"case_1": {0: 90, 1: 10}, "case_2": {0: 80, 1: 10, 2: 10}})
        {'case_1': (True, True, False)}
    """
    table = described.get(CLASSES_KEY)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise InputError(f'dataset.json: "{CLASSES_KEY}" must be an object {{case: [class, ...]}}, got '
                         f"{shown(table)}")
    heads = heads_of(described["labels"])
    found, problems = {}, []
    for case, names in table.items():
        wrong = _problems_of_entry(names, heads) if case in counts else ["there is no such case"]
        wrong = wrong or _values_not_listed(counts[case], names, heads, described["labels"].get("ignore"))
        problems += [f"{case}: {text}" for text in wrong]
        if not wrong:
            found[case] = _listed(names, described["labels"], heads)
    if problems:
        raise InputError(f'dataset.json, "{CLASSES_KEY}":\n  ' + "\n  ".join(problems))
    return {case: listed for case, listed in found.items() if not all(listed)}


def _problems_of_entry(names, heads: Mapping) -> list[str]:
    """Say what is wrong with the list of one case."""
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return [f"must be a list of classes, got {shown(names)}"]
    if not names:
        return ['lists no class. List at least one, or declare the case unlabelled in "supervision"']
    return [f"'{name}' is no class in \"labels\"{did_you_mean(name, heads)}; list some of {some(heads)}"
            for name in names if name not in heads]


def _values_not_listed(counts: Mapping[int, int], names: list[str], heads: Mapping, ignore: int | None) -> list[str]:
    """Say which values a label holds that belong to no listed class."""
    allowed = frozenset((0, OUTSIDE, ignore)).union(*(heads[name][1] for name in names))
    return [f"its label has {number} voxels of value {value} ("
            + some(name for name, (_, values) in heads.items() if value in values)
            + "), which it does not list. Add the class to the list, or set these voxels to 0 in the label and "
              "preprocess again"
            for value, number in counts.items() if number and value not in allowed]


def _listed(names: Iterable[str], labels: Mapping, heads: Mapping) -> Listed:
    """Whether each head is listed. The heads of labels include the background."""
    listed = {heads[name][0] for name in names}
    number = max(head for head, _ in heads.values()) + 1
    has_regions = any(isinstance(value, (list, tuple)) and len(value) > 1 for value in labels.values())
    return tuple(head in listed or (head == 0 and not has_regions) for head in range(number))


def possible_values(labels: Mapping, listed: Listed) -> dict[int, tuple[int, ...]]:
    """Say which values a voxel can have in a complete label, in a case that is not annotated for all classes.

    These are the values that belong to the same listed classes as the voxel's own, and do not belong to the others.

    Args:
        labels: Those of dataset.json.
        listed: For each head whether the case is annotated for it.

    Returns:
        {value in the case's label: values in a complete one}, of the values that can become another one.
    """
    heads = heads_of(labels).values()

    def of(value: int) -> tuple[bool, ...]:
        return tuple(value in values for head, values in heads if listed[head])

    values = sorted(frozenset({0}).union(*(values for _, values in heads)))
    possible = {value: tuple(other for other in values if of(other) == of(value)) for value in values}
    return {value: others for value, others in possible.items() if len(others) > 1}


def unlisted_classes(described: Mapping, where: str) -> dict[str, set[str]]:
    """Return {case: classes that it is not annotated for} of the cases in "annotated_classes".

    Args:
        described: The content of dataset.json, whose form has been checked.
        where: The file, for messages.

    Raises:
        InputError: The entry names a class that does not exist.
    """
    classes, lists = set(heads_of(described["labels"])), described.get(CLASSES_KEY) or {}
    if unknown := sorted({name for names in lists.values() for name in names} - classes):
        raise InputError(f'{where}: "{CLASSES_KEY}" names {some(unknown)}, which "labels" do not have')
    return {case: classes.difference(names) for case, names in lists.items() if classes.difference(names)}


def classes_without_cases(names: Iterable[str], kinds: Mapping[str, str], hidden: Mapping[str, Listed],
                          heads: Mapping) -> list[str]:
    """Find the classes that no case is annotated for.

    Args:
        names: Names of cases.
        kinds: {case: kind}.
        hidden: Those of :func:`annotated_classes`.
        heads: Those of :func:`heads_of`.
    """
    annotated = [case for case in names if kinds[case] != UNLABELLED]
    return [name for name, (head, _) in heads.items()
            if not any(case not in hidden or hidden[case][head] for case in annotated)]


def teaching_cases(kinds: Mapping[str, str], hidden: Mapping[str, Listed], complete: Iterable[str]) -> set[str]:
    """Choose the cases that the teacher learns from, and on which annotations are simulated.

    These are the fully annotated cases. Without any, they are the cases without ignored voxels that are annotated for
    more classes than another case, whose annotations can be simulated by hiding the other classes.

    Args:
        kinds: {case: kind} of the training cases.
        hidden: Those of :func:`annotated_classes`.
        complete: Cases without ignored voxels.

    Returns:
        Their names. None if there are such cases, but a class for which none of them is annotated: the teacher could
        not learn this class.
    """
    if full := {case for case, kind in kinds.items() if kind == FULL}:
        return full
    lists = {hidden[case] for case, kind in kinds.items() if kind == PARTIAL and case in hidden}

    def teaches(listed: Listed) -> bool:
        return any(other != listed and all(mine or not theirs for mine, theirs in zip(listed, other))
                   for other in lists)

    chosen = {case for case in complete if kinds.get(case) == PARTIAL and case in hidden and teaches(hidden[case])}
    covered = [any(heads) for heads in zip(*(hidden[case] for case in chosen))]
    return chosen if covered and all(covered) else set()


def require_annotated(kinds: Mapping[str, str], hidden: Mapping[str, Listed], labels: Mapping, teachers: bool) -> None:
    """Check that the training cases of a data set with hidden classes suffice.

    Args:
        kinds: {case: kind} of the training cases.
        hidden: Those of :func:`annotated_classes`.
        labels: Those of dataset.json.
        teachers: Whether there are cases for the teacher, or there is no teacher.

    Raises:
        InputError: No case is annotated for a class, or there is a teacher that has nothing to learn from.
    """
    if without := classes_without_cases(kinds, kinds, hidden, heads_of(labels)):
        raise InputError(f'no training case is annotated for {some(without)} (dataset.json, "{CLASSES_KEY}"). Add a '
                         f"case that is, or remove the class from the labels and preprocess again.")
    if not teachers:
        raise InputError(
            f"none of the {len(kinds)} training cases is fully annotated ({summary(dict(kinds))}), and those with "
            f"more classes than others do not cover all classes. So there is no "
            f"teacher. Train without one (-tr ConfKDTrainer_partialOnly), or annotate one case for all classes.")
