"""Training steps with mixed precision, which nnU-Net has on CUDA alone; the CPU, too, has a scaler and autocast."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from nnunet_confkd.training.losses import annotated_voxels

HIPPOCAMPUS = "Dataset004_Hippocampus"
SIZE, BATCH = 16, 4


@pytest.fixture
def trainer_of(nnunet, hippocampus, regions):
    """Makes a trainer with a float16 scaler, without data."""
    def make(with_regions: bool, scale: float = 2.0 ** 10, **confkd):
        dataset, base = (regions, "3d_fullres") if with_regions else (HIPPOCAMPUS, "2d")
        options = {"seed": 0, "kl_ramp_start": 0.0, "kl_ramp_end": 0.0, **confkd}
        name = nnunet.configure(dataset, "amp", base, options, max_patch=SIZE)
        trainer = nnunet.trainer(dataset, name)
        trainer.initialize()
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        trainer._autocast = lambda: torch.autocast("cpu", dtype=torch.float16)
        trainer.network.train()
        return trainer

    return make


def batch_of(trainer, num_full: int, value: float = 1.0) -> dict:
    """Random images and labels. A tenth of the voxels of the images that are not fully annotated is annotated."""
    generator = torch.Generator().manual_seed(0)
    patch, heads = trainer.configuration_manager.patch_size, trainer.label_manager.num_segmentation_heads
    data = value * torch.randn(BATCH, 1, *patch, generator=generator)
    targets = []
    for scales in trainer._get_deep_supervision_scales():
        size = [round(n * s) for n, s in zip(patch, scales)]
        ignored = torch.rand(BATCH, 1, *size, generator=generator) > 0.1
        ignored[:num_full] = False
        if trainer.label_manager.has_regions:
            targets.append(torch.cat((torch.rand(BATCH, heads, *size, generator=generator) > 0.5, ignored), 1).float())
        else:
            labels = torch.randint(0, heads, ignored.shape, generator=generator, dtype=torch.int16)
            targets.append(torch.where(ignored, trainer.label_manager.ignore_label, labels))
    batch = {"data": data, "target": targets, "num_full": num_full, "keys": [f"case_{i}" for i in range(BATCH)],
             "hint_mask": annotated_voxels(targets[0], trainer.label_manager.ignore_label,
                                           trainer.label_manager.has_regions)
             & (torch.rand(BATCH, 1, *patch, generator=generator) < 0.1)}
    if trainer.settings.hint_watershed:
        batch["hint_spread"] = torch.randint(1, heads + 1, targets[0].shape, generator=generator, dtype=torch.int16)
    return batch


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.network.named_parameters()}


def said(trainer) -> list[str]:
    lines: list[str] = []
    trainer.print_to_log_file = lambda *words, **_: lines.append(" ".join(map(str, words)))
    return lines


@pytest.mark.parametrize("num_full", (0, 1, BATCH))
@pytest.mark.parametrize("with_regions", (False, True), ids=("labels", "regions"))
def test_a_step_in_half_precision_moves_the_weights_as_one_in_single_precision(trainer_of, with_regions, num_full):
    moved = []
    for half in (True, False):
        trainer = trainer_of(with_regions)
        if not half:
            trainer.grad_scaler, trainer._autocast = None, lambda: torch.autocast("cpu", enabled=False)
        lines, before = said(trainer), weights_of(trainer)
        values = trainer.train_step(batch_of(trainer, num_full))
        assert all(np.isfinite(value) for value in values.values()) and not lines
        moved.append({name: p.detach() - before[name] for name, p in trainer.network.named_parameters()})
    distance = sum(((moved[0][name] - step) ** 2).sum() for name, step in moved[1].items()).sqrt()
    length = sum((step ** 2).sum() for step in moved[1].values()).sqrt()
    assert length > 0 and distance < 0.1 * length


def test_back_offs_of_the_scaler_are_reported_from_the_fifth_on(trainer_of):
    """They are normal at the start of a training: the first scale is too large on purpose."""
    trainer = trainer_of(False, scale=2.0 ** 40)
    lines, before = said(trainer), weights_of(trainer)
    batch = batch_of(trainer, 2)
    for step in range(1, 7):
        values = trainer.train_step(batch)
        assert np.isfinite(values["loss"]) and trainer.grad_scaler.get_scale() == 2.0 ** (40 - step)
        assert len(lines) == max(0, step - 4)
    assert all(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())
    assert "case_0" in lines[0] and "5 steps in a row" in lines[0]
    trainer.grad_scaler.update(2.0 ** 10)
    trainer.train_step(batch)
    assert trainer.divergence.count == 0
    assert any(not torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())


def test_a_loss_that_is_not_finite_is_reported_at_once_and_changes_nothing(trainer_of):
    trainer = trainer_of(False)
    lines, before = said(trainer), weights_of(trainer)
    trainer.train_step(batch_of(trainer, 2, value=float("inf")))
    assert len(lines) == 1 and "loss" in lines[0] and "case_0" in lines[0]
    assert all(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())


def test_a_teacher_that_fails_on_the_other_images_does_no_harm_while_the_kl_has_no_weight(trainer_of):
    trainer = trainer_of(False, kl_ramp_start=0.5, kl_ramp_end=1.0)
    lines, batch = said(trainer), batch_of(trainer, 2)
    batch["hint_mask"] = batch["target"][0] != trainer.label_manager.ignore_label
    trainer.network.teacher_decoder.register_forward_hook(
        lambda _, inputs, output: None if torch.is_grad_enabled() else output * float("nan"))
    values = trainer.train_step(batch)
    assert values["loss_kl"] == 0 and np.isfinite(values["loss"]) and not lines
    trainer.iteration = 10 ** 9
    assert not np.isfinite(trainer.train_step(batch)["loss_kl"])  # once it has, the hook is reached
