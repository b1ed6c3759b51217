"""Shared fixtures: the real data, and a workspace with nnU-Net's three folders and small prepared data sets."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

# read by nnU-Net at import: one process each, and no background workers that a failing test would leave behind
os.environ["nnUNet_def_n_proc"] = "1"
os.environ["nnUNet_n_proc_DA"] = "0"
# two threads that wait for each other are slower than one on tensors as small as these, by far on a busy machine
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("nnUNet_extTrainer", None)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = {"features": (8, 16, 16), "batch_size": 4, "max_patch": 32}


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


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """nnU-Net's commands set as many threads as there are cores, and leave it so."""
    import torch
    with pytest.MonkeyPatch.context() as patch:
        set_num_threads = torch.set_num_threads
        patch.setattr(torch, "set_num_threads", lambda number: set_num_threads(min(number, 1)))
        torch.set_num_threads(1)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_processes_to_list_files():
    """nnU-Net forks twelve processes to sort the names of a folder's files, which takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
        yield


class Workspace:
    """nnU-Net's three folders, and its steps in this process."""

    made: list[Workspace] = []  # the session's one, once there is one

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir()
        self.made.append(self)
        self.activate()

    def activate(self) -> None:
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(self.folder / name)

    def raw(self, dataset: str) -> Path:
        return self.folder / "raw" / dataset

    def preprocessed(self, dataset: str) -> Path:
        return self.folder / "preprocessed" / dataset

    def model(self, dataset: str, configuration: str, trainer: str = "ConfKDTrainer", plans: str = "nnUNetPlans") -> Path:
        return self.folder / "results" / dataset / f"{trainer}__{plans}__{configuration}"

    def prepare(self, dataset: str, configurations: list[str], split: dict | None = None) -> None:
        """Plan and preprocess; write the split."""
        from nnunet_confkd.demo.demo import plan_and_preprocess
        plan_and_preprocess(int(dataset[7:10]), configurations)
        if split is not None:
            (self.preprocessed(dataset) / "splits_final.json").write_text(json.dumps([split]))

    def configure(self, dataset: str, name: str, base: str, confkd: dict | None = None, **options) -> str:
        """Add a tiny configuration of its own name to the plans."""
        from nnunet_confkd.demo.demo import add_small_configuration
        add_small_configuration(self.preprocessed(dataset) / "nnUNetPlans.json", name, base, confkd, **TINY | options)
        return name

    def trainer(self, dataset: str, configuration: str, trainer: str = "ConfKDTrainer", fold: int | str = 0,
                continue_training: bool = False):
        """A trainer as nnUNetv2_train makes it."""
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args
        return get_trainer_from_args(dataset, configuration, fold, trainer, continue_training=continue_training,
                                     device=torch.device("cpu"))

    def train(self, dataset: str, configuration: str, trainer: str = "ConfKDTrainer", fold: int | str = 0,
              **options) -> Path:
        """nnUNetv2_train on the CPU; returns the fold's folder."""
        import torch
        from nnunetv2.run.run_training import run_training
        run_training(dataset, configuration, fold, trainer, device=torch.device("cpu"), **options)
        return self.model(dataset, configuration, trainer) / f"fold_{fold}"


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory) -> Workspace:
    from nnunet_confkd.discovery import make_findable
    make_findable()
    return Workspace(tmp_path_factory.mktemp("nnunet"))


@pytest.fixture(autouse=True)
def workspace_after_every_test():
    """Some tests (the demo's) leave nnU-Net's folders set elsewhere, in whatever order the files are run."""
    yield
    for workspace in Workspace.made:
        workspace.activate()


@pytest.fixture(scope="session")
def run_ranks():
    """Runs a test file as the worker of two ranks, `python FILE RANK FOLDER OPTIONS...`, and returns what each has saved in
    `FOLDER/rankN.pt`; fails where they hang or crash."""
    def run(file: str, folder: Path, *options: str) -> list[dict]:
        import torch
        logs = [folder / f"rank{rank}.log" for rank in range(2)]
        processes = [subprocess.Popen([sys.executable, file, str(rank), str(folder), *options], stdout=log.open("w"),
                                      stderr=subprocess.STDOUT, env={**os.environ, "nnUNet_compile": "false"})
                     for rank, log in enumerate(logs)]
        try:
            for process, log in zip(processes, logs):
                assert process.wait(timeout=300) == 0, log.read_text()
        except subprocess.TimeoutExpired:
            pytest.fail("the ranks hang")
        finally:
            for process in processes:
                process.kill()
        return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]

    return run


@pytest.fixture
def crossvalidation():
    """Reads the splits_final.json of a data set all of whose cases are full, and checks that each validates in one fold."""
    def read(dataset: str, number: int = 5) -> list[dict]:
        raw, preprocessed = (Path(os.environ[f"nnUNet_{name}"]) / dataset for name in ("raw", "preprocessed"))
        cases = sorted(json.loads((raw / "dataset.json").read_text())["supervision"])
        folds = json.loads((preprocessed / "splits_final.json").read_text())
        assert len(folds) == number and sorted(case for fold in folds for case in fold["val"]) == cases
        assert all(sorted(fold["train"] + fold["val"]) == cases and fold["val"] for fold in folds)
        return folds

    return read


HIPPOCAMPUS = "Dataset004_Hippocampus"


@pytest.fixture(scope="session")
def hippocampus(nnunet, test_data) -> dict[str, list[str]]:
    """Real MSD Hippocampus as Dataset004: 5 full, 30 point-labelled, 10 unlabelled training cases; 2-D and 3-D. Returns
    the cases by role."""
    from nnunet_confkd.demo.data import import_dataset
    roles = import_dataset(test_data / "hippocampus", 4, HIPPOCAMPUS[11:], seed=1)
    training = [*roles["full"], *roles["partial"], *roles["unlabelled"]]
    nnunet.prepare(HIPPOCAMPUS, ["2d", "3d_fullres"], {"train": sorted(training), "val": sorted(roles["validation"])})
    return roles


@pytest.fixture(scope="session")
def hippocampus_model(nnunet, hippocampus) -> Path:
    """A ConfKD model of one short epoch on it, with probabilities: the model folder."""
    nnunet.configure(HIPPOCAMPUS, "2d_export", "2d", {"epochs": 1, "iterations_per_epoch": 5, "seed": 3})
    nnunet.train(HIPPOCAMPUS, "2d_export", export_validation_probabilities=True)
    return nnunet.model(HIPPOCAMPUS, "2d_export")


@pytest.fixture(scope="session")
def regions(nnunet, hippocampus) -> str:
    """A small copy of the Hippocampus data with overlapping regions as targets: its name."""
    name = "Dataset005_Regions"
    raw = nnunet.raw(name)
    source = nnunet.raw(HIPPOCAMPUS)
    described = json.loads((source / "dataset.json").read_text())
    cases = {**{c: "full" for c in hippocampus["full"][:2] + hippocampus["validation"][:1]},
             **{c: "partial" for c in hippocampus["partial"][:3]}}
    for split in ("imagesTr", "labelsTr"):
        (raw / split).mkdir(parents=True)
    for case in cases:
        shutil.copyfile(source / "imagesTr" / f"{case}_0000.nii.gz", raw / "imagesTr" / f"{case}_0000.nii.gz")
        shutil.copyfile(source / "labelsTr" / f"{case}.nii.gz", raw / "labelsTr" / f"{case}.nii.gz")
    described |= {"labels": {"background": 0, "whole": [1, 2], "posterior": [2], "ignore": 3},
                  "regions_class_order": [1, 2], "numTraining": len(cases), "supervision": cases}
    (raw / "dataset.json").write_text(json.dumps(described))
    validation = hippocampus["validation"][:1]
    nnunet.prepare(name, ["3d_fullres"], {"train": sorted(set(cases) - set(validation)), "val": validation})
    return name
