"""Which faults does a training survive?

    python benchmarks/faults.py [--kills 20]

The faults are kills at random moments, a full disk, broken files, dead workers, signals, and values that are not
finite. The script runs whole trainings (`confkd train` in separate processes) of a tiny network on generated data.
They save a checkpoint every epoch. A kill sends SIGKILL to the training and all of its processes at a random moment,
every third time while a file is being saved. The training then continues with --c. The script writes faults.json
beside this file, and the table into docs/how-to/faults.md.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ID, DATASET, TRAINER = 996, "Dataset996_Faults", "FaultTrainer"
EPOCHS = {"tiny": 400, "short": 1}  # of each configuration; no training of the first reaches its end
TIMEOUT = 180  # seconds, for whatever is to happen: a hang is a failure

TRAINER_FILE = f"""
from nnunet_confkd.training.trainer import ConfKDTrainer
import torch

class {TRAINER}(ConfKDTrainer):
    def on_train_start(self):
        super().on_train_start()
        self.save_every = 1
"""


class Failed(Exception):
    """A fault was not survived as it should be."""


# ---- a training -----------------------------------------------------------------------------------------------------

class Training:
    def __init__(self, log: Path, *arguments: str, configuration: str = "tiny", file_limit: int | None = None):
        self.log = log
        command = [sys.executable, "-m", "nnunet_confkd.cli", "train", str(ID), configuration, "0",
                   "-tr", TRAINER, "-device", "cpu", *arguments]
        limit = (
            None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        )
        self.process = subprocess.Popen(
            command, stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=limit
        )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, what, text: str):
        """Wait until `what()` is true, and return its value."""
        end = time.monotonic() + TIMEOUT
        while time.monotonic() < end:
            if found := what():
                return found
            if self.process.poll() is not None:
                raise Failed(f"ended before {text}:\n{self.text[-2000:]}")
            time.sleep(0.002)
        self.kill()
        raise Failed(f"no {text} within {TIMEOUT} s:\n{self.text[-2000:]}")

    def epochs(self, count: int) -> None:
        """Wait until this process has finished so many epochs."""
        self.wait_for(lambda: self.text.count("Epoch time") >= count, f"{count} epochs")

    def workers(self, called: bytes = b"") -> list[int]:
        """Return the child processes whose command line contains `called`."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
        return [pid for pid, line in lines.items() if called in line and b"resource_tracker" not in line]

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ends(self, expected: str, well: bool = False) -> None:
        """Check that the training ends by itself, prints `expected`, and leaves no process behind.

        Its exit status must be zero if `well`, and otherwise not zero.
        """
        try:
            status = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise Failed(f"hangs:\n{self.text[-2000:]}") from None
        if (status == 0) != well or expected not in self.text:
            raise Failed(f"exit status {status}, and no '{expected}':\n{self.text[-3000:]}")
        for _ in range(20):
            time.sleep(0.5)
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
        left = subprocess.run(["ps", "-o", "args=", "-g", str(self.process.pid)], capture_output=True, text=True).stdout
        self.kill()
        raise Failed(f"left processes behind:\n{left}")


def checkpoints(fold: Path) -> dict[str, int]:
    """{name: epoch} of the checkpoints, every one of which must be readable."""
    import torch
    found = {}
    for file in fold.glob("checkpoint_*.pth"):
        try:
            found[file.name] = torch.load(file, map_location="cpu", weights_only=False)["current_epoch"]
        except Exception as error:
            raise Failed(f"{file.name} cannot be read: {error!r}") from error
    return found


# ---- the faults -----------------------------------------------------------------------------------------------------

def killed(fold: Path, log: Path, kills: int) -> str:
    """Killed at random moments, each time continued."""
    rng, saving, lost = random.Random(0), 0, []
    for i in range(kills):
        before = checkpoints(fold).get("checkpoint_latest.pth", 0)
        training = Training(log, "--c")
        training.epochs(1)
        if i % 3 == 0:
            training.wait_for(lambda: list(fold.glob(".*.pth")), "file being saved")
            saving += 1
        else:
            time.sleep(rng.uniform(0, 3))
        training.kill()
        done = before + training.text.count("Epoch time")
        first = int(training.text.split("Epoch ")[1].split()[0])
        if first != before:
            raise Failed(f"kill {i}: went on from epoch {first}, the checkpoint was of {before}")
        lost.append(done - checkpoints(fold).get("checkpoint_latest.pth", 0))
        if lost[-1] > 1:
            raise Failed(f"kill {i}: lost {lost[-1]} epochs, a checkpoint is saved every epoch")
    return (f"{kills} kills, {saving} of them while a file was being saved; each time resumed, "
            f"at most {max(lost)} epoch lost")


def full_disk(fold: Path, log: Path) -> str:
    """No file can grow beyond half a checkpoint."""
    before = checkpoints(fold)
    training = Training(log, "--c", file_limit=(fold / "checkpoint_latest.pth").stat().st_size // 2)
    training.ends("could not be written")
    if checkpoints(fold) != before or list(fold.glob(".*.pth")):
        raise Failed("the previous checkpoints are not what they were")
    return "stops, names the file; the previous checkpoint is whole"


def truncated(fold: Path, log: Path, file: Path, expected: str) -> str:
    whole, status = file.read_bytes(), file.stat()
    file.unlink()
    file.write_bytes(whole[:len(whole) // 2])
    try:
        Training(log, "--c").ends(expected)
    finally:
        file.unlink()
        file.write_bytes(whole)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return "stops, names the case"


def dead_worker(fold: Path, log: Path) -> str:
    training = Training(log, "--c")
    training.epochs(1)
    os.kill(training.workers()[0], signal.SIGKILL)
    training.ends("a process that loads and augments the data has ended")
    checkpoints(fold)
    return "stops, says so; the checkpoint is whole"


def dead_writer(log: Path) -> str:
    """Of the final validation, which is repeated afterwards."""
    Training(log, configuration="short").ends("Mean Validation Dice", well=True)
    validation = Training(log, "--val", configuration="short")
    writers = validation.wait_for(lambda: validation.workers(b"spawn_main"), "process that writes")
    os.kill(writers[0], signal.SIGKILL)
    validation.ends("A process that writes the validation's segmentations was killed")
    Training(log, "--val", configuration="short").ends("Mean Validation Dice", well=True)
    return "stops, says so; --val repeats the validation alone"


def signalled(fold: Path, log: Path, number: int) -> str:
    training = Training(log, "--c")
    training.epochs(1)
    os.kill(training.process.pid, number)
    training.ends("checkpoint_latest.pth is whole: --c goes on from it.")
    checkpoints(fold)
    return "stops in order, says from where it goes on, leaves no process"


def not_finite(fold: Path, log: Path, case: Path) -> str:
    """Every image of the full cases holds NaN."""
    import numpy as np
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
    data, seg, _, properties = nnUNetDatasetBlosc2(str(case.parent), [case.name]).load_case(case.name)
    data, seg = np.array(data[:]), np.array(seg[:])
    kept = list(case.parent.glob(f"{case.name}*"))
    aside = case.parent.parent / "aside"
    aside.mkdir()
    for file in kept:
        file.rename(aside / file.name)
    nnUNetDatasetBlosc2.save_case(np.full_like(data, np.nan), seg, properties, str(case))
    before = checkpoints(fold)
    try:
        Training(log, "--c").ends("steps in a row were not finite")
    finally:
        for file in kept:
            file.unlink(missing_ok=True)
            (aside / file.name).rename(file)
        aside.rmdir()
    if f"cases: {case.name}" not in log.read_text() and f"{case.name}" not in log.read_text():
        raise Failed("the case is not named")
    import torch
    for name in before:
        if any(
            not torch.isfinite(w).all() for w in torch.load(fold / name, weights_only=False)["network_weights"].values()
        ):
            raise Failed(f"{name} holds weights that are not finite")
    return "names terms and cases, stops after 20 steps; checkpoints are finite"


# ---- all of it ------------------------------------------------------------------------------------------------------

def prepare(folder: Path) -> Path:
    """Data, plans and a trainer that saves every epoch; the fold's folder."""
    from nnunet_confkd.data.small_configuration import add_small_configuration
    from nnunet_confkd.demo.demo import plan_and_preprocess
    from nnunet_confkd.demo.synthetic import generate_dataset

    roles = generate_dataset(
        folder / "raw" / DATASET, num_full=1, num_partial=3, num_unlabelled=1, num_validation=1, num_test=0
    )
    plan_and_preprocess(ID, ["2d"])
    preprocessed = folder / "preprocessed" / DATASET
    training = sorted(roles["full"] + roles["partial"] + roles["unlabelled"])
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": training, "val": roles["validation"]}]))
    for configuration, epochs in EPOCHS.items():
        block = {"epochs": epochs, "iterations_per_epoch": 25, "seed": 0}
        add_small_configuration(
            preprocessed / "nnUNetPlans.json",
            configuration,
            "2d",
            block,
            features=(8, 16, 32),
            batch_size=4,
            max_patch=64,
            convolutions=1,
        )
    (folder / "trainers").mkdir()
    (folder / "trainers" / f"{TRAINER}.py").write_text(TRAINER_FILE)
    return folder / "results" / DATASET / f"{TRAINER}__nnUNetPlans__tiny" / "fold_0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file; then docs/ is left alone")
    args = parser.parse_args()
    # a shell that starts this script in the background makes it ignore SIGINT, and the trainings would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
            os.environ[f"nnUNet_{name}"] = str(folder / name)
        os.environ |= {
            "OMP_NUM_THREADS": "1",
            "nnUNet_n_proc_DA": "2",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "false",
            "nnUNet_extTrainer": str(folder / "trainers"),
        }
        fold = prepare(folder)
        images = folder / "preprocessed" / DATASET / "nnUNetPlans_2d"
        full = next(iter(json.loads((images.parent / "splits_final.json").read_text())[0]["train"]))
        faults = {
            "SIGKILL at random moments": lambda log: killed(fold, log, args.kills),
            "a disk that is full while saving": lambda log: full_disk(fold, log),
            "a truncated preprocessed image": lambda log: truncated(
                fold, log, images / f"{full}.b2nd", "cannot be read"
            ),
            "a truncated preprocessed label": lambda log: truncated(
                fold, log, images / f"{full}_seg.b2nd", "cannot be read"
            ),
            "a worker that dies": lambda log: dead_worker(fold, log),
            "a process of the final validation that is killed": dead_writer,
            "SIGINT (Ctrl-C)": lambda log: signalled(fold, log, signal.SIGINT),
            "SIGTERM": lambda log: signalled(fold, log, signal.SIGTERM),
            "an image that is not finite": lambda log: not_finite(fold, log, images / full),
        }
        results = []
        for i, (name, fault) in enumerate(faults.items()):
            start = time.time()
            try:
                result = {"fault": name, "survived": True, "what": fault(folder / f"{i}.log")}
            except Failed as error:
                result = {"fault": name, "survived": False, "what": str(error)}
            results.append({**result, "seconds": round(time.time() - start)})
            print(f"{'survived' if result['survived'] else 'FAILED'}: {name}: {result['what']}", flush=True)
    machine = f"{platform.system()}, {platform.machine()} CPU, {os.cpu_count()} cores"
    (args.output or ROOT / "benchmarks" / "faults.json").write_text(
        json.dumps({"machine": machine, "faults": results}, indent=1)
    )
    if not args.output:
        from step_time import insert

        rows = "\n".join(
            f"| {r['fault']} | {'yes' if r['survived'] else '**no**'} | {r['what'].splitlines()[0]} |" for r in results
        )
        insert(
            ROOT / "docs" / "how-to" / "faults.md",
            "faults",
            f"{machine}.\n\n| fault | survived | what happens |\n|---|---|---|\n{rows}",
        )
    if not all(r["survived"] for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
