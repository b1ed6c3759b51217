"""What only a GPU can tell: autocast, gradient scaling and torch.compile, as nnU-Net uses them there by default."""
from __future__ import annotations

import json

import numpy as np
import pytest
import torch

HIPPOCAMPUS = "Dataset004_Hippocampus"
pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("base, batch_size", [("2d", 8), ("3d_fullres", 2), ("3d_fullres", 1)])
def test_a_short_training_on_a_gpu(nnunet, hippocampus, monkeypatch, compile, base, batch_size):
    from nnunetv2.run.run_training import run_training
    monkeypatch.setenv("nnUNet_compile", compile)
    configuration = nnunet.configure(HIPPOCAMPUS, f"{base}_cuda_{compile}_{batch_size}", base,
                                     {"epochs": 2, "iterations_per_epoch": 10, "seed": 0}, batch_size=batch_size)
    run_training(HIPPOCAMPUS, configuration, 0, "ConfKDTrainer", device=torch.device("cuda"))
    fold = nnunet.model(HIPPOCAMPUS, configuration) / "fold_0"
    curves = torch.load(fold / "checkpoint_final.pth", weights_only=False)["logging"]
    for term in ("train_losses", "loss_teacher", "loss_student", "loss_kl", "loss_entropy"):
        assert np.isfinite(curves[term]).all() and len(curves[term]) == 2
    for folder in ("validation", "validation_teacher"):
        assert len(json.loads((fold / folder / "summary.json").read_text())["metric_per_case"]) == 5
