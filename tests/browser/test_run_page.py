"""The page of a run, its artifacts, and the model's page."""

from __future__ import annotations

import numpy as np
import pytest
from browsing import pixels
from playwright.sync_api import expect
from world import SMALL, WINDOWS

pytestmark = pytest.mark.slow

HARMFUL = (213, 94, 0)
"""The colour of samples that harm, in our plots."""


def table(page) -> list[list[str]]:
    """Cells of the table that an artifact is shown as, headings first."""
    cells = "[role=cell],[role=columnheader],td,th"
    return (
        page.get_by_role("table")
        .get_by_role("row")
        .evaluate_all(
            f"rows => rows.map(row => [...row.querySelectorAll('{cells}')].map(cell => cell.innerText.trim()))"
        )
    )


def test_metrics_parameters_and_children_are_on_the_page(page, site, shot) -> None:
    page.goto(site.run(site.world.local))
    expect(page.get_by_role("heading", name="local 5 windows · influence mnist logreg")).to_be_visible()
    spearman = site.client.get_run(site.world.local).data.metrics["ground_truth/spearman"]
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="ground_truth/spearman", exact=True))
    expect(row).to_contain_text(f"{spearman:.12f}"[:10])
    expect(page.get_by_text("resolved.windows", exact=True)).to_be_attached()
    children = page.get_by_role("link").filter(has_text="w0")
    expect(children).to_have_count(5)
    assert [text.strip(", ") for text in children.all_inner_texts()] == WINDOWS
    shot("influence-run")


def test_note_answers_at_the_top_and_leads_to_the_comparison(page, site, shot) -> None:
    page.goto(site.run(site.world.local))
    answer = page.get_by_text("hurt the model most").first
    expect(answer).to_be_visible()
    assert answer.bounding_box()["y"] < page.get_by_text("Metrics (").first.bounding_box()["y"]
    shot("note")
    page.get_by_text("Show more").click()
    page.get_by_role("link", name="report.html").scroll_into_view_if_needed()
    shot("note-whole")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="windows", exact=True).click()
    expect(opened.value.get_by_text("5 matching runs")).to_be_visible()
    expect(opened.value.get_by_role("heading", name="ground_truth/spearman").first).to_be_visible()


def test_note_of_a_comparison_leads_to_its_methods(page, site, shot) -> None:
    page.goto(site.run(site.world.comparison))
    page.get_by_text("Show more").click()
    shot("note-of-methods")
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="methods", exact=True).click()
    expect(opened.value.get_by_text("4 matching runs")).to_be_visible()


def test_windows_are_shown_as_a_table(page, site, shot) -> None:
    page.goto(site.run(site.world.local, "artifacts/influence/windows.json"))
    expect(page.get_by_role("columnheader").filter(has_text="most_harmful")).to_be_visible()
    headings, *rows = table(page)
    assert len(rows) == 5
    start, end = headings.index("start"), headings.index("end")
    assert [f"{row[start]}-{row[end]}" for row in rows] == [name.split()[1] for name in WINDOWS]
    shot("windows-table")


def test_samples_are_shown_as_a_table(page, site, shot) -> None:
    page.goto(site.run(site.world.local, "artifacts/influence/top_samples.json"))
    expect(page.get_by_role("columnheader").filter(has_text="sample_index")).to_be_visible()
    headings, *rows = table(page)
    assert {row[headings.index("side")] for row in rows} <= {"harmful", "helpful"}
    assert all(0 <= int(row[headings.index("sample_index")]) < SMALL["n_train"] for row in rows)
    expect(page.get_by_text("(flipped)").first).to_be_attached()
    shot("top-samples-table")


def test_plot_is_shown_as_a_picture(page, site, shot) -> None:
    page.goto(site.run(site.world.local, "artifacts/influence/influence_over_windows.png"))
    picture = page.get_by_role("img", name="influence/influence_over_windows.png")
    expect(picture).to_be_visible()
    page.wait_for_function("() => [...document.images].some(i => i.alt.endsWith('.png') && i.naturalWidth > 500)")
    box = picture.bounding_box()
    assert box["width"] > 500 and box["height"] > 300
    seen = pixels(shot("influence-over-windows"))
    assert (np.abs(seen - HARMFUL).sum(axis=2) < 12).sum() > 100


def test_report_is_alive_inside_the_ui(page, site, shot) -> None:
    page.goto(site.run(site.world.local, "artifacts/influence/report.html"))
    report = page.frame_locator("iframe")
    expect(report.get_by_role("heading", name="Which training samples mattered, and when?")).to_be_visible()
    rows = report.locator("#samples tbody tr")
    expect(rows.first).to_be_visible()
    expect(report.locator("#count")).to_contain_text(str(SMALL["n_train"]))
    report.get_by_label("damaged", exact=True).select_option("yes")
    expect(rows).to_have_count(round(0.1 * SMALL["n_train"]))
    shot("report")


def test_training_run_leads_to_its_model(page, site, shot) -> None:
    page.goto(site.run(site.world.first))
    expect(page.get_by_role("heading", name="train mnist logreg")).to_be_visible()
    shot("training-run")
    page.get_by_role("grid").get_by_role("link", name="model", exact=True).click()
    expect(page.get_by_role("button", name="Register model")).to_be_visible()
    accuracy = site.client.get_run(site.world.first).data.metrics["validation/accuracy"]
    row = page.get_by_role("row").filter(has_text="validation/accuracy")
    expect(row).to_contain_text(f"{accuracy:.6f}"[:8])
    expect(row).to_contain_text("projects/mnist")
    shot("model")


def test_charts_of_windows_are_on_the_run(page, site, shot) -> None:
    page.goto(site.run(site.world.local, "model-metrics"))
    page.get_by_role("searchbox", name="Search metric charts").fill("by_window/ground_truth/spearman")
    charts = page.get_by_test_id("experiment-view-compare-runs-card")
    expect(charts).to_have_count(1)
    expect(charts.locator(".scatterlayer .points path")).to_have_count(len(WINDOWS))
    shot("influence-run-charts")
