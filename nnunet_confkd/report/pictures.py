"""The pictures of the report: charts, as SVG for the page and as PNG beside it, and slices of cases.

Each chart is drawn once, in the colours of a light page. In the SVG these colours become the page's CSS variables, so
one drawing serves light and dark. Branches also differ in line style and marker, classes in line style.
"""
from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first)
import numpy as np  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402

from nnunet_confkd.colours import BRANCH_COLOURS, COLOURS  # noqa: E402

# the colours of the light page; page.py has those of the dark one under the same names
INK, MUTED, LINE = "#1d2329", "#5b6570", "#d5dade"
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", **{colour: branch for branch, colour in BRANCH_COLOURS.items()}}
# (colour, dashes, marker); "first" and "second" are lines that belong to no branch
LINES = {"student": (BRANCH_COLOURS["student"], "-", "o"), "teacher": (BRANCH_COLOURS["teacher"], (0, (5, 2)), "s"),
         "given": (BRANCH_COLOURS["given"], (0, (1.2, 1.6)), "^"),
         "first": (INK, "-", "D"), "second": (MUTED, (0, (1.2, 1.6)), "v")}
OUTLINES = ("-", (0, (4, 2)), (0, (1.2, 1.4)))  # line styles of the classes, in turn
ENTROPY_MAP = "magma"

STYLE = {"font.size": 10, "font.family": "sans-serif", "text.parse_math": False, "svg.fonttype": "none",
         "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
         "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.titlesize": 10.5,
         "axes.titlelocation": "left", "axes.titleweight": "bold", "legend.frameon": False, "lines.linewidth": 1.8}


@dataclass
class Chart:
    """One set of axes.

    Attributes:
        title: The title.
        alt: What the chart shows, in words.
        draw: Function that draws into the axes.
        height: Height in inches; the width is 4.6.
    """
    title: str
    alt: str
    draw: Callable[[plt.Axes], None]
    height: float = 3.0


def _figure(charts: list[Chart], columns: int):
    rows = -(-len(charts) // columns)
    heights = [max(chart.height for chart in charts[row * columns:(row + 1) * columns]) for row in range(rows)]
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, sum(heights)), layout="constrained",
                                squeeze=False, height_ratios=heights)
    for axis, chart in zip(axes.flat, charts):
        chart.draw(axis)
        axis.set_title(chart.title)
    for axis in axes.flat[len(charts):]:
        axis.axis("off")
    return figure


def save_charts(charts: list[Chart], path: Path) -> None:
    """Draw all charts to one PNG file, on white."""
    with plt.style.context(["default", STYLE]):
        figure = _figure(charts, min(len(charts), 3))
        figure.savefig(path, dpi=110)
        plt.close(figure)


def svg(chart: Chart, identifier: str) -> str:
    """Return a chart as an `<svg>` element. identifier: a name that is unique within the page."""
    with plt.style.context(["default", STYLE, {"svg.hashsalt": identifier}]):
        figure = _figure([Chart("", chart.alt, chart.draw, chart.height)], 1)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = file.getvalue()
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups()
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", text.index("<svg")) + 1:], flags=re.S)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{identifier}-", body)  # several drawings share one page
    for colour, name in VARIABLES.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"font: [^;\"']*?([\d.]+)px [^;\"]*", r"font-size: \1px", body)  # the page's font, not the drawing's
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.alt)}">{body}'


# ---- charts ---------------------------------------------------------------------------------------------------------

def curve_charts(folds: dict[str, dict[str, list]], names: dict[str, str]) -> list[Chart]:
    """Return the charts of the training curves. Curves that do not exist, or are 0 throughout, are left out.

    Args:
        folds: {fold: {curve: one value for each epoch}}, as in the checkpoints' `logging`.
        names: {branch: label}.
    """
    panels = (
        ("Supervised loss", "loss", {"student": "loss_student", "teacher": "loss_teacher"}),
        ("KL, student from teacher", "nats", {"student": "loss_kl"}),
        (f"Entropy of the {names['student']}", "nats", {"student": "loss_entropy"}),
        ("Pseudo-Dice", "Dice", {"student": "mean_fg_dice", "teacher": "teacher_mean_fg_dice"}),
        ("Whole loss", "loss", {"training": "train_losses", "validation": "val_losses"}),
        ("Confidence and annotation", "share",
         {"mean confidence": "student_confidence", "annotated voxels": "annotated_share"}))
    charts = []
    for title, unit, lines in panels:
        present = {label: key for label, key in lines.items()
                   if any(_any_finite(curves.get(key)) for curves in folds.values())}
        # a loss that is 0 throughout is switched off
        present = {label: key for label, key in present.items() if not key.startswith("loss_")
                   or any(np.nanmax(np.abs(curves.get(key) or [0])) > 0 for curves in folds.values())}
        if present:
            labelled = {names.get(label, label): key for label, key in present.items()}
            charts.append(Chart(title, _curves_in_words(title, folds, labelled),
                                _curve_drawing(folds, present, unit, names), 2.7))
    return charts


def _any_finite(values: list | None) -> bool:
    return bool(values) and bool(np.isfinite(np.asarray(values, float)).any())


def _curve_drawing(folds: dict[str, dict[str, list]], lines: dict[str, str], unit: str, names: dict[str, str]):
    kinds = {label: label if label in BRANCH_COLOURS else ("first", "second")[i] for i, label in enumerate(lines)}

    def draw(axis: plt.Axes) -> None:
        for label, key in lines.items():
            for curves in folds.values():
                values = np.asarray(curves.get(key) or [], float)
                axis.plot(np.arange(1, len(values) + 1), values, **_line(kinds[label], len(values)),
                          alpha=1 if len(folds) == 1 else 0.7)
        if len(lines) > 1 or next(iter(lines)) not in BRANCH_COLOURS:
            _legend(axis, {kind: names.get(label, label) for label, kind in kinds.items()})
        axis.set_xlabel("epoch")
        axis.set_ylabel(unit)
        axis.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]  # of the default locator
    return draw


def _line(kind: str, length: int) -> dict:
    colour, dashes, marker = LINES[kind]
    return {"color": colour, "linestyle": dashes, "marker": marker, "markersize": 4, "markevery": max(1, length // 10)}


def _legend(axis: plt.Axes, labels: dict[str, str]) -> None:
    axis.legend(handles=[Line2D([], [], **_line(kind, 1), label=_short(label)) for kind, label in labels.items()])


def _curves_in_words(title: str, folds: dict[str, dict[str, list]], lines: dict[str, str]) -> str:
    parts = []
    for label, key in lines.items():
        values = [np.asarray(curves[key], float) for curves in folds.values() if _any_finite(curves.get(key))]
        # a teacher that has completed the labels has no values from then on
        finite = [of_fold[np.isfinite(of_fold)] for of_fold in values]
        parts.append(f"{label} from {np.mean([of_fold[0] for of_fold in finite]):.3g} to "
                     f"{np.mean([of_fold[-1] for of_fold in finite]):.3g}" if finite else label)
    means = f" (means of {len(folds)} folds)" if len(folds) > 1 else ""
    return f"{title} over the epochs: {', '.join(parts)}{means}."


def box_chart(title: str, values: dict[str, dict[str, list[float]]], names: dict[str, str], limits: tuple | None = None,
              ) -> Chart:
    """Return box plots of a measure.

    Args:
        title: The measure.
        values: {class: {branch: one value for each case}}, NaN if it is undefined.
        names: {branch: label}.
        limits: The ends of the axis. None: chosen by the values.
    """
    rows = [(cls, branch) for cls, branches in values.items() for branch in branches]
    height = 0.75 + 0.34 * len(values) + 0.3 * len(rows)

    def draw(axis: plt.Axes) -> None:
        rng = np.random.default_rng(0)  # moves overlapping points apart
        y, ticks, labels = 0.0, [], []
        for cls, branches in values.items():
            axis.text(0, y, _short(cls), transform=axis.get_yaxis_transform(), fontweight="bold", fontsize=9.5,
                      va="center", ha="left")
            for branch, cases in branches.items():
                y += 1
                ticks.append(y)
                labels.append(_short(names[branch]))
                cases = np.asarray(cases, float)
                cases = cases[np.isfinite(cases)]
                if not len(cases):
                    continue
                colour, dashes, marker = LINES[branch]
                line = {"color": colour, "linewidth": 1.3}
                axis.boxplot([cases], positions=[y], orientation="horizontal", widths=0.62, showfliers=False,
                             manage_ticks=False, boxprops=line | {"linestyle": dashes}, whiskerprops=line,
                             capprops=line, medianprops=line | {"linewidth": 2.6, "solid_capstyle": "butt"})
                axis.plot(cases, y + rng.uniform(-0.2, 0.2, len(cases)), marker, color=colour, markersize=3.2,
                          alpha=0.55 if len(cases) < 60 else 0.25, markeredgewidth=0)
            y += 1.15
        axis.set_yticks(ticks, labels)
        axis.set_ylim(y - 0.45, -0.6)
        if limits:
            axis.set_xlim(*limits)
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", visible=False)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel(title)

    medians = [f"{cls}, {names[branch]}: {np.nanmedian(v):.3g}" for cls, branches in values.items()
               for branch, v in branches.items() if np.isfinite(np.asarray(v, float)).any()]
    return Chart(title, f"Box plots of {title} over the cases; medians: {'; '.join(medians)}.", draw, height)


def _short(text: str, length: int = 22) -> str:
    return text if len(text) <= length else text[:length - 1] + "…"


def line_chart(title: str, lines: dict[str, tuple], names: dict[str, str], x: str, y: str, alt: str,
               diagonal: bool = False) -> Chart:
    """Return a chart of one line for each branch.

    Args:
        title: The title.
        lines: {branch: (xs, ys)}; points with NaN are left out.
        names: {branch: label}.
        x: Label of the x axis.
        y: Label of the y axis.
        alt: What the chart shows, in words.
        diagonal: Whether to draw the line of equality.
    """
    def draw(axis: plt.Axes) -> None:
        if diagonal:
            axis.plot([0, 1], [0, 1], color=MUTED, linewidth=1)
        for branch, (xs, ys) in lines.items():
            xs, ys = np.asarray(xs, float), np.asarray(ys, float)
            keep = np.isfinite(xs) & np.isfinite(ys)
            axis.plot(xs[keep], ys[keep], **_line(branch, int(keep.sum())))
        if len(lines) > 1:
            _legend(axis, {branch: names[branch] for branch in lines})
        axis.set_xlabel(x)
        axis.set_ylabel(y)
    return Chart(title, alt, draw, 3.3)


# ---- slices ---------------------------------------------------------------------------------------------------------

@dataclass
class Cell:
    """One picture of a case.

    Attributes:
        title: The caption.
        alt: What the picture shows, in words.
        image: Grey values, `(h, w)`.
        masks: {class: boolean mask, `(h, w)`}, drawn over the image.
        annotated: Boolean mask of the voxels that are annotated, `(h, w)`.
        heat: Values from 0 to 1, `(h, w)`, drawn instead of the image.
        aspect: Height of a pixel divided by its width.
    """
    title: str
    alt: str
    image: np.ndarray
    masks: dict[str, np.ndarray] | None = None
    annotated: np.ndarray | None = None
    heat: np.ndarray | None = None
    aspect: float = 1.0


def class_styles(classes: list[str]) -> dict[str, tuple]:
    """Return {class: (colour, dashes)}. If there are more classes than colours, neighbours still differ in line
    style."""
    return {name: (COLOURS[i % len(COLOURS)], OUTLINES[i % len(OUTLINES)]) for i, name in enumerate(classes)}


def classes_seen(cells: list[Cell]) -> set[str]:
    """Return the classes of which a picture shows a voxel."""
    return {name for cell in cells for name, mask in (cell.masks or {}).items() if mask.any()}


def _draw_cell(axis: plt.Axes, cell: Cell) -> None:
    axis.axis("off")
    if cell.heat is not None:
        axis.imshow(cell.heat, cmap=ENTROPY_MAP, vmin=0, vmax=1, aspect=cell.aspect, interpolation="nearest")
        return
    low, high = np.percentile(cell.image, (0.5, 99.5))
    axis.imshow(cell.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=cell.aspect,
                interpolation="nearest")
    if cell.masks is None:
        return
    if cell.annotated is not None and not cell.annotated.all():
        background = cell.annotated & ~np.any(list(cell.masks.values()), 0)
        if background.any():
            _fill(axis, background, "#ffffff", 0.25)
            _outline(axis, background, colors=["#ffffff"], linewidths=0.8)
    for mask, (colour, dashes) in zip(cell.masks.values(), class_styles(list(cell.masks)).values()):
        if mask.any():
            _fill(axis, mask, colour, 0.3)
            _outline(axis, mask, colors=[colour], linewidths=1.8, linestyles=[dashes])


def _outline(axis: plt.Axes, mask: np.ndarray, **style) -> None:
    """Draw a mask's outline along the borders of its voxels; through their centres, a small mask would look smaller."""
    fine = max(1, 400 // max(mask.shape))
    x, y = ((np.arange(-1, n * fine + 1) + 0.5) / fine - 0.5 for n in mask.shape[::-1])
    axis.contour(x, y, np.pad(np.kron(mask, np.ones((fine, fine), bool)), 1), [0.5], **style)
    axis.set(xlim=(-0.5, mask.shape[1] - 0.5), ylim=(mask.shape[0] - 0.5, -0.5))


def _fill(axis: plt.Axes, mask: np.ndarray, colour: str, alpha: float) -> None:
    axis.imshow(np.ma.masked_where(~mask, mask), cmap=matplotlib.colors.ListedColormap([colour]), alpha=alpha,
                aspect=axis.get_aspect(), interpolation="nearest")


def cell_png(cell: Cell, pixels: int = 300) -> str:
    """Return one picture without text as a `data:` URI."""
    height, width = cell.image.shape[0] * cell.aspect, cell.image.shape[1]
    scale = pixels / max(height, width) / 100
    with plt.style.context("default"):
        figure = plt.figure(figsize=(max(width * scale, 0.3), max(height * scale, 0.3)), dpi=100)
        _draw_cell(figure.add_axes((0, 0, 1, 1)), cell)
        file = io.BytesIO()
        figure.savefig(file, format="png", pil_kwargs={"optimize": True})
        plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def save_cells(title: str, cells: list[Cell], path: Path) -> None:
    """Draw a case's pictures side by side, with their captions, to one PNG file."""
    ratio = max(cell.image.shape[0] * cell.aspect / cell.image.shape[1] for cell in cells)
    with plt.style.context(["default", STYLE, {"axes.grid": False, "axes.titleweight": "normal"}]):
        figure, axes = plt.subplots(1, len(cells), figsize=(2.4 * len(cells), 2.4 * min(ratio, 2) + 0.95),
                                    layout="constrained", squeeze=False)
        for axis, cell in zip(axes.flat, cells):
            _draw_cell(axis, cell)
            axis.set_title(cell.title)
        styles = class_styles(list(next((c.masks for c in cells if c.masks is not None), {})))
        seen = classes_seen(cells)
        handles = [Line2D([], [], color=colour, linestyle=dashes, linewidth=2.5, label=_short(name))
                   for name, (colour, dashes) in styles.items() if name in seen]
        figure.set_figheight(figure.get_figheight() + 0.22 * max(0, -(-len(handles) // 6) - 1))
        figure.legend(handles=handles, loc="outside lower center", ncols=6)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
        figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[call-arg]  # of the constrained layout
        figure.savefig(path, dpi=100)
        plt.close(figure)
