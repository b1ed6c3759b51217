"""Sections of the page for data sets with many classes."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from nnunet_confkd.evaluation.metrics import MEASURES, CaseMeasures
from nnunet_confkd.report import page, pictures, sections
from nnunet_confkd.report.pictures import Cell


def measures_of(dice: dict[str, float], patients=5):
    """A model with these classes, and what was found in a case of each patient."""
    model = SimpleNamespace(classes={name: (i,) for i, name in enumerate(dice, 1)})
    case = {name: dict.fromkeys(MEASURES, np.nan) | {"Dice": value, "HD95_mm": 1.0} for name, value in dice.items()}
    cases = {f"case{k}": case for k in range(patients)}
    evaluation = CaseMeasures(classes=model.classes, cases=cases)
    found = SimpleNamespace(evaluations={"student": evaluation}, names={"student": "network"}, cases=list(cases),
                            patients=list(cases))
    return model, found


@pytest.mark.parametrize("occurring, words", [
    (117, "20 of the 117 classes: the 10 with the lowest and the 10 with the highest mean Dice of the network"),
    (3, "3 of the 117 classes: those that occur in a case"), (0, "0 of the 117 classes")])
def test_the_charts_show_some_of_many_classes_and_the_page_says_which(quick, monkeypatch, tmp_path, occurring, words):
    drawn = []
    monkeypatch.setattr(sections, "save_charts", lambda charts, path: drawn.extend(charts))
    values = np.random.default_rng(0).permutation(117) / 117
    dice = {f"organ{i}": value if i < occurring else np.nan for i, value in enumerate(values)}
    html = sections._measures(tmp_path, *measures_of(dice))
    assert words in html and len(drawn) == 2
    ordered = sorted((name for name in dice if np.isfinite(dice[name])), key=dice.get)
    expected = ordered if occurring <= 20 else ordered[:10] + ordered[-10:]
    for chart in drawn:
        assert chart.height < 15  # inches
        assert [name for name in dice if f" {name}," in chart.alt] == sorted(expected, key=list(dice).index)
    assert all(f">{name}<" in html for name in dice)  # the table has all classes


@pytest.mark.parametrize("patients, drawn", [(4, False), (5, True)])
def test_boxes_of_fewer_than_five_patients_are_left_out_and_the_table_stays(quick, tmp_path, patients, drawn):
    html = sections._measures(tmp_path, *measures_of({"organ": 0.5, "other": 0.7}, patients))
    assert (tmp_path / "measures.png").exists() == ("<svg id=" in html) == ("The boxes show" in html) == drawn
    assert ("fewer than five patients" in html) != drawn and ">organ<" in html and "The charts show" not in html


def test_few_classes_are_all_drawn(quick, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(sections, "save_charts", lambda charts, path: drawn.extend(charts))
    html = sections._measures(tmp_path, *measures_of({f"organ{i}": i / 20 for i in range(20)}))
    assert "The charts show" not in html and all(f"organ{i}," in drawn[0].alt for i in range(20))


def test_legends_name_the_classes_that_are_in_a_picture(monkeypatch, tmp_path):
    classes = [f"organ{i}" for i in range(117)]
    image = np.random.default_rng(0).normal(size=(20, 20))
    masks = {name: np.zeros((20, 20), bool) for name in classes}
    for i in (3, 40):
        masks[f"organ{i}"][5:9, i // 4:i // 4 + 5] = True
    cells = [Cell("image", "", image), Cell("truth", "", image, masks=masks)]
    seen = pictures.classes_seen(cells)
    assert seen == {"organ3", "organ40"}
    legend = page.class_legend(classes, seen, weak=False)
    assert "organ3<" in legend and "organ40<" in legend and legend.count("organ") == 2
    assert pictures.class_styles(classes)["organ40"][0] in legend  # in its own colour
    sizes = []
    monkeypatch.setattr(pictures.plt, "close", lambda figure: sizes.append(
        ([text.get_text() for text in figure.legends[0].get_texts()], figure.get_figheight())))
    pictures.save_cells("a case", cells, tmp_path / "case.png")
    (labels, height), = sizes
    assert labels == ["organ3", "organ40"] and height < 4
