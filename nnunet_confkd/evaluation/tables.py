"""Numbers and tables as text: the one place that says how a mean, an interval or a p value is written."""
from __future__ import annotations

import math


def number_text(value: float, digits: int = 3, signed: bool = False) -> str:
    """Write a number with a fixed number of digits, and "-" if it is undefined.

    Args:
        value: The number; NaN and infinity mean that it is undefined.
        digits: Digits after the decimal point.
        signed: Whether positive numbers have a plus sign.
    """
    return f"{value:{'+' if signed else ''}.{digits}f}" if math.isfinite(value) else "-"


def percent_text(share: float, digits: int = 1) -> str:
    """Write a share from 0 to 1 in percent."""
    return f"{number_text(100 * share, digits)} %"


def p_value_text(p: float) -> str:
    """Write a p value: "< 0.001", or three digits; "-" if it is undefined."""
    return "< 0.001" if p < 0.001 else number_text(p)


def mean_text(described: dict, digits: int = 3, signed: bool = False) -> str:
    """Write a mean with its interval, such as "0.812 [0.790, 0.834]".

    Args:
        described: What `metrics.statistics` returns: `mean`, `ci_low` and `ci_high`. NaN bounds are left out.
        digits: Digits after the decimal point.
        signed: Whether positive numbers have a plus sign.
    """
    mean, low, high = (number_text(described[key], digits, signed) for key in ("mean", "ci_low", "ci_high"))
    return mean if math.isnan(described["ci_low"]) else f"{mean} [{low}, {high}]"


def cases_text(cases: int, patients: int) -> str:
    """Write how many cases there are of how many patients, such as "4 cases of 2 patients"."""
    if cases == patients:
        return f"{cases} cases, each taken as one patient" if cases != 1 else "1 case"
    return f"{cases} cases of {patients} patient{'s' if patients != 1 else ''}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Make the lines of a table whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def without_nan(value):
    """Replace NaN and infinity by None in nested dicts, lists and tuples: JSON does not have them."""
    if isinstance(value, dict):
        return {key: without_nan(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
