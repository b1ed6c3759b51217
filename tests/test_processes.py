"""Several processes: their results, and how Ctrl-C, SIGTERM and a killed worker end them.

The workers import this file, so it imports little.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from nnunet_confkd import processes
from nnunet_confkd.errors import InputError
from nnunet_confkd.processes import parallel, terminable

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals: os.kill ends the process")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows never forks")


def slowly_touch(file: Path) -> None:
    time.sleep(0.05)
    file.touch()


@pytest.fixture
def ctrl_c():
    """Ctrl-C is heard, also if the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- results --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", [1, 2])
def test_the_results_are_in_the_order_of_the_tasks(number):
    assert parallel(divmod, [(7, 2), (9, 4), (3, 1)], number, "dividing") == [(3, 1), (2, 1), (3, 0)]


def test_workers_are_used_from_a_thread_too():
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(parallel, divmod, [(7, 2), (9, 4)], 2, "dividing").result() == [(3, 1), (2, 1)]


@pytest.mark.parametrize("number", [1, 2])
def test_errors_are_raised_as_they_are(number):
    with pytest.raises(ZeroDivisionError):
        parallel(divmod, [(7, 2), (9, 0)], number, "dividing")


def test_progress_is_shown_on_a_terminal_and_nowhere_else(capsys, monkeypatch):
    parallel(divmod, [(7, 2)], 1, "dividing")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    parallel(divmod, [(7, 2)], 1, "dividing")
    assert "dividing: 100%" in capsys.readouterr().err


# ---- signals and killed workers -------------------------------------------------------------------------------------

def test_a_killed_worker_is_an_error_that_says_so():
    with pytest.raises(InputError, match="reading: a process was killed; did the memory run out"):
        parallel(os._exit, [(9,), (9,)], 2, "reading")


def test_ctrl_c_is_left_to_the_main_process():
    """Otherwise every worker that waits would print a traceback."""
    tasks = [(signal.SIGINT,), (signal.SIGTERM,)]
    assert parallel(signal.getsignal, tasks, 2, "asking") == [signal.SIG_IGN, signal.SIG_DFL]


@posix
@pytest.mark.parametrize("number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_does_not_break_into_the_pool_and_the_remaining_tasks_are_dropped(
        tmp_path, monkeypatch, ctrl_c, number, raised):
    """In the middle of the pool's code it would leave locks held, and the pool would hang."""
    submit, whole = processes.ProcessPoolExecutor.submit, []

    def signalled(*args):
        future = submit(*args)
        if len(whole) == 100:
            os.kill(os.getpid(), number)
            time.sleep(0.01)  # Python handles signals between two instructions
        whole.append(future)
        return future

    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", signalled)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(raised), terminable():
        parallel(slowly_touch, [(tmp_path / str(i),) for i in range(200)], 2, "touch")
    assert len(whole) == 101 and all(future.done() for future in whole)
    assert len(list(tmp_path.iterdir())) < 100
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@posix
def test_ctrl_c_while_results_come_without_a_pause_is_noticed(monkeypatch, ctrl_c):
    class Finished(Future):
        def result(self, timeout=None):
            asked.append(self)
            if len(asked) == 10:
                os.kill(os.getpid(), signal.SIGINT)
            return super().result(timeout)

    def submit(*_):
        future = Finished()
        future.set_result(None)
        return future

    asked = []
    monkeypatch.setattr(processes.ProcessPoolExecutor, "submit", submit)
    with pytest.raises(KeyboardInterrupt):
        parallel(divmod, [(7, 2)] * 150, 2, "dividing")
    assert len(asked) < 20


@posix
def test_sigterm_ends_the_process_in_order_and_the_handler_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    seen = []

    def in_a_thread():
        with terminable():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_handler_of_somebody_else_stays():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- forks ----------------------------------------------------------------------------------------------------------

@forks
def test_a_forked_process_ends_at_once_whenever_it_is_told_to():
    with terminable():
        for pause in (0, 0, 0.0005, 0.001, 0.002) * 8:
            process = os.fork()
            if not process:
                try:
                    time.sleep(10)
                finally:
                    os._exit(1)
            time.sleep(pause)
            os.kill(process, signal.SIGTERM)
            assert os.waitpid(process, 0)[1] == signal.SIGTERM
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


FORKS = """
import os, signal
hooks, register = [], os.register_at_fork

def remember(**functions):
    hooks.extend(f for f in functions.values() if (getattr(f, "__module__", None) or "").startswith("nnunet_confkd"))
    register(**functions)

os.register_at_fork = remember
import nnunet_confkd.cli, nnunet_confkd.data.raw_format, nnunet_confkd.processes
assert not hooks, "the import has hooked the forks of this program"
for _ in range(2):
    with nnunet_confkd.processes.terminable():
        pass
assert len(hooks) == 3, hooks

def mine(*_):
    os._exit(7)

signal.signal(signal.SIGTERM, mine)
masks = []
signal.pthread_sigmask = lambda *arguments: masks.append(arguments)
child = os.fork()
if not child:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7 and not masks
print("UNCHANGED")
"""


@forks
def test_forks_of_a_program_that_imports_the_package_are_as_they_were():
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("UNCHANGED\n"), done.stdout + done.stderr


FORKING = """
import os, signal, sys, threading, time
from nnunet_confkd.processes import terminable

number, threads, later = map(int, sys.argv[1:])
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(threads):  # it receives signals that the main thread blocks
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()

def signalled():  # it arrives while Python prepares the fork
    os.kill(os.getpid(), number)
    time.sleep(0)

if not later:
    os.register_at_fork(before=signalled)
try:
    with terminable():
        if later:
            os.register_at_fork(before=signalled)
        if os.fork() == 0:
            os._exit(0)
        time.sleep(30)
        print("lost")
except (KeyboardInterrupt, SystemExit) as end:
    print(type(end).__name__)
"""


@forks
@pytest.mark.parametrize("later", [0, 1])
@pytest.mark.parametrize("threads", [0, 1])
@pytest.mark.parametrize("number, expected", [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "SystemExit")])
def test_a_signal_during_a_fork_is_not_lost(number, expected, threads, later, tmp_path):
    """Python ignores exceptions of the functions that it calls around a fork. Some packages bring functions later."""
    script = tmp_path / "forking.py"
    script.write_text(FORKING)
    command = [sys.executable, str(script), str(int(number)), str(threads), str(later)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == f"{expected}\n" and found.stderr == ""


@forks
@pytest.mark.parametrize("number, expected", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_at_any_instruction_of_the_functions_around_a_fork_is_not_lost(number, expected, ctrl_c, monkeypatch):
    hooks = {processes._before_fork.__code__, processes._after_fork.__code__}
    seen = 0

    def fork(moment: int | None) -> None:
        """Fork; at this one of the hooks' instructions the signal arrives."""
        nonlocal seen
        seen = 0

        def trace(frame, event, _):
            nonlocal seen
            if frame.f_code not in hooks:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                if seen == moment:
                    os.kill(os.getpid(), number)
                seen += 1
            return trace

        sys.settrace(trace)
        try:
            if (child := os.fork()) == 0:
                os._exit(0)
        finally:
            sys.settrace(None)
        os.waitpid(child, 0)

    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    with terminable():
        fork(None)
    instructions = seen
    assert instructions > 20
    for moment in range(instructions):
        with pytest.raises(expected), terminable():
            fork(moment)
            time.sleep(2)
        assert not ignored, (moment, ignored)
