"""The training curves that ConfKD adds to nnU-Net's: their names, and how they are drawn."""
from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first: training has no display)

from nnunet_confkd.files import written_whole  # noqa: E402

# One value per epoch, the unweighted mean over the epoch. "second_stage" is 1 in the second stage, else 0.
CURVES = ("loss_teacher", "loss_student", "loss_kl", "loss_entropy", "student_confidence", "annotated_share",
          "teacher_mean_fg_dice", "teacher_dice_per_class_or_region", "second_stage")
PANELS = {
    "supervised loss": {"teacher": "loss_teacher", "student": "loss_student"},
    "KL and entropy [nats]": {"KL": "loss_kl", "entropy": "loss_entropy"},
    "pseudo-Dice": {"teacher (with hints, if trained with them)": "teacher_mean_fg_dice", "student": "mean_fg_dice",
                    "student, moving average": "ema_fg_dice"},
    "share": {"student's mean confidence": "student_confidence", "annotated voxels": "annotated_share"}}


def plot_curves(curves: dict[str, list], file: str | Path) -> None:
    """Draw the losses, the branches' pseudo-Dice, the confidence and the share of annotated voxels over the epochs.

    Args:
        curves: Values per epoch by name, nnU-Net's and those of `CURVES`.
        file: The PNG file to write.
    """
    # from Matplotlib's defaults: nnU-Net's own plots leave seaborn's large fonts behind
    with plt.style.context(["default", {"font.size": 11, "axes.grid": True, "grid.alpha": 0.3}]):
        figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex=True, layout="constrained")
        for axis, (title, lines) in zip(axes.flat, PANELS.items()):
            for (label, key), style in zip(lines.items(), ("-", "--", ":")):
                axis.plot(curves[key], style, label=label, linewidth=2, marker="o" if len(curves[key]) < 3 else None)
            axis.set_title(title)
            axis.legend()
        for axis in axes[1]:
            axis.set_xlabel("epoch")
        with written_whole(file) as aside:
            figure.savefig(aside, format="png", dpi=80)
        plt.close(figure)
