from __future__ import annotations

import pandas as pd
import pytest

from dit_mlflow.explanation.numbers import decimals, figure, span
from dit_mlflow.explanation.tables import terminal_table


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.1234, 2, "0.12"),
        (1.0, 2, "1"),
        (99.4, 2, "99"),
        (99.6, 2, "100"),
        (134.2, 2, "134"),
        (5400.0, 2, "5400"),
        (-12345.6, 3, "-12346"),
        (0.0000123, 2, "1.2e-05"),
        (1.5e12, 2, "1.5e+12"),
        (-0.0, 2, "0"),
        (float("inf"), 2, "inf"),
    ],
)
def test_digits_before_the_point_are_written_out(value: float, digits: int, text: str) -> None:
    assert figure(value, digits) == text


def test_nothing_is_minus_zero() -> None:
    assert decimals(-0.001) == "0.00"
    assert decimals(-0.0004, 3) == "0.000"
    assert decimals(-0.006) == "-0.01"
    assert span(-0.001, 0.2) == "0.00 to 0.20"
    assert span(-0.001, 0.001) == "0.00"


def test_cells_of_a_terminals_table_are_told() -> None:
    table = pd.DataFrame({"group": ["label \x1b[31m7\nnext: x", "y" * 10**6], "n": pd.array([1, None], dtype="Int64")})
    shown = terminal_table(table, {"group": "group", "n": "n"})
    assert r"label \x1b[31m7\nnext: x" in shown
    assert len(shown) < 1000
    assert [line.split()[-1] for line in shown.split("\n")] == ["n", "1", "-"]
