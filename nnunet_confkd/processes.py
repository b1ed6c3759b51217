"""Work in several processes, and how SIGTERM and Ctrl-C end it."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from multiprocessing import get_context, parent_process
from queue import Empty, SimpleQueue

from tqdm import tqdm

from nnunet_confkd.errors import InputError

PROCESSES = min(8, os.cpu_count() or 1)


def parallel(function: Callable, tasks: list[tuple], processes: int, text: str) -> list:
    """[function(*task) for task in tasks], in processes, with a progress bar; in this process for one."""
    bar = tqdm(total=len(tasks), desc=text, disable=None)
    with bar:
        if processes <= 1 or len(tasks) <= 1:
            results = []
            for task in tasks:
                results.append(function(*task))
                bar.update()
            return results
        with _signals_between_steps() as look:
            pool = ProcessPoolExecutor(min(processes, len(tasks)), get_context("spawn"), _start_worker)
            futures, finished = [], SimpleQueue()
            try:
                for task in tasks:
                    futures.append(pool.submit(function, *task))
                    futures[-1].add_done_callback(finished.put)
                    look()
                for _ in futures:
                    _next(finished, look).result()
                    bar.update()
                return [future.result() for future in futures]
            except BrokenProcessPool as error:
                look()  # SIGTERM to the whole group, as SLURM sends it, ends the workers first
                raise InputError(f"{text}: a process was killed; did the memory run out? Try --processes 1") from error
            finally:
                pool.shutdown(wait=True, cancel_futures=True)  # an error or Ctrl-C does not wait for the rest


def _next(queue: SimpleQueue, look: Callable[[], None]):
    """The queue's next item; `look` is called before, and while there is none."""
    while True:
        look()
        try:
            return queue.get(timeout=0.1)
        except Empty:
            pass


@contextmanager
def _signals_between_steps() -> Iterator[Callable[[], None]]:
    """Yields a function; only when it is called, and at the end, what Ctrl-C and SIGTERM would raise is raised. At any other moment it could
    leave a pool's locks held, and the pool would wait for itself forever."""
    if threading.current_thread() is not threading.main_thread():  # it alone handles signals
        yield lambda: None
        return
    handlers = {number: handler for number in (signal.SIGINT, signal.SIGTERM) if callable(handler := signal.getsignal(number))}
    arrived: list[tuple] = []

    def look() -> None:
        if arrived:
            number, frame = arrived.pop(0)
            arrived.clear()  # pressed twice is pressed once
            handlers[number](number, frame)

    for number in handlers:
        signal.signal(number, lambda *signal_and_frame: arrived.append(signal_and_frame))
    try:
        yield look
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    look()


def _start_worker() -> None:
    """Ctrl-C reaches the whole group of processes: the main one ends the others, without their tracebacks. Where it was
    killed and cannot, they would wait for it forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent_process().join()
    os._exit(1)


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
