"""`confkd predict`, with the pictures of `--preview`: some slices of each case, and a page of them.

The command stands here, and not beside `confkd train`, because pictures and pages are the report's. What only they need
is imported late, so that the help appears at once.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from nnunet_confkd import nnunet_commands
from nnunet_confkd.errors import InputError
from nnunet_confkd.report.page_folder import picture_name, require_replaceable, write_page

if TYPE_CHECKING:
    import numpy as np

    from nnunet_confkd.inference.inputs import Predicted
    from nnunet_confkd.report.pictures import Cell

FOLDER, PAGE = "preview", "index.html"
SLICES = 3  # of each case
MOST_CASES = 50  # on the page; the pictures of the others lie beside it
THICK = 2.0  # slices that are so many times as far apart as pixels are wide are shown as they were taken


def predict(argv: list[str]) -> None:
    """Run `confkd predict`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preview", action="store_true")
    own, argv = parser.parse_known_args(argv)
    if not own.preview:
        nnunet_commands.predict(argv, more_options=["--preview"])
        return
    parser.add_argument("-o")
    parser.add_argument("-num_parts", default="1")
    output, parts = (getattr(parser.parse_known_args(argv)[0], name) for name in ("o", "num_parts"))
    if parts != "1":
        raise InputError("--preview: each part would replace the pictures of the others. Predict all parts without it. "
                         "Then give the same command with --continue_prediction --preview, and without -num_parts and "
                         "-part_id")
    if output is not None:  # otherwise nnU-Net's parser says so
        require_replaceable(Path(output, FOLDER), PAGE, "preview", "Move them, or predict to another folder (-o)")
    nnunet_commands.predict(argv, lambda predicted: print("preview:", write(predicted)))


def write(predicted: Predicted) -> Path:
    """Write a picture of each case, and a page of them, to the folder `preview` of the predictions.

    Args:
        predicted: What was predicted. If its entropy was written, it is shown, too, and the most uncertain cases come
            first.

    Returns:
        The page.
    """
    from nnunet_confkd.data.raw_format import label_values
    from nnunet_confkd.files import new_folder
    from nnunet_confkd.report import page
    from nnunet_confkd.report.pictures import classes_seen, save_cells

    classes = {str(name): label_values({name: value}) for name, value in predicted.described["labels"].items()
               if name not in ("background", "ignore")}
    scores = _scores(predicted)
    order = sorted(predicted.segmentations, key=lambda case: (-scores.get(case, -1.0), case))
    rows, seen = [], set()
    with new_folder(predicted.output / FOLDER, replace=True) as folder:
        for number, case in enumerate(order, 1):
            cells, note = _cells(predicted, case, classes)
            title = f"{number}. {case}" if scores else case
            if case in scores:
                note = f"uncertainty {scores[case]:.3f}. {note}"
            save_cells(f"{case}: {note}", cells, folder / picture_name(number, case))
            if number <= MOST_CASES:
                rows.append(page.case_row(title, note, cells))
                seen |= classes_seen(cells)
        content = page.class_legend(list(classes), seen, weak=False, entropy=bool(scores)) + "".join(rows)
        title = f"{len(order)} predicted case{'' if len(order) == 1 else 's'}"
        footer = page.paragraph("Written by confkd predict --preview. It is not for clinical use.")
        html = page.page(title, _lead(predicted, scores, order), [], [page.Section("cases", "Cases", content)], footer)
        write_page(folder, PAGE, "preview", html)
    return predicted.output / FOLDER / PAGE


def _lead(predicted: Predicted, scores: dict[str, float], order: list[str]) -> str:
    """Say what is shown, and in which order."""
    from nnunet_confkd.report import page

    texts = [f"Predicted by {predicted.model.name}. Of each case there are up to {SLICES} slices, those with most "
             "foreground in their part of the volume."]
    texts.append("The most uncertain cases come first: the uncertainty is the mean normalised entropy of the voxels in "
                 "question." if scores else "With --save-entropy, the most uncertain cases would come first.")
    if len(order) > MOST_CASES:
        texts.append(f"The page has the first {MOST_CASES} cases. The pictures of all lie beside it.")
    return page.paragraph(" ".join(texts), "about")


def _scores(predicted: Predicted) -> dict[str, float]:
    """Return {case: its uncertainty} of the cases of which it is known."""
    from nnunet_confkd.inference import uncertainty

    if not predicted.entropy:
        return {}
    files = {case: predicted.output / uncertainty.FOLDER / uncertainty.SCORES / f"{case}.json"
             for case in predicted.segmentations}
    return {case: float(json.loads(file.read_text(encoding="utf-8"))["score"]) for case, file in files.items()
            if file.is_file()}


def _cells(predicted: Predicted, case: str, classes: dict[str, set[int]]) -> tuple[list[Cell], str]:
    """Return the pictures of a case, and a note on them."""
    import numpy as np

    from nnunet_confkd.data.images import read
    from nnunet_confkd.inference import uncertainty
    from nnunet_confkd.report.pictures import Cell

    image = read(predicted.images[case])
    spacing = image.geometry.spacing[::-1]
    segmentation = read(predicted.segmentations[case]).voxels[0]
    entropy_file = (predicted.output / uncertainty.FOLDER / uncertainty.NORMALISED /
                    f"{case}{uncertainty.map_ending(predicted.described['file_ending'])}")
    show = predicted.entropy and entropy_file.is_file()
    volumes = [image.voxels[0], segmentation] + ([read(entropy_file).voxels[0]] if show else [])
    axis = 0
    if segmentation.ndim == 2:
        volumes, spacing = [volume[None] for volume in volumes], (1.0, *spacing)
    elif max(spacing) >= THICK * min(spacing):
        axis = int(np.argmax(spacing))
    if axis:  # the head, at the last slices, is on top then
        volumes = [volume[::-1] for volume in volumes]
    volumes = [np.moveaxis(volume, axis, 0) for volume in volumes]
    rows, columns = (s for i, s in enumerate(spacing) if i != axis)
    cells = []
    indices = slices_to_show(np.count_nonzero(volumes[1], axis=(1, 2)))
    for index in indices:
        grey, labels, *heat = (volume[index] for volume in volumes)
        grey, where = grey.astype(np.float32), f"of {case}, slice {index + 1}"
        if not cells:
            cells.append(Cell(f"slice {index + 1}, image", f"Image {where}", grey, aspect=rows / columns))
        cells.append(Cell(f"slice {index + 1}", f"Segmentation {where}", grey, aspect=rows / columns, masks={
            name: np.isin(labels, list(values)) for name, values in classes.items()}))
        cells += [Cell(f"slice {index + 1}, entropy", f"Entropy {where}", grey, heat=one, aspect=rows / columns)
                  for one in heat]
    some = volumes[1].any()
    return cells, f"{len(volumes[1])} slices" if some else "No foreground is predicted. The middle slice is shown."


def slices_to_show(foreground: np.ndarray) -> list[int]:
    """Choose slices: those that hold foreground are divided into three parts, and the largest of each part is taken.

    Args:
        foreground: Voxels of the foreground of each slice.

    Returns:
        Up to three indices, that of the slice with most foreground first. The middle slice if there is no foreground.
    """
    import numpy as np

    held = np.flatnonzero(foreground)
    if not len(held):
        return [len(foreground) // 2]
    chosen = [int(part[np.argmax(foreground[part])]) for part in np.array_split(held, SLICES) if len(part)]
    return sorted(chosen, key=lambda index: (-foreground[index], index))
