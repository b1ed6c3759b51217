"""A trained model that the report is tested on, and pages taken apart."""
from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

HIPPOCAMPUS = "Dataset004_Hippocampus"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """An HTML page taken apart. Elements that are not nested properly are an error."""

    def __init__(self, file: Path):
        super().__init__(convert_charrefs=True)
        self.stack, self.elements, self.texts, self.by_section, self.rows = [], [], [], {}, {}
        self.section = None
        self.source = file.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.stack, f"left open: {self.stack}"
        self.text = " ".join(" ".join(self.texts).split())
        self.sections = [attributes["id"] for attributes in self.all("section")]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "section":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if "td" in self.stack or "th" in self.stack:
            self.rows[self.section][-1][-1] += f" {data}"
        if "style" not in self.stack:
            self.texts.append(data)
            if self.section:
                self.by_section[self.section] = self.by_section.get(self.section, "") + " " + data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="session")
def read_page():
    return Page


@pytest.fixture(scope="session")
def edit_json():
    """Changes entries of a JSON file, given as `edit_json(file, key=value)`."""
    def edit(file: Path, **entries) -> dict:
        content = json.loads(file.read_text()) | entries
        file.write_text(json.dumps(content))
        return content
    return edit


@pytest.fixture(scope="session")
def restrict(edit_json):
    """Makes a fold know of these validation and training cases only."""
    def restrict(model: Path, validation: list[str], partial: list[str] = (), full: list[str] = (), fold: int = 0):
        kinds = dict.fromkeys(full, "full") | dict.fromkeys(partial, "partial")
        edit_json(model / f"fold_{fold}" / "confkd.json", supervision=kinds, pseudo_dice_on=list(validation))
    return restrict


@pytest.fixture(scope="session")
def small(hippocampus_model, hippocampus, restrict, tmp_path_factory) -> Path:
    """A copy of the trained model with two validation cases and one partially annotated training case. Do not change
    it."""
    model = tmp_path_factory.mktemp("report") / hippocampus_model.name
    shutil.copytree(hippocampus_model, model)
    restrict(model, hippocampus["validation"][:2], hippocampus["partial"][:1])
    return model


@pytest.fixture
def model(small, tmp_path) -> Path:
    """A copy of it to change."""
    return shutil.copytree(small, tmp_path / "model")


@pytest.fixture(scope="session")
def truths(nnunet, hippocampus) -> Path:
    return nnunet.preprocessed(HIPPOCAMPUS) / "gt_segmentations"


@pytest.fixture(scope="session")
def predicted(small, hippocampus):
    """The predictions of the two validation cases by both branches: {case: prediction}."""
    from nnunet_confkd.report.cases import Predictor
    from nnunet_confkd.report.model import Model
    opened = Model(small, None, "checkpoint_final.pth")
    predict = Predictor(opened, opened.fold_folders[0], ["student", "teacher"], torch.device("cpu"))
    return {case: predict(case) for case in hippocampus["validation"][:2]}


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes most of a report's time, for tests of its words: pictures, and predictions of mirrored
    images."""
    from nnunet_confkd.report import cases, page, sections
    from nnunet_confkd.training.validation import CasePredictor

    def predictor(trainer, branches):
        trainer.inference_allowed_mirroring_axes = None
        return CasePredictor(trainer, branches)

    monkeypatch.setattr(cases, "CasePredictor", predictor)
    monkeypatch.setattr(sections, "save_charts", lambda charts, path: path.write_bytes(b"charts"))
    monkeypatch.setattr(sections, "save_cells", lambda title, cells, path: path.write_bytes(b"cells"))
    monkeypatch.setattr(page, "svg", lambda chart, identifier: f'<svg id="{identifier}" role="img"></svg>')
    monkeypatch.setattr(page, "cell_png", lambda cell: "data:image/png;base64,")
