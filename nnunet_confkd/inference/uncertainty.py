"""Where a prediction is in doubt: voxel-wise entropy beside each segmentation, and the order in which to look at the cases.

nnU-Net's own code predicts, resamples and writes the segmentation. The maps are measured from the logits that it has
resampled to the original grid, on their way to the segmentation: nothing is resampled twice, no probabilities are stored,
and the segmentation is the same to the bit.
"""
from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from nnunet_confkd.inference.prediction import ExportingPredictor, export_and_measure, max_entropy
from nnunet_confkd.training.network import unwrap

FOLDER, NATS, NORMALISED, SCORES = "uncertainty", "entropy_nats", "entropy_normalised", "scores"
REVIEW = "review_first"  # .csv and .json
# normalised entropy from which a voxel of the predicted background counts among those that a case is judged by
IN_DOUBT = 0.1


# ---- writing --------------------------------------------------------------------------------------------------------

class _Floats(np.ndarray):
    """An array that stays as it is where nnU-Net's writers of segmentations make integers of it."""

    def astype(self, *_, **__):
        return self


def map_ending(file_ending: str) -> str:
    """The ending of the files of maps: the data set's, but .tif for formats that hold no floating point numbers."""
    return ".tif" if file_ending.lower() in (".png", ".bmp") else file_ending


def write_map(file: str | Path, voxels: np.ndarray, properties: dict, reader_writer) -> None:
    """Write a float32 map as nnU-Net writes a segmentation: the same code lays it where the segmentation lies.

    voxels: on the segmentation's grid. reader_writer: an instance of nnU-Net's. Raises OSError where what was written is
    not what was to be written: some of the libraries do not tell of a full disk.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.ascontiguousarray(voxels, np.float32)
    file.unlink(missing_ok=True)
    reader_writer.write_seg(voxels.view(_Floats), str(file), properties)
    if not np.array_equal(reader_writer.read_seg(str(file))[0][0], voxels):
        raise OSError(f"{file}: was not written as it should be; is the disk full?")


def case_score(normalised: np.ndarray, segmentation: np.ndarray, where: np.ndarray | None = None) -> dict:
    """How much a case is in doubt, and what that comes from.

    normalised: entropy, 0 to 1. where: the voxels that count, None: all. "score": the mean over the voxels that are
    predicted as foreground or are in doubt themselves (`IN_DOUBT` or more), so that a large empty surrounding does not
    count; 0 where there are none.
    """
    if where is not None:
        normalised, segmentation = normalised[where], segmentation[where]
    foreground = segmentation != 0
    judged = normalised[foreground | (normalised >= IN_DOUBT)]
    return {"score": float(judged.mean(dtype=np.float64)) if judged.size else 0.0,
            "mean_normalised_entropy": float(normalised.mean(dtype=np.float64)) if normalised.size else 0.0,
            "voxels": int(normalised.size), "foreground_voxels": int(foreground.sum()), "judged_voxels": int(judged.size)}


def write_review_list(folder: Path, rows: list[dict], about: dict) -> list[dict]:
    """Write `review_first.csv` and `.json`, the cases of the highest score first; returns them in that order."""
    rows = sorted(rows, key=lambda row: (-row["score"], row["case"]))
    rows = [{"rank": i, **row} for i, row in enumerate(rows, 1)]
    _write_text(folder / f"{REVIEW}.json", json.dumps({**about, "cases": rows}, indent=2) + "\n")
    aside = folder / f".{REVIEW}.{os.getpid()}.csv"
    with open(aside, "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)) or ["rank", "case"])
        table.writeheader()
        table.writerows(rows)
    aside.replace(folder / f"{REVIEW}.csv")
    return rows


def _write_text(file: Path, text: str) -> None:
    """Whole or not at all: other parts of the same prediction may read it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


# ---- predicting -----------------------------------------------------------------------------------------------------





class EntropyPredictor(ExportingPredictor):
    """nnU-Net's predictor that leaves the folder `uncertainty` in its output folder, too."""

    def exporter(self) -> Callable:
        return partial(_export_with_entropy, branch=getattr(unwrap(self.network), "branch", None))

    def _manage_input_and_output_lists(self, sources, output, previous=None, overwrite=True, part_id=0, num_parts=1,
                                       save_probabilities=False):
        """With overwrite=False nnU-Net leaves out what is there; here the entropy must be there, too."""
        EntropyPredictor.output = Path(output)
        lists = super()._manage_input_and_output_lists(sources, output, previous, True, part_id, num_parts, save_probabilities)
        if overwrite:
            return lists
        endings = [self.dataset_json["file_ending"]] + [".npz"] * save_probabilities
        missing = [i for i, file in enumerate(lists[1])
                   if not all(Path(file + ending).is_file() for ending in endings) or not _score_file(file).is_file()]
        print(f"{len(lists[1]) - len(missing)} of these are there already, with their entropy; {len(missing)} are predicted")
        return tuple([items[i] for i in missing] for items in lists)


def _score_file(output: str) -> Path:
    """output: of nnU-Net's prediction, without its ending."""
    file = Path(output)
    return file.parent / FOLDER / SCORES / f"{file.name}.json"


def _export_with_entropy(logits, properties, configuration_manager, plans_manager, dataset_json, output, *args, branch=None,
                         **kwargs) -> None:
    score_file = _score_file(output)
    score_file.unlink(missing_ok=True)  # written last: then the case is complete
    segmentation, maps = export_and_measure(logits, properties, configuration_manager, plans_manager, dataset_json, output,
                                            *args, **kwargs)
    labels = plans_manager.get_label_manager(dataset_json)
    normalised = maps["entropy"] / np.float32(max_entropy(labels.num_segmentation_heads, labels.has_regions))
    name = f"{Path(output).name}{map_ending(dataset_json['file_ending'])}"
    for kind, voxels in ((NATS, maps["entropy"]), (NORMALISED, normalised)):
        write_map(score_file.parent.parent / kind / name, voxels, properties, plans_manager.image_reader_writer_class())
    row = {"case": Path(output).name, "branch": branch, **case_score(normalised, segmentation)}
    score_file.parent.mkdir(parents=True, exist_ok=True)
    _write_text(score_file, json.dumps(row))


def list_cases(output: Path) -> Path:
    """Write the list of all cases in the folder `uncertainty` of an output folder, of earlier runs and other parts, too."""
    folder = output / FOLDER
    rows = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((folder / SCORES).glob("*.json"))
            if not file.name.startswith(".")]
    folder.mkdir(exist_ok=True)
    write_review_list(folder, rows, {"about": "The cases to look at first. score: mean normalised entropy of the voxels "
                                              f"predicted as foreground or of a normalised entropy of {IN_DOUBT} or more"})
    return folder / f"{REVIEW}.csv"
