"""Shared fixtures: real data, workspaces with nnU-Net's three folders, small prepared data sets and a trained model.

With pytest-xdist every worker is a process of its own, so it has its own session fixtures and its own workspace.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

# nnU-Net reads these when it is imported. A failing test must leave no background workers behind.
os.environ["nnUNet_def_n_proc"] = "1"
os.environ["nnUNet_n_proc_DA"] = "0"
# The tensors of these tests are so small that several threads mostly wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("nnUNet_extTrainer", None)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TINY = {"features": (8, 16, 16), "batch_size": 4, "max_patch": 32}
HIPPOCAMPUS = "Dataset004_Hippocampus"
COLLECTED = pytest.StashKey[list]()  # the ids of the tests of this run


# ---- which tests run -----------------------------------------------------------------------------------------------

def pytest_addoption(parser):
    parser.addoption("--deadline", type=float, metavar="TIME",
                     help="a moment, in seconds since 1970 (`date +%%s`); slow tests that have not begun by then are "
                          "not run, and the summary lists them")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    """Report a slow test as not run, instead of running it, after the deadline."""
    deadline = item.config.getoption("--deadline")
    if deadline is None or time.time() < deadline or not item.get_closest_marker("slow"):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.ihook.pytest_runtest_logreport(report=pytest.TestReport(
        item.nodeid, item.location, {}, outcome="skipped", longrepr=None, when="setup", after_deadline=True))
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report):
    """Count these tests apart from skipped ones: they could have run here."""
    return ("not run", "n", "NOT RUN") if getattr(report, "after_deadline", False) else None


def pytest_collection_finish(session):
    session.config.stash[COLLECTED] = [item.nodeid for item in session.items]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(node, ids):
    node.config.stash[COLLECTED] = ids


def pytest_terminal_summary(terminalreporter, config):
    """List the tests that did not begin in time, and those that were stopped."""
    finished = {report.nodeid for reports in terminalreporter.stats.values() for report in reports
                if getattr(report, "when", None) == "teardown"}
    not_run = sorted({*config.stash.get(COLLECTED, ())} - finished)
    if not_run and config.getoption("--deadline") is not None:
        terminalreporter.section(f"{len(not_run)} tests were not run, or not to their end, for lack of time")
        terminalreporter.write_line("\n".join(not_run))


def pytest_collection_modifyitems(config, items):
    """Deselect the tests of CUDA where there is none: a skip would look like something that ought to run here."""
    import torch
    if not torch.cuda.is_available():
        cuda = [item for item in items if item.get_closest_marker("cuda")]
        config.hook.pytest_deselected(items=cuda)
        items[:] = [item for item in items if item not in cuda]


NO_RIGHT_TO_LINK = 1314  # Windows: ERROR_PRIVILEGE_NOT_HELD


def skipped_without_the_right_to_link(error: OSError):
    """Skip a test that Windows does not let make symbolic links; raise all other errors."""
    if getattr(error, "winerror", None) == NO_RIGHT_TO_LINK:
        pytest.skip("Windows lets this user make no symbolic links: run as administrator, or in developer mode")
    raise error


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    try:
        return (yield)
    except OSError as error:
        skipped_without_the_right_to_link(error)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    try:
        return (yield)
    except OSError as error:
        skipped_without_the_right_to_link(error)


# ---- what all tests share ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of the real data sets: $CONFKD_TEST_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("CONFKD_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "hippocampus").is_dir():
        reason = f"no real data in {folder}; set CONFKD_TEST_DATA"
        # Continuous integration has the data. There, a skip would hide that nothing was tested.
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Keep PyTorch to one thread: nnU-Net's commands set as many as there are cores, and leave it so."""
    import torch
    with pytest.MonkeyPatch.context() as patch:
        set_num_threads = torch.set_num_threads
        patch.setattr(torch, "set_num_threads", lambda number: set_num_threads(min(number, 1)))
        torch.set_num_threads(1)
        yield


@contextmanager
def pools_of_threads() -> Iterator[None]:
    """Run the work of process pools, nnU-Net's and this package's, in threads of this process.

    A spawned process takes seconds, because it imports PyTorch. Where a test is about the processes themselves, it must
    not use this.
    """
    from nnunetv2.utilities import utils

    def pool(self, processes=None, initializer=None, initargs=(), maxtasksperchild=None):
        return ThreadPool(processes, initializer, initargs)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as threads:
        patch.setattr(BaseContext, "Pool", pool)
        patch.setattr(utils, "Pool", ThreadPool)
        patch.setattr(ProcessPoolExecutor, "submit", lambda self, function, /, *args: threads.submit(function, *args))
        yield


@pytest.fixture(scope="module")
def thread_pools() -> Iterator[None]:
    """:func:`pools_of_threads` from here to the end of the module."""
    with pools_of_threads():
        yield


# ---- nnU-Net's folders ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="session", autouse=True)
def no_processes_to_list_files():
    """nnU-Net forks twelve processes to sort the names of a folder's files, which takes longer than most tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nnunetv2.utilities.utils.Pool", ThreadPool)
        yield


class Workspace:
    """nnU-Net's three folders, and its steps in this process."""

    session: Workspace | None = None  # the one that is active between the tests

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("raw", "preprocessed", "results"):
            (folder / name).mkdir(parents=True)
        self.activate()

    def activate(self) -> None:
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(self.folder / name)

    def copy(self, folder: Path, *datasets: str, models: bool = False) -> Workspace:
        """Copy data sets (raw and preprocessed) to a new workspace, with their models if asked for, and activate it."""
        new = Workspace(folder)
        for dataset in datasets:
            for name in ("raw", "preprocessed", "results") if models else ("raw", "preprocessed"):
                if (self.folder / name / dataset).is_dir():
                    shutil.copytree(self.folder / name / dataset, folder / name / dataset)
        return new

    def raw(self, dataset: str) -> Path:
        return self.folder / "raw" / dataset

    def preprocessed(self, dataset: str) -> Path:
        return self.folder / "preprocessed" / dataset

    def model(self, dataset: str, configuration: str, trainer: str = "ConfKDTrainer",
              plans: str = "nnUNetPlans") -> Path:
        return self.folder / "results" / dataset / f"{trainer}__{plans}__{configuration}"

    def prepare(self, dataset: str, configurations: list[str], split: dict | None = None) -> None:
        """Plan and preprocess a data set, in threads, and write its split."""
        from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

        from nnunet_confkd.demo.demo import plan_and_preprocess
        with pools_of_threads(), pytest.MonkeyPatch.context() as patch:
            # nnU-Net draws 10 ** 8 intensities, hundreds of times more than images as small as these have voxels.
            patch.setattr(DatasetFingerprintExtractor, "num_foreground_voxels_for_intensitystats",
                          property(lambda self: 1e6, lambda self, value: None), raising=False)
            plan_and_preprocess(int(dataset[7:10]), configurations)
        if split is not None:
            (self.preprocessed(dataset) / "splits_final.json").write_text(json.dumps([split]))

    def configure(self, dataset: str, name: str, base: str, confkd: dict | None = None, **options) -> str:
        """Add a tiny configuration to the plans under a name of its own, and return this name.

        By default there is a KL, which our trainer would leave out with the few points of the data sets below.
        """
        from nnunet_confkd.data.small_configuration import add_small_configuration
        if confkd is None or isinstance(confkd, dict):
            confkd = {"weight_kl": 3.0} | (confkd or {})
        add_small_configuration(self.preprocessed(dataset) / "nnUNetPlans.json", name, base, confkd, **TINY | options)
        return name

    def trainer(self, dataset: str, configuration: str, trainer: str = "ConfKDTrainer", fold: int | str = 0,
                continue_training: bool = False):
        """Make a trainer as nnUNetv2_train does."""
        import torch
        from nnunetv2.run.run_training import get_trainer_from_args
        return get_trainer_from_args(dataset, configuration, fold, trainer, continue_training=continue_training,
                                     device=torch.device("cpu"))

    def train(self, dataset: str, configuration: str, trainer: str = "ConfKDTrainer", fold: int | str = 0,
              **options) -> Path:
        """Train as nnUNetv2_train does, on the CPU, with the final validation in threads; return the fold's folder."""
        import torch
        from nnunetv2.run.run_training import run_training
        with pools_of_threads():
            run_training(dataset, configuration, fold, trainer, device=torch.device("cpu"), **options)
        return self.model(dataset, configuration, trainer) / f"fold_{fold}"


@pytest.fixture(scope="session")
def nnunet(tmp_path_factory) -> Iterator[Workspace]:
    """The workspace that all tests share. A test that changes what others read uses `own_hippocampus` instead."""
    import matplotlib

    from nnunet_confkd.discovery import make_findable
    make_findable()
    Workspace.session = Workspace(tmp_path_factory.mktemp("nnunet"))
    with matplotlib.rc_context({"savefig.dpi": 10}):  # nnU-Net writes a picture of 16 million pixels in each epoch
        yield Workspace.session


@pytest.fixture(autouse=True)
def workspace_after_every_test() -> Iterator[None]:
    """Activate the shared workspace again: some tests leave nnU-Net's folders set elsewhere."""
    yield
    if Workspace.session:
        Workspace.session.activate()


@pytest.fixture(scope="session")
def run_ranks():
    """A function that runs a test file as two ranks, each by `python FILE RANK FOLDER OPTIONS...`.

    It returns what each rank has saved in `FOLDER/rankN.pt`, and fails if they hang or crash.
    """
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
    """A function that reads the splits of a fully annotated data set and checks that each case validates once."""
    def read(dataset: str, number: int = 5) -> list[dict]:
        raw, preprocessed = (Path(os.environ[f"nnUNet_{name}"]) / dataset for name in ("raw", "preprocessed"))
        cases = sorted(json.loads((raw / "dataset.json").read_text())["supervision"])
        folds = json.loads((preprocessed / "splits_final.json").read_text())
        assert len(folds) == number and sorted(case for fold in folds for case in fold["val"]) == cases
        assert all(sorted(fold["train"] + fold["val"]) == cases and fold["val"] for fold in folds)
        return folds

    return read


@pytest.fixture
def nnunet_folders(tmp_path, monkeypatch) -> Path:
    """A folder with nnU-Net's three folders, empty, as the environment variables name them."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / "nnunet" / name).mkdir(parents=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / "nnunet" / name))
    return tmp_path / "nnunet"


@pytest.fixture
def require_integrity(monkeypatch, capfd):
    """Require that nnU-Net's verify_dataset_integrity has nothing to say about a raw folder.

    It runs in threads, because processes take seconds to start.
    """
    from nnunetv2.experiment_planning import verify_dataset_integrity as module
    threads = SimpleNamespace(get_context=lambda _: SimpleNamespace(Pool=ThreadPool))
    monkeypatch.setattr(module, "multiprocessing", threads)

    def verify(folder: Path) -> None:
        capfd.readouterr()
        module.verify_dataset_integrity(str(folder), 1)
        printed = capfd.readouterr().out
        assert "verify_dataset_integrity Done" in printed
        assert not any(word in printed.lower() for word in ("warning", "error:", "mismatch")), printed

    return verify


# ---- data sets and models ------------------------------------------------------------------------------------------

@pytest.fixture(scope="session")
def hippocampus(nnunet, test_data) -> dict[str, list[str]]:
    """The cases, by role, of real MSD Hippocampus as Dataset004, planned and preprocessed for 2-D and 3-D.

    5 training cases are fully annotated, 30 have points, 10 are unlabelled.
    """
    from nnunet_confkd.demo.data import import_dataset
    roles = import_dataset(test_data / "hippocampus", 4, HIPPOCAMPUS[11:], seed=1, style="points")
    training = [*roles["full"], *roles["partial"], *roles["unlabelled"]]
    nnunet.prepare(HIPPOCAMPUS, ["2d", "3d_fullres"], {"train": sorted(training), "val": sorted(roles["validation"])})
    return roles


@pytest.fixture
def own_hippocampus(nnunet, hippocampus, tmp_path) -> Workspace:
    """A private, active workspace with a copy of the Hippocampus data, for a test that changes them."""
    return nnunet.copy(tmp_path / "nnunet", HIPPOCAMPUS)


@pytest.fixture(scope="session")
def hippocampus_model(nnunet, hippocampus) -> Path:
    """The folder of a ConfKD model that was trained on it for one short epoch, and validated with probabilities."""
    nnunet.configure(HIPPOCAMPUS, "2d_export", "2d", {"epochs": 1, "iterations_per_epoch": 5, "seed": 3,
                                                      "teacher_width": 1})  # so that the teacher can be exported
    nnunet.train(HIPPOCAMPUS, "2d_export", export_validation_probabilities=True)
    return nnunet.model(HIPPOCAMPUS, "2d_export")


@pytest.fixture(scope="session")
def regions(nnunet, hippocampus) -> str:
    """The name of a small copy of the Hippocampus data whose targets are overlapping regions."""
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
