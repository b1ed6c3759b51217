"""The report of `confkd check`, and its text."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from textwrap import fill

from nnunet_confkd.data.supervision import FULL, KINDS, UNLABELLED
from nnunet_confkd.errors import counted

WIDTH = 100  # of the text, in characters
ROWS = 40  # more cases than these are summarised


@dataclass
class Report:
    """What :func:`nnunet_confkd.data.check.check_dataset` found.

    `confkd check --json` prints `as_dict()`: these attributes, and "ok", which is true if there are no errors.

    Attributes:
        dataset: The name of the data set.
        folder: Its raw folder.
        labels: As in dataset.json.
        channels: The names of the channels.
        errors: Why training would be wrong, or fail. Empty: training would be right.
        warnings: What one should know.
        cases: {case: description}. A description has "kind" ("full", "partial", "unlabelled", or null if the label
            cannot be used), "declared" (the kind in dataset.json's "supervision", or null), "patient" (null without a
            pattern), "size" (voxels of the image), "annotated" (annotated voxels), "voxels" ({class: annotated
            voxels}), "annotated_share" and "share" (the same over "size"), and "hidden": annotated voxels in the label
            file that training does not see, because the case is declared unlabelled. Numbers are null if the kind is.
            "classes" are those that a case lists in dataset.json's "annotated_classes"; null if it is annotated for
            all. If the labels are regions, the classes are these, under their names; they overlap.
        totals: {kind, or "all": {"cases": number of cases, and "size", "annotated", "voxels", "annotated_share",
            "share" as above, of all of them together}}. A share of no voxels is null.
        classes: {class: {"annotated": cases that are annotated for it, "present": how many of them hold it}}.
            Unlabelled cases are annotated for none.
        split: {"file": splits_final.json or null, "folds": [{"train": {kind: cases}, "val": {kind: cases}}], "unused":
            cases that no fold trains or validates on}.
        test: {"cases": number in imagesTs, "labelled": how many of them have a label in labelsTs}.

    Examples:
        >>> Report("Dataset027_Hearts", "raw/Dataset027_Hearts", errors=["case_1: has no image"]).as_dict()["ok"]
        False
    """
    dataset: str
    folder: str
    labels: dict = field(default_factory=dict)
    channels: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    cases: dict[str, dict] = field(default_factory=dict)
    totals: dict[str, dict] = field(default_factory=dict)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    split: dict = field(default_factory=lambda: {"file": None, "folds": [], "unused": []})
    test: dict[str, int] = field(default_factory=lambda: {"cases": 0, "labelled": 0})

    def as_dict(self) -> dict:
        """Return the attributes and "ok"."""
        return asdict(self) | {"ok": not self.errors}

    def of_kind(self, kind: str) -> list[dict]:
        """Return the descriptions of the cases of a kind; for "all", of those whose kind is known."""
        return [case for case in self.cases.values() if case["kind"] == kind or kind == "all" and case["kind"]]

    def complete_cases(self) -> set[str]:
        """Return the cases without ignored voxels that are not annotated for all classes."""
        return {name for name, case in self.cases.items() if case["classes"] and case["annotated"] == case["size"]}

    def text(self, all_cases: bool = False) -> str:
        """Return the text for people: the totals, a row for each case, then the warnings and errors.

        More cases than `ROWS` are summarised, unless `all_cases` is true. The paths are relative to `folder`.
        """
        blocks = ["\n".join(_wrapped(line) for line in self._head())]
        if self.cases:
            summarised = len(self.cases) > ROWS and not all_cases
            blocks.append(_aligned(self._total_rows(summarised)))
            if any(case["classes"] for case in self.cases.values()):
                blocks.append(self._class_table())
            blocks.append(f"{len(self.cases)} cases: --all has a row for each" if summarised else self._case_tables())
        for title, texts in (("WARNINGS", self.warnings), ("ERRORS", self.errors)):
            if texts:
                lines = [_wrapped(text.replace(f"{self.folder}/", ""), "- ", "  ") for text in texts]
                blocks.append("\n".join([title, *lines]))
        counts = f"{counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}"
        blocks.append(f"{counts}: {self._advice()}")
        return "\n\n".join(blocks)

    def _advice(self) -> str:
        if not self.errors:
            first = "look at the warnings" if self.warnings else "ready"
            return f"{first}; next: confkd plan -d {int(self.dataset[7:10])}"
        return ("correct the errors before training" if self.cases else
                "correct the errors before training; the images and labels were not examined")

    def _head(self) -> list[str]:
        test = f", {counted(self.test['cases'], 'test case')} ({self.test['labelled']} labelled)"
        lines = [f"{self.dataset}: {counted(len(self.cases), 'training case')}{test if self.test['cases'] else ''}",
                 f"folder: {self.folder}"]
        if self.labels:
            lines += ["channels: " + ", ".join(self.channels),
                      "labels: " + ", ".join(f"{name} {value}" for name, value in self.labels.items())]
        total = self.totals.get("all", {"cases": 0})
        if "ignore" in self.labels and total["cases"] and total["annotated"] == total["size"]:
            lines.append("no case uses the ignore label: every voxel is annotated")
        hidden = sum(case["hidden"] > 0 for case in self.cases.values())
        if hidden:
            lines.append(f"{counted(hidden, 'case')} declared unlabelled: training does not see the annotated voxels")
        if {kind for kind, total in self.totals.items() if total["cases"]} == {FULL, UNLABELLED, "all"}:
            lines.append("all cases that are not fully annotated are unlabelled: by default the network labels them "
                         "after a part of the epochs, unless the training is short, and then learns from these labels, "
                         "too; to leave them out, set \"complete_at\": 0 in the confkd block of the plans")
        lines += [f"fold {k}: trains on {_kinds_text(fold['train'])}; validates on {_kinds_text(fold['val'])}"
                  for k, fold in enumerate(self.split["folds"])]
        return lines

    def _total_rows(self, summarised: bool) -> list[list[str]]:
        def cell(count: int, share: float | None) -> str:
            return f"{count:,}{percent(share):>9}"

        kinds = [kind for kind in (*KINDS, "all") if self.totals[kind]["cases"]]
        totals = [self.totals[kind] for kind in kinds]
        rows = [["annotated voxels and their share", *kinds],
                ["cases", *(f"{total['cases']}" for total in totals)],
                ["annotated", *(cell(total["annotated"], total["annotated_share"]) for total in totals)]]
        for name in self.totals["all"]["voxels"]:
            rows.append([name, *(cell(total["voxels"][name], total["share"][name]) for total in totals)])
        if summarised:
            shares = [[case["annotated_share"] for case in self.of_kind(kind)] for kind in kinds]
            for word, function in (("least", min), ("median", median), ("most", max)):
                rows.append([f"{word} annotated case", *(percent(function(values)) for values in shares)])
        return rows

    def _class_table(self) -> str:
        lacking = sum(case["classes"] is not None for case in self.cases.values())
        rows = [["number of cases", "annotated for it", "of these with it"],
                *([name, str(found["annotated"]), str(found["present"])] for name, found in self.classes.items())]
        return "\n".join([_wrapped(f"{counted(lacking, 'case')} not annotated for all classes: background there may "
                                   f"be any class that is not listed"), _aligned(rows)])

    def _case_tables(self) -> str:
        """Return a table with a row for each case. Classes that do not fit into the width follow in further tables."""
        cases = self.cases.values()
        names = ["case", *self.cases]
        block = [names, ["kind", *(case["kind"] or "?" for case in cases)],
                 ["annotated", *(percent(case["annotated_share"]) for case in cases)]]
        tables = []
        for name in self.totals["all"]["voxels"]:
            column = [name, *(f"{case['voxels'][name]:,}" if _is_annotated_for(case, name) else "-" for case in cases)]
            if sum(2 + max(map(len, c)) for c in [*block, column]) - 2 > WIDTH and len(block) > 1:
                tables.append(block)
                block = [names]
            block.append(column)
        return "\n\n".join(_aligned(list(zip(*block))) for block in [*tables, block])


def _is_annotated_for(case: dict, name: str) -> bool:
    """Whether a case with this description is annotated for a class, or for the background."""
    return case["kind"] is not None and (case["classes"] is None or name == "background" or name in case["classes"])


def percent(share: float | None) -> str:
    """Return a share with three digits, and never as 0 or 100 % if it is not."""
    if share is None:
        return "-"
    if share == 0:
        return "0 %"
    if share < 1e-5:
        return "<0.001 %"
    text = f"{100 * share:#.3g}".rstrip(".")
    return f"{'>99.9' if text == '100' and share < 1 else text} %"


def _kinds_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or "none"


def _wrapped(text: str, first: str = "", rest: str = "    ") -> str:
    return fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False,
                break_on_hyphens=False)


def _aligned(rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is aligned to the left, and the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
