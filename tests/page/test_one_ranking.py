"""Answer, table, flags and chart of a page are of one ranking, where estimates and exact scores differ in sign too."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from pages import Opener

from dit_mlflow import Influence, Window
from dit_mlflow.evaluation import Metrics
from dit_mlflow.explanation.explanation import Explanation
from dit_mlflow.page import explanation_page

WHOLE = Window(0, 20)
WINDOWS = (Window(0, 10), Window(10, 20))
QUERIES = ("mean_validation_loss",)
SAMPLES = np.arange(100, 120)
WRONG = 7
"""Its estimate is the lowest of all; exactly, it helps most."""


def explanation(removed: float | None, whole: bool = True) -> Explanation:
    rng = np.random.default_rng(5)
    scores = rng.uniform(-1, 1, (3, 1, len(SAMPLES)))
    scores[:, 0, WRONG] = [-37, -30, -7]
    exact = np.full((3, 1, len(SAMPLES)), np.nan)
    exact[:, 0, WRONG] = [11.7, 2.0, 9.7]
    exact[:, 0, 3] = [-1.5, 0.2, -1.7]
    error = None
    if removed is not None:
        error = np.full(scores.shape, 0.05)
        # The lowest but one has an interval around 0.
        scores[0, 0, 11], error[0, 0, 11] = -5, 50
    metadata = {} if removed is None else {"removed": removed}
    method = "dit" if removed is None else "removal"
    found = Influence(
        scores[1:], WINDOWS, QUERIES, SAMPLES, "final", method, metadata, None if error is None else error[1:]
    )
    total = Influence(
        scores[:1], (WHOLE,), QUERIES, SAMPLES, "final", method, metadata, None if error is None else error[:1]
    )
    known = Influence(exact, (WHOLE, *WINDOWS), QUERIES, SAMPLES, "final", "leave_one_out")
    return Explanation(
        found,
        Metrics(),
        (Metrics(),) * 2,
        whole_run=total if whole else None,
        named=known if whole else known.select([*WINDOWS]),
    )


@pytest.mark.parametrize(("removed", "whole"), [(None, True), (0.1, True), (None, False)])
def test_answer_table_flags_and_chart_agree(opened: Opener, removed: float | None, whole: bool) -> None:
    found = explanation(removed, whole)
    said = found.sentences[0]
    hurt, helped = (int(index) for index in re.findall(r"ample (\d+) h", said))
    best = 100 + WRONG
    assert (hurt, helped) == ((103, best) if removed is None else (best, int(SAMPLES[found.whole_run.of(0).argmax()])))
    page = opened(explanation_page(found))
    assert page.locator(".answer li").first.inner_text() == said
    rows = page.locator("tr.sample:not(:has(.unclear))")
    assert (rows.first.get_attribute("data-index"), rows.last.get_attribute("data-index")) == (str(hurt), str(helped))
    for index, sign in ((hurt, "−"), (helped, "+")):
        row = page.locator(f"tr[data-index='{index}']")
        assert row.locator("td.overall").inner_text().strip("◇ ").startswith(sign)
        assert row.get_by_text("flagged").count() == (sign == "−")
        name = page.locator(f"#overview g.name[aria-label='show sample {index}']")
        assert ("harmful" if sign == "−" else "helpful") in name.get_attribute("class")
    # Exact where it ranks; beside the influence where it answers another question.
    wrong = page.locator(f"tr[data-index='{best}']")
    if removed is None:
        assert "◇" in wrong.locator("td.overall").inner_text()
        assert wrong.locator("td.estimate").inner_text().startswith("−")
    else:
        assert wrong.locator("td.exact").inner_text() == "+11.70"
        assert "unclear" in page.locator("tr[data-index='111'] td.marks").inner_text()
    for place, window in enumerate(WINDOWS):
        page.locator("#picker button", has_text=f"{window.start}–{window.end}").click()
        order = [int(text) for text in page.locator("#samples td.index").all_inner_texts()]
        scores = replace(found, whole_run=None).best.of(place)
        assert order == (SAMPLES[np.argsort(scores, kind="stable")]).tolist()
