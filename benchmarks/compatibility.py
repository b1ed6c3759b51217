"""Does the wheel work with these versions? Each gets a fresh environment, the packaging tests and ten training steps.

    python benchmarks/compatibility.py [--python 3.11=/usr/bin/python3.11 ...] [--only N ...]

The script builds the wheel from a copy of the checkout. For each combination of versions it installs the wheel into an
environment in a temporary folder, which takes minutes and about 6 GB. From that folder it runs
tests/system/test_packaging.py and `confkd demo` with ten steps, and then removes the folder. It writes
compatibility.json beside this file, which keeps earlier results of other versions, and the table into
docs/reference/compatibility.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
NEWEST = ""  # whatever the installer chooses
# Python, nnunetv2, torch
MATRIX = [(HERE, "2.8.1", NEWEST), (HERE, "2.8.0", NEWEST), (HERE, "2.8.1", "2.6.0"),
          *((python, NEWEST, NEWEST) for python in ("3.10", "3.11", "3.12", "3.13") if python != HERE)]


def run(log: Path, *command, cwd: Path, **variables: str) -> float:
    """Run a command, append its output to the log, and return the seconds that it took.

    Raises:
        subprocess.CalledProcessError: The command failed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "PYTHON"))} | variables
    start = time.time()
    with log.open("a") as stream:
        subprocess.run(
            [str(c) for c in command], cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=True
        )
    return time.time() - start


def build(folder: Path) -> Path:
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in tracked:
        if not (ROOT / name).is_dir():  # a link to a folder is a file for git, and is made by what it holds
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run(folder / "build.log", sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def attempt(interpreter: str, nnunet: str, torch: str, wheel: Path, folder: Path, log: Path) -> dict:
    """One cell of the matrix: the versions that were installed, and what failed, if anything."""
    python = folder / "venv" / "bin" / "python"
    result: dict = {"seconds": {}}
    try:
        run(log, interpreter, "-m", "venv", folder / "venv", cwd=folder)
        wanted = [
            wheel,
            "pytest",
            "setuptools>=77",
            "nnunetv2" + (f"=={nnunet}" if nnunet else ""),
            "torch" + (f"=={torch}" if torch else ""),
        ]
        result["seconds"]["install"] = round(run(log, python, "-m", "pip", "install", *wanted, cwd=folder))
        shown = subprocess.run(
            [
                python,
                "-c",
                "import platform, importlib.metadata as m; print(platform.python_version(), "
                "*(m.version(p) for p in ('nnunetv2', 'torch', 'numpy')))",
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        result |= dict(zip(("python", "nnunetv2", "torch", "numpy"), shown.stdout.split()))
        # the installed package, not the checkout's
        for name in ("tests/system/test_packaging.py", "README.md", "pyproject.toml", "setup.py", "LICENSE"):
            (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "checkout" / name)
        for name in ("nnunet_confkd", "trainers", "dataset_conversion"):  # what its own wheel is built of
            shutil.copytree(
                ROOT / name, folder / "checkout" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        result["seconds"]["packaging tests"] = round(
            run(log, python, "-P" if sys.version_info >= (3, 11) and result["python"] >= "3.11" else "-I",
                "-m", "pytest", "-q", "checkout/tests/system/test_packaging.py", cwd=folder)
        )
        result["seconds"]["ten steps"] = round(
            run(log, folder / "venv" / "bin" / "confkd", "demo", "--epochs", "1", "--iterations", "10",
                cwd=folder, OMP_NUM_THREADS="1", nnUNet_compile="false", nnUNet_n_proc_DA="2")
        )
        result["works"] = True
    except subprocess.CalledProcessError as error:
        result |= {"works": False, "failed": " ".join(map(str, error.cmd))[-200:], "said": log.read_text()[-2000:]}
    return result


def table_of(results: dict) -> str:
    lines = [
        "| Python | nnunetv2 | torch | numpy | packaging tests | ten training steps |",
        "|---|---|---|---|---|---|",
    ]
    for (python, nnunet, torch), result in ((key.split("/"), value) for key, value in results.items()):
        if result is None:
            lines.append(f"| {python} | {nnunet or 'newest'} | {torch or 'newest'} | | not run | not run |")
            continue
        marks = ["passed" if step in result["seconds"] else "**failed**" for step in ("packaging tests", "ten steps")]
        lines.append(
            f"| {result.get('python', python)} | {result.get('nnunetv2', nnunet)} | {result.get('torch', torch)} | "
            f"{result.get('numpy', '')} | {' | '.join(marks)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", nargs="+", default=[], metavar="X.Y=PATH", help="more interpreters than the current one"
    )
    parser.add_argument(
        "--only", nargs="+", type=int, metavar="N", help="rows of the matrix, from 0; default: rows without a result"
    )
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args()
    interpreters = {HERE: sys.executable} | dict(pair.split("=", 1) for pair in args.python)
    output = args.output or ROOT / "benchmarks" / "compatibility.json"
    before = json.loads(output.read_text()) if output.is_file() else {"results": {}}
    results = {"/".join(row): before["results"].get("/".join(row)) for row in MATRIX}
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build(Path(temporary))
        for i, row in enumerate(MATRIX):
            key = "/".join(row)
            if row[0] not in interpreters or (
                i not in args.only if args.only is not None else results[key] is not None
            ):
                continue
            folder = Path(temporary) / "environment"
            folder.mkdir()
            results[key] = attempt(interpreters[row[0]], *row[1:], wheel, folder, folder / "log.txt")
            print(
                row,
                "works" if results[key]["works"] else f"FAILED: {results[key]['failed']}\n{results[key]['said']}",
                flush=True,
            )
            shutil.rmtree(folder)
            output.write_text(
                json.dumps({"machine": f"{platform.system()}, {platform.machine()}", "results": results}, indent=1)
            )
    if not args.output:
        from step_time import insert

        insert(
            ROOT / "docs" / "reference" / "compatibility.md",
            "compatibility",
            f"{platform.system()}, {platform.machine()}.\n\n{table_of(results)}",
        )
    if any(result and not result["works"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
