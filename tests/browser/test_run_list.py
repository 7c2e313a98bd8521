"""The list of runs: what stands at top level, what opens below it, and the views that the jobs save."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect
from world import WINDOWS

pytestmark = pytest.mark.slow


def test_runs_stand_at_top_level_and_windows_open_below_in_order(page, site, shot, names) -> None:
    page.goto(site.runs())
    expect(page.get_by_role("link", name="local 5 windows · influence mnist logreg", exact=True)).to_be_visible()
    expect(page.get_by_text("16 matching runs")).to_be_visible()
    top = [
        "4 methods local · compare mnist logreg",
        "cumulative 2 windows · influence mnist logreg",
        "init 1 order 0 · train mnist logreg",
        "local 5 windows · influence mnist logreg",
        "train mnist logreg",
    ]
    assert names() == top
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name=top[3], exact=True))
    row.get_by_role("button").click()
    expect(page.get_by_role("link", name=WINDOWS[0])).to_be_visible()
    assert names() == [*top[:4], *WINDOWS, top[4]]
    shot("run-list-expanded")


def test_saved_views_are_offered_by_name(page, site, shot, names) -> None:
    page.goto(site.runs())
    page.get_by_test_id("saved-views-trigger").click()
    offered = [
        "Trainings",
        "Influence runs",
        "Windows of local 5 windows · influence mnist logreg",
        "Windows of cumulative 2 windows · influence mnist logreg",
        "Methods of 4 methods local · compare mnist logreg",
    ]
    for name in offered:
        expect(page.get_by_text(name, exact=True)).to_be_visible()
    shot("saved-views")
    page.get_by_text("Trainings", exact=True).click()
    expect(page.get_by_text("2 matching runs")).to_be_visible()
    assert names() == ["train mnist logreg", "init 1 order 0 · train mnist logreg"]
    # As a table, with the columns that matter.
    for heading in ("validation/loss", "test/accuracy", "resolved.init_seed"):
        expect(page.get_by_role("columnheader").filter(has_text=heading).first).to_be_visible()


def test_windows_are_found_by_range(page, site, names) -> None:
    page.goto(site.runs())
    search = page.get_by_test_id("runs-search-autocomplete").locator("input")
    search.or_(page.get_by_test_id("search-box")).first.fill(
        "metrics.window_start >= 4 and metrics.window_end <= 9 and tags.`dit.kind` = 'window'"
    )
    page.keyboard.press("Enter")
    # The two windows below the run that they are children of.
    expect(page.get_by_text(re.compile(r"matching runs$"))).to_have_text("3 matching runs")
