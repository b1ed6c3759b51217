"""What all tests of this folder need."""
from __future__ import annotations

from multiprocessing.pool import ThreadPool

import pytest


@pytest.fixture(scope="module", autouse=True)
def no_processes_to_find_files():
    """nnU-Net forks twelve processes to find the files of a data set, which takes seconds; threads do the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
        yield
