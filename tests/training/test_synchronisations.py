"""How often a training step waits for the device: on a GPU each time costs some of the parallel work."""
from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

HIPPOCAMPUS = "Dataset004_Hippocampus"
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Counted(TorchDispatchMode):
    """Counts the operators that would wait for a device, by name."""

    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").split(".")[0]
        if name in WAITING:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def waits(step, batch, monkeypatch) -> Counter[str]:
    """Count what waits in a step, with the copies to lists and to the CPU, which the operators do not show here."""
    copies: Counter[str] = Counter()

    def counting(name):
        original = getattr(torch.Tensor, name)

        def method(*args, **options):
            copies[name] += 1
            return original(*args, **options)
        return method

    with Counted() as counted, monkeypatch.context() as patch:
        for name in ("tolist", "cpu"):
            patch.setattr(torch.Tensor, name, counting(name))
        step(batch)
    return counted.found + copies


@pytest.mark.parametrize("configuration", ("2d", "3d_fullres"))
def test_a_step_waits_for_the_device_as_often_as_was_counted(nnunet, hippocampus, configuration, monkeypatch):
    name = nnunet.configure(HIPPOCAMPUS, f"{configuration}_waits", configuration,
                            {"seed": 0, "kl_ramp_start": 0.0, "kl_ramp_end": 0.0}, max_patch=16)
    trainer = nnunet.trainer(HIPPOCAMPUS, name)
    trainer.initialize()
    trainer.network.train()
    patch, heads = trainer.configuration_manager.patch_size, trainer.label_manager.num_segmentation_heads
    targets = [torch.randint(0, heads, (4, 1, *[round(n * s) for n, s in zip(patch, scales)]), dtype=torch.int16)
               for scales in trainer._get_deep_supervision_scales()]
    batch = {"data": torch.randn(4, 1, *patch), "target": targets, "num_full": 2, "keys": list("abcd"),
             "hint_mask": torch.rand(4, 1, *patch) < 0.1}
    stock = nnunet.trainer(HIPPOCAMPUS, name, "nnUNetTrainer")
    stock.initialize()
    ours, theirs = (waits(one.train_step, batch, monkeypatch) for one in (trainer, stock))
    # nnU-Net: whether any voxel is annotated, in its cross-entropy, and the loss for the log. More than that: the
    # cross-entropy of the second branch, which images are annotated, once for each, and whether the gradient is finite.
    assert ours and sum(ours.values()) == sum(theirs.values()) + 4
    trainer.loss.equal_kinds = True  # the loss of the student in two parts
    assert sum(waits(trainer.train_step, batch, monkeypatch).values()) == sum(ours.values()) + 2
