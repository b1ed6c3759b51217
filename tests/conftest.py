"""Shared fixtures: the real data, and a workspace with nnU-Net's three folders and small prepared data sets."""
from __future__ import annotations

import os
from pathlib import Path

# read by nnU-Net at import: one process each, and no background workers that a failing test would leave behind
os.environ["nnUNet_def_n_proc"] = "1"
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ.pop("nnUNet_extTrainer", None)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config, items):
    """Without CUDA its tests are deselected: a skip would look like something that ought to run here."""
    import torch
    if not torch.cuda.is_available():
        cuda = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=cuda)
        items[:] = [item for item in items if item not in cuda]


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of the real data sets: CONFKD_TEST_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("CONFKD_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "hippocampus").is_dir():
        reason = f"no real data in {folder}; set CONFKD_TEST_DATA"
        # continuous integration has the data: there, a skip would hide that nothing was tested
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folder
