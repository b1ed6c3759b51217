"""How numbers and tables are written."""
from __future__ import annotations

import math

from nnunet_confkd.evaluation import tables


def test_numbers():
    assert tables.number_text(0.12345) == "0.123" and tables.number_text(-1.5, 1, signed=True) == "-1.5"
    assert tables.number_text(1.5, 2, signed=True) == "+1.50"
    assert tables.number_text(math.nan) == tables.number_text(math.inf) == "-"
    assert tables.percent_text(0.123) == "12.3 %" and tables.percent_text(0.5, 0) == "50 %"


def test_p_values():
    assert tables.p_value_text(0.0005) == "< 0.001" and tables.p_value_text(0.04321) == "0.043"
    assert tables.p_value_text(math.nan) == "-"


def test_means_have_their_interval_where_there_is_one():
    described = {"mean": 0.5, "ci_low": 0.25, "ci_high": 0.75}
    assert tables.mean_text(described) == "0.500 [0.250, 0.750]"
    assert tables.mean_text(described, 1, signed=True) == "+0.5 [+0.2, +0.8]"
    assert tables.mean_text(described | {"ci_low": math.nan, "ci_high": math.nan}) == "0.500"
    assert tables.mean_text(dict.fromkeys(described, math.nan)) == "-"


def test_cases_and_patients():
    assert tables.cases_text(4, 2) == "4 cases of 2 patients" and tables.cases_text(2, 1) == "2 cases of 1 patient"
    assert tables.cases_text(3, 3) == "3 cases, each taken as one patient" and tables.cases_text(1, 1) == "1 case"


def test_columns_are_as_wide_as_their_widest_cell():
    assert tables.aligned([["a", "bb", ""], ["ccc", "d", "e"]]) == ["a    bb", "ccc  d   e"]


def test_json_has_no_nan():
    content = {"a": [1, math.nan, ("x", -math.inf)], "b": 2.5}
    assert tables.without_nan(content) == {"a": [1, None, ["x", None]], "b": 2.5}
