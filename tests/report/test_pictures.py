"""Charts and slices."""
from __future__ import annotations

import base64

import numpy as np

from nnunet_confkd.report import pictures
from nnunet_confkd.report.pictures import Cell, cell_png, curve_charts, save_charts, svg


def test_outlines_follow_the_borders_of_voxels():
    figure, axis = pictures.plt.subplots()
    mask = np.zeros((5, 7), bool)
    mask[2, 3] = True
    pictures._outline(axis, mask)
    corners = axis.collections[-1].get_paths()[0].vertices
    # the voxel reaches from 2.5 to 3.5 and from 1.5 to 2.5; a cell of the fine grid, 1 / 57 of a voxel, may be lost
    np.testing.assert_allclose([corners.min(0), corners.max(0)], [[2.5, 1.5], [3.5, 2.5]], atol=1 / 57)
    pictures.plt.close(figure)


def test_curves_of_several_folds_share_a_chart(tmp_path):
    folds = {f"fold_{i}": {"loss_student": [1.0, 0.5 + i], "loss_teacher": [2.0, 1.0], "loss_kl": [0.0, 0.0],
                           "mean_fg_dice": [], "loss_entropy": [np.nan, np.nan]} for i in range(2)}
    # of a loss that is 0 throughout, or is not there, there is no chart
    (chart,) = curve_charts(folds, {"student": "student", "teacher": "teacher"})
    assert chart.title == "Supervised loss"
    assert chart.alt == "Supervised loss over the epochs: student from 1 to 1, teacher from 2 to 1 (means of 2 folds)."
    drawn = svg(chart, "one")
    assert 'aria-label="Supervised loss over' in drawn and "var(--student)" in drawn and "var(--teacher)" in drawn
    save_charts([chart], tmp_path / "charts.png")
    assert (tmp_path / "charts.png").read_bytes().startswith(b"\x89PNG")


def test_words_on_curves_name_the_last_values_of_a_teacher_that_was_left_out():
    folds = {f"fold_{i}": {"loss_student": [1.0, 0.8, 0.5], "loss_teacher": [2.0, 1.5 + i, np.nan]} for i in range(2)}
    (chart,) = curve_charts(folds, {"student": "student", "teacher": "teacher"})
    assert "student from 1 to 0.5, teacher from 2 to 2 (means of 2 folds)." in chart.alt


def test_a_picture_is_as_wide_as_its_pixels():
    image = np.random.default_rng(0).normal(size=(10, 20))
    content = base64.b64decode(cell_png(Cell("", "", image, aspect=4.0)).removeprefix("data:image/png;base64,"))
    width, height = (int.from_bytes(content[i:i + 4], "big") for i in (16, 20))
    assert abs(height - 2 * width) <= 2  # 10 pixels of height 4 over 20 of width 1


def test_more_classes_than_colours_differ_in_line_style():
    styles = pictures.class_styles([str(i) for i in range(10)])
    assert len(set(styles.values())) == 10
