"""docs/reliability.md says what docs/reliability.json counts, and no more; nothing there is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.faults.document import document
from benchmarks.reliability import SECTIONS

DOCS = Path(__file__).parents[1] / "docs"


def figures() -> dict[str, Any]:
    return json.loads((DOCS / "reliability.json").read_text())


def test_the_page_is_made_of_the_figures() -> None:
    assert (DOCS / "reliability.md").read_text() == document(figures())


def test_all_was_measured_and_nothing_was_wrong() -> None:
    found = figures()["sections"]
    assert list(found) == list(SECTIONS)
    counts = [row[name] for section in found.values() for row in section["rows"] for name in row if "wrong" in name]
    assert len(counts) > 20
    assert not any(counts)


def test_a_wrong_result_is_counted_on_top() -> None:
    made_worse = figures()
    made_worse["sections"]["kills"]["rows"][0]["wrong"] = 2
    assert "**2 wrong**" in document(made_worse)
    assert "**0 wrong**" in document(figures())
