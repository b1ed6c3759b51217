"""Tables and numbers as text."""
from __future__ import annotations

import math


def cell(of: dict, digits: int, sign: bool = False) -> str:
    if math.isnan(of["mean"]):
        return "-"
    mean, low, high = (f"{of[key]:{'+' if sign else ''}.{digits}f}" for key in ("mean", "ci_low", "ci_high"))
    return mean if math.isnan(of["ci_low"]) else f"{mean} [{low}, {high}]"


def p_text(value: float) -> str:
    return "-" if math.isnan(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def without_nan(value):
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
