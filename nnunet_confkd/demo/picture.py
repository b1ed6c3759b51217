"""The demo's picture: a weak label, a held-back image with its ground truth and the student's labels, and the gain.

The gain is that on real hearts, and is stored: a few minutes of training on generated data cannot show it.
"""
from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from nnunet_confkd.colours import COLOURS  # noqa: E402

# The mean Dice of all 99 patients of ACDC after post-processing, each tested once in five folds, of trainings of equal
# cost: 3 fully annotated patients, and eroded masks of the others without annotated background (benchmarks/headline.py;
# a test compares).
STORED = {"full patients alone": 0.676, "nnU-Net's ignore label": 0.535, "our trainer, no teacher": 0.755,
          "ConfKD with hints": 0.771}
STORED_TITLE = "stored figures: 99 test patients of ACDC, 3 full masks, eroded masks of the others"


def draw(raw: Path, student: Path, test_cases: list[str], partial_case: str, path: Path) -> None:
    """Draw the weak label of a training case, a test case with its ground truth and its prediction, and `STORED`.

    The test case is the one with the median Dice of the student. Each image is shown in the slice with most foreground.

    Args:
        raw: The raw folder of the data set.
        student: The folder of the student's predictions, with nnU-Net's summary.json.
        test_cases: The names of the test cases.
        partial_case: The name of the training case.
        path: The picture to write.
    """
    described = json.loads((raw / "dataset.json").read_text())
    ending, ignore = described["file_ending"], described["labels"].get("ignore")
    names = {v: k for k, v in described["labels"].items() if isinstance(v, int) and k not in ("background", "ignore")}

    def read(file: Path) -> np.ndarray:
        return np.squeeze(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))

    case, dice = _middle_case(student, test_cases, ending)
    truth = read(raw / "labelsTs" / (case + ending))
    weak = read(raw / "labelsTr" / (partial_case + ending))
    here, there = _fullest(truth, ignore), _fullest(weak, ignore)
    image = read(raw / "imagesTs" / f"{case}_0000{ending}")[here]
    panels = [("weak label (training)", read(raw / "imagesTr" / f"{partial_case}_0000{ending}")[there], weak[there]),
              ("held-back image", image, None), ("ground truth", image, truth[here]),
              (f"ConfKD, Dice {dice:.2f}", image, read(student / (case + ending))[here])]

    with plt.style.context("default"):  # nnU-Net's own plots leave seaborn's large fonts behind
        _draw_panels(panels, names, ignore, path)


def _draw_panels(panels: list[tuple], names: dict[int, str], ignore: int | None, path: Path) -> None:
    """Draw the panels (title, 2-D image, 2-D label map or None) in a row; `names` are the foreground labels."""
    figure, (*axes, bars) = plt.subplots(1, len(panels) + 1, figsize=(3 * len(panels) + 4, 3.7), layout="constrained",
                                         width_ratios=[3] * len(panels) + [4])
    for axis, (title, grey, label) in zip(axes, panels):
        low, high = np.percentile(grey, (1, 99))
        axis.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
        if label is not None:
            for value, colour in zip(names, COLOURS * len(names)):
                inside = label == value
                axis.imshow(np.ma.masked_where(~inside, inside), cmap=matplotlib.colors.ListedColormap([colour]),
                            alpha=0.45)
                if inside.any():
                    axis.contour(inside, [0.5], colors=[colour], linewidths=1.4)
            if ignore is not None and (label == ignore).any() and (label == 0).any():
                axis.contour(label == 0, [0.5], colors=["white"], linewidths=1)
        axis.set_title(title, fontsize=11)
        axis.axis("off")
    drawn = bars.bar([fill(title, 12) for title in STORED], list(STORED.values()),
                     color=["0.75", "0.75", "0.35", "0.35"], hatch="//", edgecolor="white")
    bars.bar_label(drawn, fmt="%.3f")
    bars.set_ylim(0, 1)
    bars.set_title(fill(STORED_TITLE, 45), fontsize=10)
    bars.set_ylabel("mean Dice")
    handles = [Patch(color=colour, label=name) for colour, name in zip(COLOURS * len(names), names.values())]
    handles.append(Patch(facecolor="none", edgecolor="grey", label="annotated background (white)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _middle_case(folder: Path, cases: list[str], ending: str) -> tuple[str, float]:
    """Find the test case with the median of the mean Dice; return it with its Dice."""
    dice = {Path(entry["prediction_file"]).name.removesuffix(ending):
            float(np.nanmean([measures["Dice"] for measures in entry["metrics"].values()]))
            for entry in json.loads((folder / "summary.json").read_text())["metric_per_case"]}
    case = sorted(cases, key=dice.__getitem__)[len(cases) // 2]
    return case, dice[case]


def _fullest(label: np.ndarray, ignore: int | None) -> tuple:
    """Return the index of the slice with most foreground."""
    if label.ndim == 2:
        return (slice(None), slice(None))
    return (int(np.argmax(((label != 0) & (label != ignore)).sum((1, 2)))),)
