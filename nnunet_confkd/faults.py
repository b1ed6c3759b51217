"""What happens when a training goes wrong: it stops with a reason and leaves a checkpoint to continue from."""
from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from nnunet_confkd.errors import TrainingError


@contextmanager
def written_whole(file: str | Path):
    """Save atomically: yield a path to write to, which replaces `file` only after it has been completely written."""
    file, aside = Path(file), Path(f"{file}.part")
    try:
        yield str(aside)
        with open(aside, "r+b") as written:  # Windows flushes only what is open for writing
            os.fsync(written.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name must reach the disk, too; Windows cannot open folders
        folder = os.open(file.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _stop(number, frame):
    raise SystemExit(128 + number)


@contextmanager
def terminable():
    """Let SIGTERM end the process in order, as Ctrl-C does: worker processes are ended and temporary files are removed.

    Clusters announce the end of a job's time by SIGTERM. A handler that somebody else has set stays. Threads other than
    the main one cannot set handlers, so nothing changes there. Forked processes end at once, as they do by default.
    """
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        _register_fork_hooks()
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


# A forked worker must not inherit the handler. Python runs a handler between two of its instructions, so a signal that
# arrives just before a wait in C is missed. multiprocessing tells the workers of a pool only once to end: one that
# misses it waits for ever, and the pool waits for it.
_mask = threading.local()


def _before_fork() -> None:
    """Hold SIGTERM back until the child handles it by default. Do nothing unless :func:`terminable` handles it now."""
    ours = signal.getsignal(signal.SIGTERM) is _stop
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if ours else None


def _after_fork() -> None:
    if getattr(_mask, "before", None) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    if getattr(_mask, "before", None) is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


@cache
def _register_fork_hooks() -> None:
    """Once, when they are first needed: hooks cannot be removed, and most programs that import this need none."""
    if hasattr(os, "register_at_fork"):  # Windows never forks
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


class Divergence:
    """Counts consecutive steps whose loss or gradient is not finite.

    With a gradient scaler (mixed precision) it is normal that the gradient overflows while the loss is finite: the
    scaler leaves the step out and lowers its scale. Such steps are counted, too, but reported only from the fifth in a
    row on.

    Args:
        limit: The training stops after so many such steps in a row.
    """

    NORMAL_BACK_OFFS = 4  # in a row

    def __init__(self, limit: int):
        self.limit, self.count, self.reported = limit, 0, False

    def look(self, values: dict[str, float], epoch: int, cases: Iterable, scaled: bool = False) -> str | None:
        """Check one training step.

        Args:
            values: The loss, its terms, and the norm of the gradient under the name "gradient".
            epoch: Number of the epoch, for the message.
            cases: Names of the cases of the batch, for the message.
            scaled: Whether a gradient scaler is in use.

        Returns:
            The warning to print, or None. In a row of such steps the first one whose loss is not finite is reported,
            and every back-off of the gradient scaler from the fifth step on.

        Raises:
            TrainingError: The limit is reached.
        """
        bad = {name: float(value) for name, value in values.items() if not math.isfinite(value)}
        if not bad:
            self.count, self.reported = 0, False
            return None
        self.count += 1
        back_off = scaled and set(bad) == {"gradient"}
        what = (f"epoch {epoch}, {', '.join(f'{name} = {value}' for name, value in bad.items())}; "
                f"cases: {', '.join(sorted(map(str, set(cases))))}")
        if self.count >= self.limit:
            raise TrainingError(
                f"{self.count} steps in a row were not finite, so the training stops ({what}). None of them has changed the network. Look "
                f"at these cases (confkd check), lower the weight of the term, or train in float32.")
        if back_off:
            if self.count <= self.NORMAL_BACK_OFFS:
                return None
            return (f"WARNING: {self.count} steps in a row are left out, because the gradient is not finite, though "
                    "the loss is. "
                    f"With mixed precision up to {self.NORMAL_BACK_OFFS} in a row are normal: {what}")
        if self.reported:
            return None
        self.reported = True
        return f"WARNING: this step is left out, because it is not finite: {what}"
