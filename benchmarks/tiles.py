"""nnU-Net's sliding window with several tiles at once, for the CPU.

nnU-Net predicts one tile after the other. Small 2-D tiles keep a CPU from being used well, so this takes half of the
time. The logits are nnU-Net's up to rounding (`tests/system/test_benchmarks.py`).
"""
from __future__ import annotations

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

AT_ONCE = 16


def many_at_once() -> None:
    """Let all predictions of this process, which are on the CPU, take several tiles at once."""
    nnUNetPredictor._internal_predict_sliding_window_return_logits = _predict


@torch.inference_mode()
def _predict(self: nnUNetPredictor, data: torch.Tensor, slicers: list[tuple], _on_device: bool = False) -> torch.Tensor:
    """Predict an image, `(channels, *spatial)`, tile by tile. Returns its logits, `(heads, *spatial)`."""
    weight = compute_gaussian(tuple(self.configuration_manager.patch_size), sigma_scale=1 / 8, value_scaling_factor=10,
                              device=data.device)
    logits = torch.zeros((self.label_manager.num_segmentation_heads, *data.shape[1:]), dtype=torch.half)
    total = torch.zeros(data.shape[1:], dtype=torch.half)
    for first in range(0, len(slicers), AT_ONCE):
        some = slicers[first:first + AT_ONCE]
        tiles = self._internal_maybe_mirror_and_predict(torch.stack([data[tile] for tile in some]))
        for tile, prediction in zip(some, tiles):
            logits[tile] += prediction * weight
            total[tile[1:]] += weight
    return logits.div_(total)
