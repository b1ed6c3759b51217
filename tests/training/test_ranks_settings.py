"""The trainer on several GPUs with every setting that is allowed: two ranks by gloo on the CPU, two steps each.

DDP fails in the second step if a parameter had no gradient in the first. This file is its own worker:
`python test_ranks_settings.py RANK FOLDER`.
"""
from __future__ import annotations

import sys
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_confkd.errors import InputError
from nnunet_confkd.training.settings import Settings

HIPPOCAMPUS = "Dataset004_Hippocampus"
NUM_FULL = (2, 0)  # of each rank
WEIGHTS = ("weight_teacher", "weight_student", "weight_kl", "weight_entropy")


def legal(settings: dict) -> bool:
    try:
        Settings.from_blocks(settings)
    except InputError:
        return False
    return True


def all_settings() -> list[dict]:
    """Each choice and switch, each set of weights that are zero, and steps before, in and after a ramp."""
    found = [{f.name: choice} for f in fields(Settings) for choice in f.metadata.get("choices", ())]
    found += [{f.name: value} for f in fields(Settings) if isinstance(f.default, bool) for value in (True, False)]
    found += [{name: 0.0 for bit, name in enumerate(WEIGHTS) if zero >> bit & 1} for zero in range(16)]
    found += [{"kl_ramp_start": start, "kl_ramp_end": end} for start, end in ((0.9, 1.0), (0.0, 1.0), (0.0, 0.0))]
    found += [{"kl_ramp_start": 0.9, "kl_ramp_end": 1.0, "weight_student": 0.0},
              {"kl_images": "full", "weight_student": 0.0},
              {"equal_kinds": True, "teacher_trains_encoder": False},
              {"kl_images": "full", "teacher_trains_encoder": False},
              {"kl_images": "full", "teacher_hints": False, "weight_entropy": 0.0}, {"complete_at": 0.5}]
    common = {"iterations_per_epoch": 50, "epochs": 2, "cutmix": 0.0, "weight_kl": 3.0}
    found = [common | settings for settings in found]
    return [settings for settings in found if legal(settings)]


# batch Dice in 2-D, a Dice of each image in 3-D
CASES = [(base, number, settings) for base in ("2d", "3d_fullres") for number, settings in enumerate(all_settings())]


def name_of(number: int, base: str) -> str:
    return f"ranks_{base}_{number}"


def work(rank: int, folder: Path) -> None:
    from nnunetv2.run.run_training import get_trainer_from_args
    from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock
    from test_amp import BATCH, batch_of

    from nnunet_confkd.discovery import make_findable
    from nnunet_confkd.training.trainer import ConfKDTrainer
    make_findable()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=60))
    torch.cuda.set_device = lambda device: None
    stock.DDP = lambda network, device_ids: torch.nn.parallel.DistributedDataParallel(network)
    ConfKDTrainer.device = property(lambda self: torch.device("cpu"), lambda self, device: None)
    results = []
    for base, number, settings in CASES:
        trainer = get_trainer_from_args(HIPPOCAMPUS, name_of(number, base), 0, "ConfKDTrainer")
        trainer.initialize()
        trainer.grad_scaler = None
        batch = batch_of(trainer, NUM_FULL[rank])
        if not trainer.settings.uses_hints:
            del batch["hint_mask"]
        try:
            losses = [float(trainer.train_step(batch)["loss"]) for _ in range(2)]
            if trainer.second_stage:
                trainer._leave_teacher_out(trainer.current_epoch)
                losses = [float(trainer.train_step({**batch, "num_full": BATCH})["loss"]) for _ in losses]
            results.append((base, settings, losses, None))
        except RuntimeError as error:
            results.append((base, settings, [], str(error)))
            break  # the ranks are out of step
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow  # the short sibling is in test_ranks.py
def test_every_legal_setting_trains_on_two_ranks(nnunet, hippocampus, run_ranks, tmp_path):
    for base, number, settings in CASES:
        nnunet.configure(HIPPOCAMPUS, name_of(number, base), base, {"seed": 0, **settings}, max_patch=16,
                         features=(4, 8, 8))
    for rank in run_ranks(__file__, tmp_path):
        assert len(rank) == len(CASES) > 40
        for base, settings, losses, error in rank:
            assert error is None and len(losses) == 2 and np.isfinite(losses).all(), (base, settings, error)


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
