"""The errors whose text is meant for users, and how values are written in messages.

The command line prints the text of these errors without a traceback. Any other exception is a fault of the program.
"""
import difflib
import json
from collections.abc import Callable, Iterable
from functools import partial


class InputError(ValueError):
    """The input does not allow what was asked for. The text names the file, what is wrong and what to do.

    Examples:
        >>> try:
        ...     raise InputError("case_1.nii.gz: has no label. Write one, or take the image out.")
        ... except InputError as error:
        ...     print(error)
        case_1.nii.gz: has no label. Write one, or take the image out.
    """


class TrainingError(RuntimeError):
    """A training cannot go on. The text says why, and which checkpoint it can continue from.

    Examples:
        >>> isinstance(TrainingError("the loss is not finite; continue with --c"), RuntimeError)
        True
    """


_as_json = partial(json.dumps, ensure_ascii=False)


def shown(value, as_text: Callable = _as_json, longest: int = 200) -> str:
    """Return a value as text for a message, cut after `longest` characters."""
    try:
        text = as_text(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[:longest] + " ..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question for the known name that is most like an unknown one, or nothing.

    Examples:
        >>> "unknown class 'livr'" + did_you_mean("livr", ["liver", "kidney"])
        "unknown class 'livr' (did you mean 'liver'?)"
    """
    return "".join(f" (did you mean '{close}'?)" for close in difflib.get_close_matches(name, list(known), 1))


def some(values: Iterable, limit: int = 10) -> str:
    """Return the first `limit` values as text, and how many more there are.

    Examples:
        >>> some(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")


def grouped(problems: Iterable[str], least: int = 5) -> list[str]:
    """Make one line of problems that are equal but for the file that they begin with. The order stays.

    Args:
        problems: Texts, each of which begins with a file and a colon.
        least: How many equal problems become one line.

    Examples:
        >>> grouped(["a.png: is empty", "b.png: is empty"], least=2)
        ['2 files: is empty (a.png, b.png)']
    """
    parts = [problem.partition(": ") for problem in problems]
    files: dict[str, list[str]] = {}
    for file, _, text in parts:
        files.setdefault(text, []).append(file)
    lines: dict[str, None] = {}
    for file, colon, text in parts:
        several = files[text] if text else []
        many = len(several) >= least
        lines[f"{len(several)} files: {text} ({some(several)})" if many else file + colon + text] = None
    return list(lines)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Examples:
        >>> counted(1, "epoch"), counted(12, "epoch")
        ('1 epoch', '12 epochs')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"
