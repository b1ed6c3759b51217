"""The package uses nothing that only POSIX has without a branch for Windows, where every test file can be collected.

The syntax trees are searched for imports, attributes of `os` and `signal`, arguments of subprocess and paths in /proc.
"""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import NO_RIGHT_TO_LINK, skipped_without_the_right_to_link

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("nnunet_confkd", "dataset_conversion", "trainers")
PACKAGE = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("**/*.py"))
TESTS = sorted(set((ROOT / "tests").glob("**/*.py")) - {Path(__file__)})
MODULES = set("crypt fcntl grp nis ossaudiodev posix pty pwd resource spwd syslog termios tty".split())
NAMES = {
    "os": """
        chown chroot confstr ctermid fchdir fchmod fchown fork forkpty getegid geteuid getgid getgroups getloadavg
        getpgid getpgrp getpriority getresgid getresuid getsid getuid initgroups killpg lchown lockf major makedev
        minor mkfifo mknod nice openpty pathconf posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev
        register_at_fork sched_getaffinity sched_setaffinity sched_yield sendfile setegid seteuid setgid setgroups
        setpgid setpriority setregid setresuid setreuid setsid setuid statvfs sync sysconf tcgetpgrp tcsetpgrp ttyname
        uname wait wait3 wait4 waitid O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG WIFEXITED
        WIFSIGNALED""".split(),
    "signal": """
        ITIMER_REAL ITIMER_VIRTUAL SIGALRM SIGBUS SIGCHLD SIGCONT SIGHUP SIGIO SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGTSTP
        SIGUSR1 SIGUSR2 SIGWINCH SIGXCPU SIGXFSZ SIG_BLOCK SIG_SETMASK SIG_UNBLOCK alarm getitimer pause pthread_kill
        pthread_sigmask setitimer siginterrupt sigpending sigtimedwait sigwait""".split(),
    "time": ["tzset"]}
ARGUMENTS = {"preexec_fn", "start_new_session", "process_group", "pass_fds"}  # of subprocess.Popen
CONTEXTS = {"fork", "forkserver"}  # of multiprocessing
PROGRAMS = {"bash", "make", "sh"}  # that a test may start
# These hooks are registered only where processes can fork.
ALLOWED = {("nnunet_confkd/processes.py", "_before_fork"), ("nnunet_confkd/processes.py", "_after_fork")}


def uses(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The (node, description) of everything that Windows does not have."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node, f"import {alias.name}") for alias in names if alias.name in MODULES)
            case ast.ImportFrom(module=module, names=names):
                if module in MODULES:
                    yield node, f"import {module}"
                yield from ((node, f"{module}.{alias.name}") for alias in names if alias.name in NAMES.get(module, ()))
            case ast.Attribute(value=ast.Name(id=module), attr=name) if name in NAMES.get(module, ()):
                yield node, f"{module}.{name}"
            case ast.Call(func=function, args=arguments, keywords=keywords):
                yield from ((node, f"{word.arg}=") for word in keywords if word.arg in ARGUMENTS)
                if isinstance(function, ast.Attribute) and function.attr in ("get_context", "set_start_method"):
                    constants = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
                    yield from ((node, value) for value in constants if value in CONTEXTS)
            case ast.List(elts=[ast.Constant(value=str(text)), *_]) if text in PROGRAMS:
                yield node, f"the program {text}"
            case ast.Constant(value=str(text)) if text.startswith("/proc/"):
                yield node, text


def enclosing(tree: ast.AST) -> dict[ast.AST, ast.AST]:
    return {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}


def around(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.AST]:
    while node in parents:
        node = parents[node]
        yield node


def asks_for_the_platform(node: ast.AST) -> bool:
    """Whether it is a branch on hasattr(os, ...), os.name or sys.platform."""
    if not isinstance(node, (ast.If, ast.IfExp, ast.BoolOp)):
        return False
    text = ast.unparse(getattr(node, "test", node))
    return "hasattr(" in text or "os.name" in text or "sys.platform" in text


def in_package(file: str, source: str) -> list[str]:
    """List the uses that are not in a branch that asks for the platform."""
    tree = ast.parse(source)
    parents, found = enclosing(tree), []
    for node, what in uses(tree):
        outer = list(around(node, parents))
        functions = [o.name for o in outer if isinstance(o, ast.FunctionDef)]
        if not any(map(asks_for_the_platform, outer)) and not any((file, name) in ALLOWED for name in functions):
            found.append(f"{file}:{node.lineno}: {what}")
    return found


def in_tests(file: str, source: str) -> list[str]:
    """List the uses that are evaluated when the file is collected, and those in functions that are never skipped.

    Collecting evaluates what is outside of functions, decorators and defaults. A function is skipped by its decorator,
    in its body, or by the `pytestmark` of its file.
    """
    tree = ast.parse(source)
    parents, found = enclosing(tree), []
    marks = {target.id for node in tree.body if isinstance(node, ast.Assign) and "skipif" in ast.unparse(node.value)
             for target in node.targets if isinstance(target, ast.Name)}

    def is_skipped(function: ast.FunctionDef) -> bool:
        decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
        text = ast.unparse(function)
        return "pytestmark" in marks or any("skipif" in text or text in marks for text in decorators) or any(
            word in text for word in ("hasattr(", "os.name", "importorskip", "pytest.skip("))

    for node, what in uses(tree):
        path = [node, *around(node, parents)]
        in_bodies = any(_is_body(outer, inner) for inner, outer in zip(path, path[1:]))
        if not in_bodies or not any(is_skipped(outer) for outer in path if isinstance(outer, ast.FunctionDef)):
            found.append(f"{file}:{node.lineno}: {what}")
    return found


def _is_body(function: ast.AST, child: ast.AST) -> bool:
    if isinstance(function, ast.FunctionDef):
        return child in function.body
    return isinstance(function, ast.Lambda) and child is function.body


@pytest.mark.parametrize("file", PACKAGE, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_the_package_has_a_branch_for_windows(file):
    assert in_package(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("file", TESTS, ids=lambda file: file.name)
def test_tests_can_be_collected_on_windows_and_skip_what_it_lacks(file):
    assert in_tests(file.name, file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "import fcntl", "from resource import setrlimit", "from os import fork", "def f():\n    import pwd",
    "import os\nos.killpg(1, 2)", "def f():\n    return os.uname()", "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
    "subprocess.Popen([], preexec_fn=f)", "get = lambda: Path('/proc/self/status')",
    "multiprocessing.get_context('fork')", "subprocess.run(['sh', '-c', 'true'])",
    "if windows:\n    os.fork()"])
def test_what_only_posix_has_is_found(source):
    assert in_package("file.py", source) and in_tests("file.py", source)


@pytest.mark.parametrize("source", [
    "if hasattr(os, 'fork'):\n    os.fork()", "x = os.fork() if os.name == 'posix' else None",
    "if sys.platform != 'win32':\n    import fcntl",
    "import os, signal\nsignal.signal(signal.SIGTERM, f)\nos.replace(a, b)"])
def test_what_has_a_branch_or_is_everywhere_is_not(source):
    assert in_package("file.py", source) == []


def test_a_test_that_may_not_make_a_link_is_skipped_and_other_errors_are_raised():
    error = OSError("a required privilege is not held by the client")
    with pytest.raises(OSError, match="required privilege"):
        skipped_without_the_right_to_link(error)
    error.winerror = NO_RIGHT_TO_LINK
    with pytest.raises(pytest.skip.Exception, match="symbolic links"):
        skipped_without_the_right_to_link(error)


def test_a_test_is_safe_if_it_is_skipped_and_needs_nothing_when_it_is_collected():
    skip = "@pytest.mark.skipif(os.name == 'nt', reason='x')\n"
    assert in_tests("file.py", f"{skip}def test():\n    import fcntl") == []
    assert in_tests("file.py", f"posix = {skip[1:]}@posix\ndef test():\n    os.fork()") == []
    assert in_tests("file.py", "def limit():\n    pytest.importorskip('resource')\n    import resource") == []
    assert in_tests("file.py", f"pytestmark = {skip[1:]}\ndef test():\n    os.fork()") == []
    assert in_tests("file.py", "def test():\n    os.fork()")
    assert in_tests("file.py", f"{skip}def test(to=os.killpg):\n    pass")
    assert in_tests("file.py", f"{skip}@pytest.mark.parametrize('to', [os.killpg])\ndef test(to):\n    pass")
