"""The errors that carry their reason in their text. The command line prints it without a traceback; any other exception is a
fault of the program."""
import json
from collections.abc import Callable, Iterable


class InputError(ValueError):
    """What the user gave does not allow what was asked for. The text names the file, what is wrong and what to do."""


class TrainingError(RuntimeError):
    """A training cannot go on. The text says why, and what is left to go on from."""


def shown(value, as_text: Callable = json.dumps, longest: int = 200) -> str:
    """A value for a message."""
    try:
        text = as_text(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= longest else text[:longest] + " ..."


def some(values: Iterable, limit: int = 10) -> str:
    """The first of the values, and how many more there are."""
    values = [str(value) for value in values]
    return ", ".join(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")
