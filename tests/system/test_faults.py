"""A training that meets full disks, signals, dead workers, broken files or losses that are not finite can go on later.

benchmarks/faults.py kills whole processes at random moments.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from nnunet_confkd import cli
from nnunet_confkd.data.supervision import annotation_counts
from nnunet_confkd.errors import InputError, TrainingError
from nnunet_confkd.files import new_folder
from nnunet_confkd.training import validation
from nnunet_confkd.training.batches import TrainingCases
from nnunet_confkd.training.recovery import Divergence
from nnunet_confkd.training.validation import export_pool

HIPPOCAMPUS = "Dataset004_Hippocampus"
SHORT = {"epochs": 1, "iterations_per_epoch": 3, "seed": 0}
posix = pytest.mark.skipif(os.name == "nt", reason="on Windows os.kill ends the process that it should signal")


# ---- files ---------------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(nnunet, hippocampus, monkeypatch):
    trainer = nnunet.trainer(HIPPOCAMPUS, nnunet.configure(HIPPOCAMPUS, "disk", "2d", SHORT))
    trainer.initialize()
    file = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
    trainer.save_checkpoint(file)
    before = open(file, "rb").read()

    def full(_, filename):
        with open(filename, "wb") as f:
            f.write(b"half a checkpoint")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", full)
    # a fact, no guess at the cause
    with pytest.raises(TrainingError, match=r"checkpoint_latest\.pth: the checkpoint could not be written .*failed "
                                            r"writing file.*\d GB of the disk are free\.$"):
        trainer.save_checkpoint(file)
    assert open(file, "rb").read() == before
    assert not [f for f in os.listdir(trainer.output_folder) if f.startswith(".")]  # what was being written
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(file)


def test_a_broken_preprocessed_case_is_named(nnunet, hippocampus):
    trainer = nnunet.trainer(HIPPOCAMPUS, "2d")
    folder, case = trainer.preprocessed_dataset_folder, hippocampus["partial"][0]
    trainer.initialize()
    for name in (f"{case}.b2nd", f"{case}_seg.b2nd"):
        path = os.path.join(folder, name)
        whole, status = open(path, "rb").read(), os.stat(path)
        os.unlink(path)  # not in place: blosc2 may have it mapped
        try:
            with open(path, "wb") as f:
                f.write(whole[:len(whole) // 2])
            cases = TrainingCases(trainer.dataset_class(folder))
            with pytest.raises(InputError, match=f"{case}: the preprocessed case cannot be read .*preprocess again"):
                cases.load_case(case)
            if "_seg" in name:
                with pytest.raises(InputError, match=f"{case}: the preprocessed case cannot be read"):
                    annotation_counts(folder, [case], trainer.label_manager)
        finally:
            os.unlink(path)
            with open(path, "wb") as f:
                f.write(whole)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# ---- signals and workers -------------------------------------------------------------------------------------------

RANKS = """
import os, sys, time
from nnunet_confkd import cli, nnunet_commands

def rank(number, folder):
    with open(os.path.join(folder, f"{number}.part"), "w") as f:
        f.write(str(os.getpid()))
    os.rename(f.name, os.path.join(folder, str(number)))
    time.sleep(600)

def entry_point():
    import torch.multiprocessing
    torch.multiprocessing.spawn(rank, (sys.argv[1],), nprocs=2)

if __name__ == "__main__":
    nnunet_commands.entry_point = lambda name: entry_point
    nnunet_commands.train = lambda argv: nnunet_commands.run_as("nnUNetv2_train", argv)
    sys.exit(cli.main(["train", sys.argv[1]]))
"""


@posix
@pytest.mark.slow  # three fresh processes
def test_sigterm_to_the_command_ends_its_ranks_too(tmp_path):
    """Python waits at its end for the processes that it has spawned: for the whole training."""
    (tmp_path / "run.py").write_text(RANKS)
    (tmp_path / "ranks").mkdir()
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "ranks")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 120
        while not all((tmp_path / "ranks" / number).exists() for number in "01"):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        ranks = [int((tmp_path / "ranks" / number).read_text()) for number in "01"]
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        for rank in ranks:
            with pytest.raises(ProcessLookupError):
                os.kill(rank, 0)
    finally:
        process.kill()
        process.communicate()


@posix
def test_a_command_that_is_ended_leaves_no_temporary_files(tmp_path, monkeypatch):
    def command(name, argv):
        with new_folder(tmp_path / "report") as folder, TemporaryDirectory(dir=tmp_path):
            (folder / "page").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")

    monkeypatch.setattr(cli, "run", command)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["report"])
    assert stopped.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault, expected, text", [
    (RuntimeError("One or more background workers are no longer alive. Exiting."), TrainingError,
     "loads and augments .* has ended"),
    (SystemExit(143), SystemExit, None),
    (KeyboardInterrupt(), KeyboardInterrupt, None)], ids=("worker", "SIGTERM", "Ctrl-C"))
def test_a_training_that_is_stopped_says_what_is_left(nnunet, hippocampus, capsys, fault, expected, text):
    configuration = nnunet.configure(HIPPOCAMPUS, f"stopped_{expected.__name__}", "2d", SHORT | {"epochs": 3})
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.save_every = 1
    step = trainer.train_step

    def failing(batch):
        if trainer.current_epoch == 1:
            raise fault
        return step(batch)

    trainer.train_step = failing
    with pytest.raises(expected, match=text):
        trainer.run_training()
    assert "stopped in epoch 1. checkpoint_latest.pth is whole: --c goes on from it." in capsys.readouterr().out
    checkpoint = torch.load(os.path.join(trainer.output_folder, "checkpoint_latest.pth"), weights_only=False)
    assert checkpoint["current_epoch"] == 1


@posix
@pytest.mark.parametrize("at_rest", (True, False), ids=("waiting", "at work"))
def test_a_killed_process_of_the_validation_ends_it_with_a_message(at_rest):
    # in a multiprocessing.Pool the others wait for ever for the queue that a killed one held
    with pytest.raises(TrainingError, match="validation's segmentations was killed.*--val"), export_pool() as pool:
        pool.submit(time.sleep, 0 if at_rest else 600)
        if at_rest:
            pool.submit(abs, 1)
            wait(pool.waiting)
        for process in pool.executor._processes.values():
            os.kill(process.pid, signal.SIGKILL)
        for _ in range(20):
            pool.submit(abs, 1)
            pool.wait_for_room()


def test_the_validation_never_has_more_than_a_few_results_waiting(monkeypatch):
    monkeypatch.setattr(validation, "default_num_processes", 1)
    with pytest.raises(ZeroDivisionError), export_pool() as pool:
        for _ in range(12):
            pool.wait_for_room()
            pool.submit(abs, 1)
            assert len(pool.waiting) <= 2
        pool.submit(divmod, 1, 0)  # an error in a process is not lost at the end


# ---- not finite ----------------------------------------------------------------------------------------------------

def test_steps_that_are_not_finite_are_named_once_and_stop_the_training_at_the_limit():
    divergence, nan = Divergence(3), float("nan")
    good, bad = {"loss": 1.0, "loss_kl": 0.5}, {"loss": nan, "loss_kl": nan, "loss_entropy": 0.1}
    assert divergence.check(good, 0, ["a"]) is None
    text = divergence.check(bad, 7, ["b", "a", "b"])
    assert "epoch 7" in text and "loss_kl = nan" in text and "entropy" not in text and "cases: a, b" in text
    assert divergence.check(bad, 7, ["a"]) is None  # not said again
    assert divergence.check(good, 7, ["a"]) is None
    for _ in range(2):  # the count began anew
        divergence.check({"loss": 1.0, "gradient": float("inf")}, 8, ["a"])
    with pytest.raises(TrainingError, match=r"3 steps in a row .*epoch 8, gradient = inf; cases: c"):
        divergence.check({"gradient": float("inf")}, 8, ["c"])


def test_back_offs_of_the_gradient_scaler_are_reported_from_the_fifth_in_a_row_on():
    divergence = Divergence(8)
    infinite, good = {"loss": 1.0, "loss_kl": 0.2, "gradient": float("inf")}, {"loss": 1.0, "gradient": 2.0}
    for _ in range(3):  # single ones, and a few at the start, are normal
        assert [divergence.check(infinite, 0, ["a"], scaled=True) for _ in range(4)] == [None] * 4
        assert divergence.check(good, 0, ["a"], scaled=True) is None
    said = [divergence.check(infinite, 3, ["a"], scaled=True) for _ in range(7)]
    assert said[:4] == [None] * 4
    assert all(f"{i} steps in a row" in text and "epoch 3" in text for i, text in enumerate(said[4:], 5))
    with pytest.raises(TrainingError, match="8 steps in a row"):
        divergence.check(infinite, 3, ["a"], scaled=True)


def test_a_loss_that_is_not_finite_is_named_at_once_with_a_gradient_scaler_too():
    divergence, nan = Divergence(8), float("nan")
    infinite, bad = {"loss": 1.0, "gradient": nan}, {"loss": nan, "gradient": nan}
    assert divergence.check(infinite, 0, ["a"], scaled=True) is None
    text = divergence.check(bad, 0, ["b"], scaled=True)
    assert "loss = nan" in text and "cases: b" in text
    assert divergence.check(bad, 0, ["c"], scaled=True) is None  # not said again
    assert divergence.check(infinite, 0, ["c"], scaled=True) is None
    assert "5 steps in a row" in divergence.check(infinite, 0, ["c"], scaled=True)  # all of them were left out
    assert "gradient = nan" in Divergence(8).check({"loss": 1.0, "gradient": nan}, 0, ["a"])  # no scaler: no back-off


def test_a_step_that_is_not_finite_changes_no_weight_and_names_term_and_cases(nnunet, hippocampus, capsys):
    configuration = nnunet.configure(HIPPOCAMPUS, "nan", "2d", SHORT | {"max_nonfinite_steps": 2})
    trainer = nnunet.trainer(HIPPOCAMPUS, configuration)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    batch["data"][0] = float("nan")  # a full image
    trainer.train_step(batch)
    assert all(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())
    out = capsys.readouterr().out
    assert "loss_teacher = nan" in out and "loss_kl = nan" in out and batch["keys"][0] in out
    with pytest.raises(TrainingError, match="2 steps in a row"):
        trainer.train_step(batch)


# ---- going on ------------------------------------------------------------------------------------------------------

class Batches:
    """Give the same batch for the same epoch and iteration, whenever a training begins."""

    def __init__(self, trainer, batches):
        self.trainer, self.batches, self.count = trainer, batches, 0

    def __next__(self):
        self.count += 1
        return self.batches[(self.trainer.current_epoch + self.count) % len(self.batches)]


def test_a_training_that_continues_with_other_settings_says_so_and_records_both(nnunet, hippocampus, capsys):
    def train(continue_training: bool, **settings) -> tuple[dict, list[str]]:
        configuration = nnunet.configure(HIPPOCAMPUS, "changed", "2d", SHORT | {"iterations_per_epoch": 1} | settings)
        trainer = nnunet.trainer(HIPPOCAMPUS, configuration, continue_training=continue_training)
        maybe_load_checkpoint(trainer, continue_training, False)
        trainer.run_training()
        warnings = [line for line in capsys.readouterr().out.splitlines() if "other settings than before" in line]
        return json.loads(Path(trainer.output_folder, "confkd.json").read_text()), warnings

    from nnunetv2.run.run_training import maybe_load_checkpoint
    first, warnings = train(False)
    assert first["history"] == [] and not warnings
    second, (warning,) = train(True, epochs=2, weight_kl=1.5)
    before = {"until_epoch": 1, "nnunet_confkd": first["nnunet_confkd"], "settings": first["settings"]}
    assert "before: epochs: 1 -> 2, weight_kl: 3.0 -> 1.5. " in warning and "confkd.json keeps both" in warning
    assert second["settings"]["weight_kl"] == 1.5 and second["supervision"] == first["supervision"]
    assert second["history"] == [before]
    third, warnings = train(True, epochs=2, weight_kl=1.5)
    assert third == second and not warnings
    fourth, warnings = train(True, epochs=3, weight_kl=1.5)
    assert fourth["history"] == [before, before | {"until_epoch": 2, "settings": second["settings"]}]
    assert len(warnings) == 1
    anew, warnings = train(False)  # from the beginning
    assert anew == first and not warnings


def test_k_epochs_and_then_m_are_k_plus_m(nnunet, hippocampus):
    """Given the same batches, weights, optimiser, schedules, ramps, curves and the best pseudo-Dice are the same."""
    configuration = nnunet.configure(HIPPOCAMPUS, "resumed", "2d", {
        "epochs": 3, "iterations_per_epoch": 2, "seed": 0, "kl_ramp_start": 0.1, "kl_ramp_end": 0.9})
    source = nnunet.trainer(HIPPOCAMPUS, configuration)
    source.on_train_start()
    train, validate = ([next(loader) for _ in range(3)] for loader in (source.dataloader_train, source.dataloader_val))

    def run(until: int, checkpoint: str | None = None):
        trainer = nnunet.trainer(HIPPOCAMPUS, configuration, continue_training=checkpoint is not None)
        trainer.get_dataloaders = lambda: (Batches(trainer, train), Batches(trainer, validate))
        if checkpoint:
            trainer.load_checkpoint(checkpoint)
        end, trainer.on_train_end, trainer.save_every = trainer.on_epoch_end, lambda: None, 1

        def ended():
            end()
            trainer.dataloader_train.count = trainer.dataloader_val.count = 0
            if trainer.current_epoch == until:
                raise KeyboardInterrupt

        trainer.on_epoch_end = ended
        if until < 3:
            with pytest.raises(KeyboardInterrupt):
                trainer.run_training()
        else:
            trainer.on_epoch_end = lambda: (end(), setattr(trainer.dataloader_train, "count", 0),
                                            setattr(trainer.dataloader_val, "count", 0))
            trainer.run_training()
        return trainer

    whole = run(3)
    first = run(2)
    second = run(3, os.path.join(first.output_folder, "checkpoint_latest.pth"))
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, second.network.state_dict()[name]), name
    for a, b in zip(whole.optimizer.state.values(), second.optimizer.state.values()):
        assert torch.equal(a["momentum_buffer"], b["momentum_buffer"])
    assert whole.optimizer.param_groups[0]["lr"] == second.optimizer.param_groups[0]["lr"]
    assert whole._best_ema == second._best_ema and whole.current_epoch == second.current_epoch == 3
    curves = [t.logger.local_logger.my_fantastic_logging for t in (whole, second)]
    for key, values in curves[0].items():
        if "timestamp" not in key:
            np.testing.assert_array_equal(values, curves[1][key], err_msg=key)
