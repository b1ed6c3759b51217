"""Work in several processes, and how SIGTERM and Ctrl-C end it."""
from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from linecache import getline
from multiprocessing import get_context, parent_process

from tqdm import tqdm

from nnunet_confkd.errors import InputError

FORK = re.compile(r"\bos\.fork(pty)?\(|\b_?fork_exec\(")  # in a line of code
PROCESSES = min(8, os.cpu_count() or 1)


def parallel(function: Callable, tasks: list[tuple], processes: int, text: str) -> list:
    """Compute [function(*task) for task in tasks] in several processes, with a progress bar on a terminal.

    tqdm's process_map cannot be used: it starts the workers without an initializer of ours, and Ctrl-C can break into
    it.

    Args:
        function: It must be importable by the workers, and so must be what it takes and returns.
        tasks: The arguments of each call.
        processes: With one process, or one task, all is computed in this process.
        text: What is done, for the progress bar.

    Raises:
        InputError: A worker was killed. Errors of `function` are raised as they are.

    Examples:
        >>> parallel(max, [(1, 2), (4, 3)], processes=1, text="comparing")
        [2, 4]
    """
    if processes <= 1 or len(tasks) <= 1:
        return [function(*task) for task in tqdm(tasks, text, disable=None)]
    with tqdm(total=len(tasks), desc=text, disable=None) as bar, _signals_held_back() as handle_signals:
        pool = ProcessPoolExecutor(min(processes, len(tasks)), get_context("spawn"), _start_worker)
        futures, results = [], []
        try:
            for task in tasks:
                futures.append(pool.submit(function, *task))
                handle_signals()
            for future in futures:
                while not wait([future], timeout=0.1).done:
                    handle_signals()
                handle_signals()
                results.append(future.result())
                bar.update()
            return results
        except BrokenProcessPool as error:
            handle_signals()  # SIGTERM to the whole group, as SLURM sends it, ends the workers first
            raise InputError(f"{text}: a process was killed; did the memory run out? Try --processes 1") from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # after an error or Ctrl-C the remaining tasks are dropped


@contextmanager
def _signals_held_back() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C and SIGTERM back. Yield a function that handles those that have arrived; the end handles the rest.

    A signal that raises an exception in the middle of a pool's code can leave a lock of the pool held. The pool then
    waits for itself forever.
    """
    arrived: list[tuple] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # only this thread handles signals
        handlers = {number: handler for number in (signal.SIGINT, signal.SIGTERM)
                    if callable(handler := signal.getsignal(number))}

    def handle_signals() -> None:
        if arrived:
            number, frame = arrived[0]
            arrived.clear()  # a key that is pressed twice counts once
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
    try:
        yield handle_signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    handle_signals()


def _start_worker() -> None:
    """Prepare a worker process: ignore Ctrl-C, and end when the main process has ended.

    Ctrl-C reaches all processes of a terminal. The main process then ends the workers, without a traceback of theirs.
    If the main process was killed, it cannot, and they would wait for it forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


def _end(number, frame) -> None:
    """End the process in order. During a fork, do so when the fork is over."""
    if _forks(frame):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise SystemExit(128 + number)


@contextmanager
def terminable():
    """Let SIGTERM end the process in order, as Ctrl-C does: worker processes are ended and temporary files are removed.

    Clusters announce the end of a job's time by SIGTERM. A handler that somebody else has set stays. Threads other than
    the main one cannot set handlers, so nothing changes there. Forked processes end at once, as they do by default.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        defaults = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
        before = {number: default for number, default in defaults.items() if signal.getsignal(number) == default}
    if signal.SIGTERM in before:
        _register_fork_hooks()
    for number in before:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# A forked worker must not inherit the handler. Python runs a handler between two of its instructions, so a signal that
# arrives just before a wait in C is missed. multiprocessing tells the workers of a pool only once to end: one that
# misses it waits for ever, and the pool waits for it.
#
# In the process that forks, the handler must not raise: Python ignores the exceptions of all functions that it calls
# around a fork. To block the signals there is not enough, because another thread may receive them.
_fork = threading.local()  # mask: the signals that were blocked before this thread's fork, until the fork is over


def _before_fork() -> None:
    """Block SIGTERM until the child handles it by default. Do nothing unless :func:`terminable` handles it now."""
    ours = signal.getsignal(signal.SIGTERM) is _end
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}) if ours else None


def _after_fork() -> None:
    if getattr(_fork, "mask", None) is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)
        _fork.mask = None


def _after_fork_in_child() -> None:
    if getattr(_fork, "mask", None) is not None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


def _forks(frame) -> bool:
    """Whether this thread is in the middle of a fork; frame: the innermost one of this thread.

    The line that forks tells it, because other packages have functions around a fork, too. Those of a package that is
    imported later are called before ours.
    """
    while frame is not None and not FORK.search(getline(frame.f_code.co_filename, frame.f_lineno)):
        frame = frame.f_back
    return frame is not None or getattr(_fork, "mask", None) is not None


@cache
def _register_fork_hooks() -> None:
    """Register the hooks once, when they are first needed. They cannot be removed, and most programs need none.

    The hook before a fork that is registered last is called first, and the one after a fork is called last. So
    the hooks of other packages are called between ours.
    """
    if hasattr(os, "register_at_fork"):  # Windows never forks
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
