"""What the commands print: durations, and nnU-Net's lines that would mislead, explained or left out."""
from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nnunet_confkd.errors import counted

# (a whole line of nnU-Net, what is printed instead; None: nothing)
LINES: list[tuple[re.Pattern, str | None]] = [(re.compile(pattern), instead) for pattern, instead in (
    # printed for each trainer of a plugin, although it is found right after
    (r"Trainer '\w+' not found in nnunetv2\.training\.nnUNetTrainer\.", None),
    (r"Searching in external trainer paths from environment variable 'nnUNet_extTrainer'\.\.\.", None),
    (r"Searching in: .*", None),
    (r"Inspecting module: \w+", None),
    (r"Found class \w+ in \w+", None),
    (r"Searching for class \w+ in folder .* with current module .*", None),
    # the default plans are no error
    (r"INFO: You are using the old nnU-Net default plan(s|ner)\..*",
     "nnU-Net's default plans are used. They are fine; for GPUs of 9 GB and more it recommends others: confkd plan "
     "-d ID -pl nnUNetPlannerResEncM"),
    (r"#{28}", None),
    # true of every CPU, where nothing is lost by it
    (r"perform_everything_on_device=True is only supported for cuda devices! Setting this to False", None),
    (r"INFO: torch\.compile disabled because .*", None),
    (r"GPU prediction completed\. (Waiting .*)", r"Prediction completed. \1"))]


def explained(line: str) -> str | None:
    """Return what is printed instead of a line; None: nothing."""
    text = re.sub(r"^\d{4}-\d\d-\d\d [\d:.]+: ", "", line.strip())  # the time in nnU-Net's log
    for pattern, instead in LINES:
        if match := pattern.fullmatch(text):
            return instead if instead is None else match.expand(instead)
    return line


class NobodyReads(BrokenPipeError):
    """Nobody reads the standard output any more, such as after `confkd train --help | head`."""


class _Explaining:
    """A stream that explains whole lines, and hands on everything else."""

    def __init__(self, stream: Any):
        self.stream, self.begun = stream, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            shown = explained(line)
            if shown is not None:
                self._hand_on(shown + "\n")
        return len(text)

    def _hand_on(self, text: str, flush: bool = False) -> None:
        try:
            self.stream.write(text)
            if flush:
                self.stream.flush()
        except BrokenPipeError as error:
            raise NobodyReads from error

    def flush(self) -> None:
        text, self.begun = self.begun, ""
        self._hand_on(text, flush=True)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def explained_output() -> Iterator[None]:
    """Explain lines of nnU-Net on the standard output of this process. Those of its children stay."""
    before = sys.stdout
    sys.stdout = explaining = _Explaining(before)
    try:
        yield
    finally:
        sys.stdout = before
        explaining.flush()


def duration(seconds: float) -> str:
    """Return a duration as text, rounded, as in "about 5 minutes".

    Examples:
        >>> duration(310)
        'about 5 minutes'
    """
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            number = seconds / size
            return f"about {number:.0f} {name}" if number >= 10 or size == 60 else f"about {number:.1f} {name}"
    return f"about {counted(max(1, round(seconds)), 'second')}"
