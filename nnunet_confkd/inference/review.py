"""The order in which to review cases: the most doubtful first.

This module does not import PyTorch, so that processes which only read maps start quickly.
"""
from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from nnunet_confkd.files import write_json, written_whole

REVIEW = "review_first"  # .csv and .json
# Voxels of the predicted background count towards the score of a case from this normalised entropy on.
IN_DOUBT = 0.1


def map_ending(file_ending: str) -> str:
    """Return the file ending of maps: that of the data set, but .tif for formats without floating point numbers."""
    return ".tif" if file_ending.lower() in (".png", ".bmp") else file_ending


def case_score(normalised: np.ndarray, segmentation: np.ndarray, where: np.ndarray | None = None) -> dict:
    """Compute how uncertain the prediction of a case is.

    Args:
        normalised: The normalised entropy, 0 to 1.
        segmentation: The prediction, of the same shape.
        where: A mask of the voxels that count. None: all.

    Returns:
        The "score" and the numbers that it is computed from. The score is the mean entropy of the voxels that are
        predicted as foreground or have an entropy of at least `IN_DOUBT`, so that large empty surroundings do not
        count. It is 0 if there are no such voxels.

    Examples:
        >>> scored = case_score(np.array([0.0, 0.2, 0.4]), np.array([0, 1, 1]))
        >>> round(scored["score"], 3)  # the mean over the two foreground voxels
        0.3
    """
    total = judged_total = 0.0
    voxels = foreground_voxels = judged_voxels = 0
    for index in range(len(normalised)):  # slice by slice: a selection is a copy
        entropy, foreground = normalised[index], segmentation[index] != 0
        if where is not None:
            entropy, foreground = entropy[where[index]], foreground[where[index]]
        judged = entropy[foreground | (entropy >= IN_DOUBT)]
        total += float(entropy.sum(dtype=np.float64))
        judged_total += float(judged.sum(dtype=np.float64))
        voxels += entropy.size
        foreground_voxels += int(np.count_nonzero(foreground))
        judged_voxels += judged.size
    return {"score": judged_total / judged_voxels if judged_voxels else 0.0,
            "mean_normalised_entropy": total / voxels if voxels else 0.0, "voxels": voxels,
            "foreground_voxels": foreground_voxels, "judged_voxels": judged_voxels}


def write_review_list(folder: Path, rows: list[dict], about: dict) -> list[dict]:
    """Write `review_first.csv` and `review_first.json`.

    Args:
        folder: Where to write.
        rows: One dictionary per case, with "case" and "score".
        about: What else the JSON file tells.

    Returns:
        The rows, the highest score first, each with its "rank".
    """
    rows = sorted(rows, key=lambda row: (-row["score"], row["case"]))
    rows = [{"rank": i, **row} for i, row in enumerate(rows, 1)]
    write_json(folder / f"{REVIEW}.json", {**about, "cases": rows})
    with written_whole(folder / f"{REVIEW}.csv") as aside, open(aside, "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)) or ["rank", "case"])
        table.writeheader()
        table.writerows(rows)
    return rows
