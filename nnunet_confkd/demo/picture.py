"""The demo's picture: a weak label, and on a held-back image the ground truth and the predictions."""
from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

from nnunet_confkd.colours import COLOURS  # noqa: E402


def draw(raw: Path, predictions: dict[str, Path], test_cases: list[str], partial_case: str, path: Path) -> None:
    """Draw the weak label of a training case, and a test case with its ground truth and the predictions.

    The test case is the one with the median Dice of the last prediction. Each image is shown in the slice with most
    foreground.

    Args:
        raw: The raw folder of the data set.
        predictions: {title: folder of predictions with nnU-Net's summary.json}.
        test_cases: The names of the test cases.
        partial_case: The name of the training case.
        path: The picture to write.
    """
    described = json.loads((raw / "dataset.json").read_text())
    ending, ignore = described["file_ending"], described["labels"].get("ignore")
    names = {v: k for k, v in described["labels"].items() if isinstance(v, int) and k not in ("background", "ignore")}

    def read(file: Path) -> np.ndarray:
        return np.squeeze(sitk.GetArrayFromImage(sitk.ReadImage(str(file))))

    dice = {title: _dice(folder, ending) for title, folder in predictions.items()}
    last = dice[list(dice)[-1]]
    case = sorted(test_cases, key=last.__getitem__)[len(test_cases) // 2]
    truth = read(raw / "labelsTs" / (case + ending))
    weak = read(raw / "labelsTr" / (partial_case + ending))
    here, there = _fullest(truth, ignore), _fullest(weak, ignore)
    image = read(raw / "imagesTs" / f"{case}_0000{ending}")[here]
    panels = [("weak label (training)", read(raw / "imagesTr" / f"{partial_case}_0000{ending}")[there], weak[there]),
              ("ground truth (test)", image, truth[here])]
    panels += [(f"{title}, Dice {dice[title][case]:.2f}", image, read(folder / (case + ending))[here])
               for title, folder in predictions.items()]
    means = {title: float(np.mean(list(of.values()))) for title, of in dice.items()}

    with plt.style.context("default"):  # nnU-Net's own plots leave seaborn's large fonts behind
        _draw_panels(panels, names, ignore, means, path)


def _draw_panels(panels: list[tuple], names: dict[int, str], ignore: int | None, means: dict[str, float],
                 path: Path) -> None:
    """Draw panels (title, 2-D image, 2-D label map) and bars of the mean Dice; `names` are the foreground labels."""
    figure, (*axes, bars) = plt.subplots(1, len(panels) + 1, figsize=(3 * len(panels) + 3, 3.7), layout="constrained")
    for axis, (title, grey, label) in zip(axes, panels):
        low, high = np.percentile(grey, (1, 99))
        axis.imshow(grey, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
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
    drawn = bars.bar(range(len(means)), list(means.values()), color=["0.75"] * (len(means) - 1) + ["0.35"])
    bars.bar_label(drawn, fmt="%.3f")
    bars.set_xticks(range(len(means)), [title.replace(" ", "\n", 1) for title in means])
    bars.set_ylim(0, 1)
    bars.set_title("mean Dice of all test cases", fontsize=11)
    handles = [Patch(color=colour, label=name) for colour, name in zip(COLOURS * len(names), names.values())]
    handles.append(Patch(facecolor="none", edgecolor="grey", label="annotated background (white)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _dice(folder: Path, ending: str) -> dict[str, float]:
    """The mean Dice of each case of a folder of predictions."""
    return {Path(entry["prediction_file"]).name.removesuffix(ending):
            float(np.nanmean([measures["Dice"] for measures in entry["metrics"].values()]))
            for entry in json.loads((folder / "summary.json").read_text())["metric_per_case"]}


def _fullest(label: np.ndarray, ignore: int | None) -> tuple:
    """Return the index of the slice with most foreground."""
    if label.ndim == 2:
        return (slice(None), slice(None))
    return (int(np.argmax(((label != 0) & (label != ignore)).sum((1, 2)))),)
