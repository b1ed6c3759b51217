"""Fixtures of the tests of training."""
from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from types import SimpleNamespace

import pytest

HIPPOCAMPUS = "Dataset004_Hippocampus"
HIDDEN = "Dataset016_Hidden"


@pytest.fixture
def split(nnunet, hippocampus):
    """Writes another split, None for no file; the former one comes back at the end."""
    file = nnunet.preprocessed(HIPPOCAMPUS) / "splits_final.json"
    before = file.read_text()
    yield lambda folds: file.unlink() if folds is None else file.write_text(json.dumps(folds))
    file.write_text(before)


@pytest.fixture(autouse=True)
def threads_in_place_of_processes(request, monkeypatch):
    """Let threads preprocess, and write and measure the segmentations of the final validation, except in slow tests.

    Starting a process takes longer than everything that it would do here. The session's `hippocampus_model` is
    validated with processes all the same: it is made before this fixture.
    """
    if "nnunet" not in request.fixturenames or request.node.get_closest_marker("slow"):
        return
    from nnunetv2.evaluation import evaluate_predictions
    from nnunetv2.preprocessing.preprocessors import default_preprocessor

    from nnunet_confkd.training import validation
    monkeypatch.setattr(validation, "ProcessPoolExecutor", lambda number, context: ThreadPoolExecutor(number))
    threads = SimpleNamespace(get_context=lambda method: SimpleNamespace(Pool=ThreadPool))
    for module in (evaluate_predictions, default_preprocessor):
        monkeypatch.setattr(module, "multiprocessing", threads)


@pytest.fixture(scope="session")
def hidden_classes(nnunet, test_data) -> dict[str, list[str]]:
    """The cases, by role, of Dataset016_Hidden: real Hippocampus images with three classes, planned and preprocessed.

    The posterior part is halved into "body" and "tail". A role is what its cases are annotated for: everything, the
    classes in its name, or points of the tail alone.
    """
    from nnunet_confkd.data.case_files import Case
    from nnunet_confkd.data.images import Volume
    from nnunet_confkd.data.raw_format import Dataset, write_dataset
    from nnunet_confkd.data.weaken import weakened
    labels = {"background": 0, "anterior": 1, "body": 2, "tail": 3, "ignore": 4}
    roles = {"full": 2, "validation": 1, "anterior": 2, "body tail": 2, "anterior body": 1, "anterior tail": 1,
             "tail points": 1}
    files = iter(sorted((test_data / "hippocampus" / "labelsTr").glob("*.nii.gz")))
    cases, training, table = {}, [], {}
    for role, number in roles.items():
        for file in (next(files) for _ in range(number)):
            image = test_data / "hippocampus" / "imagesTr" / file.name
            case = Case(file.name.removesuffix(".nii.gz"), (Volume(image),),
                        Volume(_in_three_classes(file, nnunet.folder / "three")))
            if role not in ("full", "validation"):
                table[case.name] = role.removesuffix(" points").split()
                case = weakened(case, "partial", labels, "points" if "points" in role else None, 0, table[case.name])
            cases.setdefault(role, []).append(case.name)
            training.append(case)
    write_dataset(Dataset(HIDDEN[11:], ["MRI"], labels, ".nii.gz", training, more={"annotated_classes": table}),
                  int(HIDDEN[7:10]), processes=1)
    training = [case for role in cases for case in cases[role] if role != "validation"]
    nnunet.prepare(HIDDEN, ["2d", "3d_fullres"], {"train": sorted(training), "val": cases["validation"]})
    return cases


def _in_three_classes(file, folder):
    """Write a label of Hippocampus with its second class halved, and return the new file."""
    import numpy as np

    from nnunet_confkd.data.images import read, write
    folder.mkdir(exist_ok=True)
    picture = read(file)
    label = picture.voxels[0].astype(np.uint8)
    middle = int(np.median(np.nonzero(label == 2)[1]))
    label[:, middle:][label[:, middle:] == 2] = 3
    write(folder / file.name, label, picture.geometry)
    return folder / file.name
