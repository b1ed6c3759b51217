"""What does annotating cost, and what does it bring: more full masks, or scribbles on everything?

    python benchmarks/effort.py --data .../shared/data
    python benchmarks/effort.py --report

Counts the slices and voxels that are annotated on ACDC with k fully annotated patients, and with expert scribbles on
all others as well, in the folds of five_folds.py. Of scribbles in a quarter of the slices a quarter is counted. A slice
counts if it holds foreground: an annotator looks at the others and goes on. The report puts these numbers beside the
Dice of five_folds.py after post-processing, and writes the table into benchmarks/README.md. It states minutes for a
price of a full slice and of a scribbled one (--minutes), which the reader should replace by their own.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from accuracy import FOLDS, choose_roles, patient_of
from five_folds import HERE, OUTPUT, SETTINGS, of_patients, read_all
from headline import ALONE, OUR_ROW, OURS
from step_time import insert

FILE = HERE / "effort.json"
IGNORE, FOREGROUND = 4, (1, 2, 3)  # of the published scribbles
MINUTES = (2.0, 0.5)  # of a slice with full masks, and of one with scribbles: an assumption
ROWS = {"full patients alone": "full_only", ALONE: "ignore", OURS: OUR_ROW["scribbles"]}
MIXED = tuple(ROWS.values())[1:]
# how the other patients are annotated: the setting of five_folds.py, the share of their slices, and the rows of ROWS
OTHERS = {"not used": ("scribbles", 0.0, ("full_only",)), "scribbled": ("scribbles", 1.0, MIXED),
          "scribbled in about a quarter of the slices": ("scribbles_sparse", 0.25, MIXED)}


def annotated(labels: np.ndarray) -> dict[str, int]:
    """Count the slices with foreground, `(Z, Y, X)`, and their annotated voxels."""
    slices = np.isin(labels, FOREGROUND).any((1, 2))
    return {"slices": int(slices.sum()), "voxels": int((labels[slices] != IGNORE).sum())}


def measure(data: Path) -> dict[str, dict]:
    """Count in each case: {case: {"full": counts, "scribbles": counts}}."""
    import SimpleITK as sitk
    found = {}
    for file in sorted((data / "acdc_scribbles").glob("*_scribble.nii.gz")):
        case = file.name.removesuffix("_scribble.nii.gz")
        truth = data / "acdc" / "training" / patient_of(case) / f"{case}_gt.nii.gz"
        found[case] = {kind: annotated(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
                       for kind, path in (("full", truth), ("scribbles", file))}
    return found


def effort(cases: dict[str, dict], full: int) -> dict[str, float]:
    """The mean over the folds of what is annotated: slices and voxels of the full patients, and of the others."""
    from nnunet_confkd.dataset_conversion.acdc import TWINS
    sums = dict.fromkeys(("full slices", "full voxels", "scribbled slices", "scribbled voxels"), 0.0)
    for fold in range(FOLDS):
        train = choose_roles(cases, SETTINGS["scribbles"].patients, TWINS, fold=fold)["train"]
        masked = list(dict.fromkeys(map(patient_of, train)))[:full]
        for case in train:
            kind, word = ("full", "full") if patient_of(case) in masked else ("scribbles", "scribbled")
            for unit, number in cases[case][kind].items():
                sums[f"{word} {unit}"] += number / FOLDS
    return sums


def table(cases: dict[str, dict], runs: Path, minutes: tuple[float, float] = MINUTES) -> str:
    """A line for each number of fully annotated patients, without and with scribbles on the others."""
    text = [f"A slice with full masks is taken to need {minutes[0]:g} minutes, one with scribbles {minutes[1]:g}.", "",
            "| fully annotated patients | others | full slices | scribbled slices | annotated voxels | hours | "
            + " | ".join(ROWS) + " |", "|" + "---|" * (6 + len(ROWS))]
    found = read_all(runs)
    for full in sorted(SETTINGS["scribbles"].full):
        of = effort(cases, full)
        for others, (setting, share, rows) in OTHERS.items():
            if full not in SETTINGS[setting].full:
                continue
            dice = [found.get((setting, row, full)) if row in rows else None for row in ROWS.values()]
            hours = (of["full slices"] * minutes[0] + share * of["scribbled slices"] * minutes[1]) / 60
            means = [f"{np.concatenate(of_patients(folds, 'dice_pp')).mean():.3f}" if folds else "" for folds in dice]
            text.append(f"| {full} | {others} | {of['full slices']:.0f} | {share * of['scribbled slices']:.0f} | "
                        f"{of['full voxels'] + share * of['scribbled voxels']:,.0f} | {hours:.1f} | "
                        f"{' | '.join(means)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that contains acdc/ and acdc_scribbles/")
    parser.add_argument("--report", action="store_true", help="only write the table of what is there")
    parser.add_argument("--minutes", type=float, nargs=2, default=MINUTES, metavar=("FULL", "SCRIBBLED"))
    args = parser.parse_args()
    if not (args.data or args.report):
        parser.error("name --data; or --report")
    if not args.report:
        FILE.write_text(json.dumps(measure(args.data), indent=1) + "\n")
    insert(HERE / "README.md", "effort", table(json.loads(FILE.read_text()), OUTPUT, tuple(args.minutes)))


if __name__ == "__main__":
    main()
