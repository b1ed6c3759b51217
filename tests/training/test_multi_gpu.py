"""A whole training by nnU-Net's multi-GPU runner (`-num_gpus 2`), with gloo and CPUs in place of nccl and GPUs.

The runner insists on those; :func:`without_gpus` replaces them, all else is nnU-Net's and ours. This file is its own
worker: `python test_multi_gpu.py RANK FOLDER CONFIGURATION [--c]`.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow  # the short sibling is in test_ranks.py
HIPPOCAMPUS = "Dataset004_Hippocampus"
WORLD, EPOCHS, STEPS = 2, 2, 4
LOGGED = ("loss_teacher", "loss_student", "loss_kl", "loss_entropy", "annotated_share")


def without_gpus(store: Path, seconds: int = 60) -> None:
    """Put gloo and the CPU in place of what nnU-Net's runner insists on; ranks wait for each other for `seconds`."""
    from nnunetv2.run import run_training
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock

    from nnunet_confkd.training.trainer import ConfKDTrainer
    torch.set_num_threads(1)
    run_training.setup_ddp = lambda rank, world_size: torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds))
    torch.cuda.set_device = lambda device: None
    stock.DDP = lambda network, device_ids: torch.nn.parallel.DistributedDataParallel(network)
    ConfKDTrainer.device = property(lambda self: torch.device("cpu"), lambda self, device: None)


def meet(folder: Path, rank: int, name: str) -> None:
    """Wait until all ranks are here."""
    (folder / f"{name}{rank}").touch()
    while not all((folder / f"{name}{other}").exists() for other in range(WORLD)):
        time.sleep(0.05)


def work(rank: int, folder: Path, configuration: str, go_on: bool) -> None:
    """What `nnUNetv2_train ... -num_gpus 2` starts on each GPU."""
    from nnunetv2.run import run_training

    from nnunet_confkd.data import supervision
    from nnunet_confkd.training.trainer import ConfKDTrainer
    without_gpus(folder / ("store_c" if go_on else "store"))
    seen, read = [], []

    def count_voxels(*args, count=supervision.count_voxels):
        read.append(1)
        return count(*args)

    def train_step(self, batch, step=ConfKDTrainer.train_step):
        values = step(self, batch)
        seen.append({"num_full": batch["num_full"], "images": len(batch["data"]), **values})
        return values

    def on_train_end(self, end=ConfKDTrainer.on_train_end):
        end(self)
        weights = {name: w.clone() for name, w in self.network.module.state_dict().items()}
        torch.save({"steps": seen, "read": len(read), "weights": weights}, folder / f"rank{rank}.pt")

    ConfKDTrainer.train_step, ConfKDTrainer.on_train_end = train_step, on_train_end
    supervision.count_voxels = count_voxels
    run_training.run_ddp(rank, HIPPOCAMPUS, configuration, 0, "ConfKDTrainer", "nnUNetPlans", False, go_on, False,
                         None, False, False, WORLD)


@pytest.mark.parametrize("base, batch_size", [("2d", 3), ("3d_fullres", 2)])
def test_two_ranks_train_and_validate_one_model(nnunet, hippocampus, run_ranks, tmp_path, base, batch_size):
    """Batches of 2 and 1 (2-D, batch Dice) and of 1 and 1 (3-D): the numbers of fully annotated images differ between
    the ranks, and are 0 at times."""
    options = {"epochs": EPOCHS, "iterations_per_epoch": STEPS, "seed": 5, "kl_ramp_start": 0.0, "kl_ramp_end": 0.0}
    configuration = nnunet.configure(HIPPOCAMPUS, f"{base}_ranks", base, options, batch_size=batch_size)
    for counts in nnunet.preprocessed(HIPPOCAMPUS).glob("confkd_supervision_*.json"):
        counts.unlink()
    ranks = run_ranks(__file__, tmp_path, configuration)

    cases = sum(map(len, hippocampus.values())) - len(hippocampus["test"])
    assert [rank["read"] for rank in ranks] == [cases, 0]  # the labels that each has read
    assert sum(rank["steps"][0]["images"] for rank in ranks) == batch_size
    full = [[step["num_full"] for step in rank["steps"]] for rank in ranks]
    assert any(a != b for a, b in zip(*full)) and 0 in full[1]
    for name, weights in ranks[0]["weights"].items():
        assert torch.equal(weights, ranks[1]["weights"][name]), f"{name} differs between the ranks"

    fold = nnunet.model(HIPPOCAMPUS, configuration) / "fold_0"
    assert sorted(path.name for path in fold.glob("*.pth")) == ["checkpoint_best.pth", "checkpoint_final.pth"]
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    for name, weights in checkpoint["network_weights"].items():
        assert torch.equal(weights, ranks[0]["weights"][name])
    for term in LOGGED:  # the curves are those of both ranks
        means = np.mean([[step[term] for step in rank["steps"]] for rank in ranks], 0).reshape(EPOCHS, STEPS).mean(1)
        np.testing.assert_allclose(checkpoint["logging"][term], means, rtol=1e-4, atol=1e-6, err_msg=term)
    for branch in ("validation", "validation_teacher"):
        cases = json.loads((fold / branch / "summary.json").read_text())["metric_per_case"]
        assert len(cases) == len(hippocampus["validation"])

    options = {"epochs": EPOCHS + 1, "iterations_per_epoch": STEPS, "seed": 5}
    nnunet.configure(HIPPOCAMPUS, configuration, base, options, batch_size=batch_size)
    for rank in run_ranks(__file__, tmp_path, configuration, "--c"):
        assert len(rank["steps"]) == STEPS
    assert len(torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]["loss_kl"]) == EPOCHS + 1


def count_slowly(rank: int, folder: Path, configuration: str) -> None:
    """The first rank counts the annotations for longer than any wait for other ranks may take."""
    from nnunetv2.run import run_training

    from nnunet_confkd.training import trainer as module
    without_gpus(folder / "store", seconds=2)
    count = module.annotation_counts

    def slow(*args):
        if rank == 0:
            time.sleep(5)
        return count(*args)

    module.annotation_counts = slow
    meet(folder, rank, "imported")
    run_training.setup_ddp(rank, WORLD)
    trainer = run_training.get_trainer_from_args(HIPPOCAMPUS, configuration, 0, "ConfKDTrainer")
    meet(folder, rank, "made")
    torch.save(trainer.find_supervision(), folder / f"rank{rank}.pt")


def test_ranks_wait_for_the_count_of_the_first_however_long_it_takes(nnunet, hippocampus, run_ranks, tmp_path):
    first, second = run_ranks(__file__, tmp_path, "2d", "--count")
    assert first == second and len(first) > 40


def train_until_stopped(rank: int, folder: Path, configuration: str) -> None:
    """In the second step the last rank sleeps, so that the first one waits for it in C."""
    from nnunetv2.run import run_training

    from nnunet_confkd.training.trainer import ConfKDTrainer
    without_gpus(folder / "store", seconds=600)
    steps = []

    def train_step(self, batch, step=ConfKDTrainer.train_step):
        steps.append(1)
        if len(steps) == 2:
            meet(folder, rank, "step")
            if rank == WORLD - 1:
                time.sleep(600)
        return step(self, batch)

    ConfKDTrainer.train_step = train_step
    run_training.run_ddp(rank, HIPPOCAMPUS, configuration, 0, "ConfKDTrainer", "nnUNetPlans", False, False, False, None,
                         False, False, WORLD)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_ends_every_rank_within_two_seconds(nnunet, hippocampus, tmp_path):
    """torch sends it to the other ranks when one has failed, and kills them only 30 seconds later."""
    configuration = nnunet.configure(HIPPOCAMPUS, "2d_stopped_ranks", "2d", {"epochs": 1, "iterations_per_epoch": 9})
    with (tmp_path / "log").open("w") as log:
        ranks = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path), configuration, "--stop"],
                                  stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "nnUNet_compile": "false"})
                 for rank in range(WORLD)]
        try:
            end = time.monotonic() + 300
            while not all((tmp_path / f"step{rank}").exists() for rank in range(WORLD)):
                running = all(rank.poll() is None for rank in ranks)
                assert running and time.monotonic() < end, (tmp_path / "log").read_text()
                time.sleep(0.05)
            time.sleep(3)  # until the first rank waits for the gradients of the other
            for rank in ranks:
                rank.terminate()
                assert rank.wait(timeout=2) == -signal.SIGTERM
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


if __name__ == "__main__":
    role = {"--count": count_slowly, "--stop": train_until_stopped}.get(sys.argv[-1])
    if role:
        role(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    else:
        work(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], "--c" in sys.argv)
