"""Simulated hints look like real annotations, on real images: see benchmarks/hint_realism.py.

Tolerances (of means over some hundreds of patches with three seeds; patients differ between the two halves):
- the share of hints in the padding: none on either side;
- how often a class has hints: 0.4 apart;
- voxels of a class: within a factor of 3;
- how far they lie from the border of the class, the nearest of them and all: within a factor of 3, and of 1.7 where
  most of an image is annotated (eroded masks of ACDC with background);
- the mean distance from the centre of the patch (0 to 1): 0.2 apart.
"""
from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STYLES = ("erosion", "erosion, no background", "points", "scribbles", "slices")
PATIENTS = 24


@pytest.fixture(scope="module")
def volumes(test_data):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import hint_realism
        yield hint_realism, cache(lambda name: hint_realism.load(name, test_data, PATIENTS))


SHORT = [("ACDC", "scribbles", "2d", 60), ("Hippocampus", "points", "3d", 30)]
ALL = [(name, style, dimension, batches) for dimension, batches in (("2d", 60), ("3d", 30))
       for name, styles in (("ACDC", (*STYLES, "expert scribbles")), ("Hippocampus", STYLES)) for style in styles]


@pytest.mark.parametrize("name, style, dimension, batches", [
    case if case in SHORT else pytest.param(*case, marks=pytest.mark.slow) for case in ALL])
def test_simulated_hints_look_like_real_annotations(volumes, name, style, dimension, batches):
    module, volumes_of = volumes
    with torch.random.fork_rng():
        found = module.compare(name, style, dimension, volumes_of(name), batches)
    compared = 0
    for of_class, measured in found.items():
        real, simulated = measured["real"], measured["simulated"]
        where = f"{name}, {dimension}, {style}, {of_class}: {real} {simulated}"
        assert abs(real["shown"] - simulated["shown"]) <= 0.4, where
        if real["voxels"] is None or simulated["voxels"] is None:
            assert style == "erosion, no background" and of_class == "background", where
            continue
        assert real["in padding"] == simulated["in padding"] == 0, where
        assert 1 / 3 <= simulated["voxels"] / real["voxels"] <= 3, where
        factor = 1.7 if (name, style) == ("ACDC", "erosion") else 3
        for distance in ("nearest", "depth"):
            assert 1 / factor <= simulated[distance] / real[distance] <= factor, where
        assert abs(simulated["off centre"] - real["off centre"]) <= 0.2, where
        compared += 1
    assert compared >= 2
