"""A small mixed-supervision data set for the demo, out of a folder in the layout of an MSD task or of nnU-Net's raw format."""
from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_confkd.errors import InputError
from nnunet_confkd.weaken import weaken_dataset

ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")
# enough to see the method work within minutes on two CPU cores
LIMITS = {"test": 8, "validation": 5, "full": 5, "unlabelled": 10, "partial": 30}


def import_dataset(source: Path, raw: Path, seed: int = 0, limits: dict[str, int] | None = None) -> dict[str, list[str]]:
    """Write some of the cases of `source` as a mixed data set in nnU-Net's raw format.

    source: holds `imagesTr`, `labelsTr` and, unless the labels are to be read from the label files, `dataset.json`.
        Fully labelled data are weakened: some cases stay full, some keep points only, some nothing; data that have an
        "ignore" label already are taken as they are.
    raw: the folder to write; must not exist. The source is only read.
    limits: at most how many cases of each role; default `LIMITS`.
    Returns the cases by role: full, partial, unlabelled, validation, test.
    Raises InputError where the folder has another layout, or too few fully labelled cases.
    """
    limits = LIMITS if limits is None else limits
    labels, ending, channels = _read_layout(source)
    cases = sorted(f.name[:-len(ending)] for f in (source / "labelsTr").iterdir()
                   if f.name.endswith(ending) and not f.name.startswith("."))
    random.Random(seed).shuffle(cases)
    mixed = "ignore" in labels
    full = [c for c in cases if not mixed or _is_full(source / "labelsTr" / (c + ending), labels["ignore"])]
    if len(full) < 3:
        raise InputError(f"{source}: has {len(full)} fully labelled cases; the demo needs 3 at least, one each to train, to "
                         f"validate and to test on")
    # of a small data set a fifth each for test and validation
    held_back = {role: min(limits[role], max(1, len(full) // 5)) for role in ("test", "validation")}
    rest = iter(full)
    roles = {role: [next(rest) for _ in range(count)] for role, count in held_back.items()}
    roles["full"] = [case for _, case in zip(range(limits["full"]), rest)]
    others = iter([c for c in cases if c not in full] if mixed else rest)
    if mixed:
        roles |= {"partial": [c for _, c in zip(range(limits["partial"]), others)], "unlabelled": []}
    else:
        others = list(others)[:limits["partial"] + limits["unlabelled"]]
        cut = len(others) * limits["unlabelled"] // (limits["partial"] + limits["unlabelled"])
        roles |= {"unlabelled": others[:cut], "partial": others[cut:]}

    target = raw if mixed else raw.with_name("fully_labelled")
    _copy_cases(source, target, roles, labels, ending, channels)
    if not mixed:
        weaken_dataset(target, raw, full=roles["full"], keep=roles["validation"], unlabelled=roles["unlabelled"], seed=seed)
        shutil.rmtree(target)
    return roles


def _read_layout(source: Path) -> tuple[dict, str, dict | None]:
    """Labels by name, file ending, and nnU-Net's channel names (None: MSD's layout, one file a case)."""
    missing = [name for name in ("imagesTr", "labelsTr") if not (source / name).is_dir()]
    if missing:
        raise InputError(f"{source}: has no {' and no '.join(missing)}; give a folder in the layout of an MSD task or of "
                         f"nnU-Net's raw format")
    described = json.loads((source / "dataset.json").read_text()) if (source / "dataset.json").is_file() else {}
    names = [f.name for f in sorted((source / "labelsTr").iterdir()) if not f.name.startswith(".")]
    ending = described.get("file_ending") or next((e for e in ENDINGS if names and names[0].endswith(e)), None)
    if ending is None:
        raise InputError(f"{source / 'labelsTr'}: holds no label files ({', '.join(ENDINGS)})")
    if "channel_names" in described:
        return described["labels"], ending, described["channel_names"]
    if "labels" in described:  # MSD: value to name
        return {name: int(value) for value, name in described["labels"].items()} | {"background": 0}, ending, None
    highest = max(int(sitk.GetArrayFromImage(sitk.ReadImage(str(source / "labelsTr" / name))).max()) for name in names)
    print(f"no dataset.json in {source}: labels 0 to {highest}, as in the label files")
    return {"background": 0, **{f"label_{i}": i for i in range(1, highest + 1)}}, ending, None


def _is_full(label_file: Path, ignore_label: int) -> bool:
    return not np.any(sitk.GetArrayFromImage(sitk.ReadImage(str(label_file))) == ignore_label)


def _copy_cases(source: Path, target: Path, roles: dict, labels: dict, ending: str, channels: dict | None) -> None:
    for name in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
        (target / name).mkdir(parents=True)
    number = len(channels or {})
    for role, cases in roles.items():
        split = "Ts" if role == "test" else "Tr"
        for case in cases:
            shutil.copyfile(source / "labelsTr" / (case + ending), target / f"labels{split}" / (case + ending))
            if channels is None:
                number = _split_channels(source / "imagesTr" / (case + ending), target / f"images{split}" / case, ending)
            else:
                for c in range(number):
                    name = f"{case}_{c:04d}{ending}"
                    shutil.copyfile(source / "imagesTr" / name, target / f"images{split}" / name)
    training = sum(len(cases) for role, cases in roles.items() if role != "test")
    (target / "dataset.json").write_text(json.dumps({
        "channel_names": channels or {str(c): f"channel_{c}" for c in range(number)}, "labels": labels,
        "numTraining": training, "file_ending": ending}, indent=4))


def _split_channels(file: Path, target: Path, ending: str) -> int:
    """An MSD image, 3-D or 4-D (channels last in the file), as nnU-Net's one file a channel. Returns their number."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    if reader.GetDimension() == 3:
        shutil.copyfile(file, f"{target}_0000{ending}")
        return 1
    image = reader.Execute()
    for c in range(image.GetSize()[3]):
        sitk.WriteImage(image[..., c], f"{target}_{c:04d}{ending}")
    return image.GetSize()[3]
