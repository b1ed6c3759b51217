"""What a training does when something goes wrong: it stops with a reason, and leaves a checkpoint to go on from."""
from __future__ import annotations

import math
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

from nnunet_confkd.errors import TrainingError


@contextmanager
def written_whole(file: str | Path):
    """Yields a path to write to, which then takes the place of `file`: a kill, a power cut or a full disk leaves the old one whole."""
    file, aside = Path(file), Path(f"{file}.part")
    try:
        yield str(aside)
        with open(aside, "rb") as written:
            os.fsync(written.fileno())
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name, too, must reach the disk
        folder = os.open(file.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _stop(number, frame):
    raise SystemExit(128 + number)


@contextmanager
def terminable():
    """SIGTERM, with which clusters announce their time limits, ends the process as Ctrl-C does, workers and temporary files included,
    instead of at once. Where somebody has decided otherwise already, that stays. Forked processes end at once, as ever."""
    # only the main thread may
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


# A handler in Python may miss the moment before a wait in C, or just after the fork: a worker of a pool that is told to end only once,
# as multiprocessing does, would then wait for ever, and the pool for it.
_mask = threading.local()


def _before_fork() -> None:
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _after_fork_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


class Divergence:
    """Counts consecutive steps whose loss or gradient is not finite.

    limit: after so many of them the training stops.
    """

    def __init__(self, limit: int):
        self.limit, self.count = limit, 0

    def look(self, values: dict[str, float], epoch: int, cases) -> str | None:
        """values: the loss, its terms and the norm of the gradient. Returns what to say of the first of such steps.
        Raises TrainingError at the limit."""
        bad = {name: float(value) for name, value in values.items() if not math.isfinite(value)}
        self.count = self.count + 1 if bad else 0
        if not bad:
            return None
        what = (f"epoch {epoch}, {', '.join(f'{name} = {value}' for name, value in bad.items())}; "
                f"cases: {', '.join(sorted(map(str, set(cases))))}")
        if self.count >= self.limit:
            raise TrainingError(
                f"{self.count} steps in a row were not finite, so the training stops ({what}). None of them has changed the network. Look "
                f"at these cases (confkd check), lower the weight of the term, or train in float32.")
        return f"WARNING: a step is left out, because it is not finite: {what}" if self.count == 1 else None
