"""Comparing by the links that the jobs print: no click is spent on finding runs or metrics."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

import pytest
from playwright.sync_api import Locator, expect
from world import COMPARED, METHODS, WINDOWS

pytestmark = pytest.mark.slow


def printed(said: str, name: str, site) -> str:
    """The link below ``compare <name>``, at the server that runs now."""
    (link,) = re.findall(rf"compare {name}\n +http://[^/]+/(\S+)", said)
    return f"{site.url}/{link}"


def card(page, title: str) -> Locator:
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    return cards.filter(has=page.get_by_text(title, exact=True)).first


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace("−", "-")) for text in texts]


def test_windows_of_a_run(page, site, shot, names) -> None:
    page.goto(printed(site.world.said, "windows", site))
    expect(page.get_by_text("5 matching runs")).to_be_visible()
    section = page.get_by_test_id("experiment-view-compare-runs-section-header").first
    expect(section).to_have_text(re.compile(r"Windows of local 5 windows · influence mnist logreg\s*\(5\)"))
    assert names() == WINDOWS
    bars = card(page, "ground_truth/spearman").locator(".bartext")
    expect(bars).to_have_count(5)
    history = site.client.get_metric_history(site.world.local, COMPARED)
    logged = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
    # From bottom to top; the UI shows two decimals.
    assert numbers(bars.all_text_contents()) == pytest.approx(logged[::-1], abs=0.0051)
    axes = card(page, "Parallel Coordinates").locator(".parcoords")
    axes.scroll_into_view_if_needed()
    expect(axes).to_be_visible()
    for axis in ("window_start", "detection/auroc"):
        expect(axes.get_by_text(axis)).to_be_visible()
    shot("compare-windows")


def test_methods_lie_over_each_other_in_one_chart(page, site, shot, names) -> None:
    page.goto(printed(site.world.said_of_methods, "methods", site))
    expect(page.get_by_text("4 matching runs")).to_be_visible()
    chart = card(page, COMPARED)
    expect(chart.locator(".scatterlayer .trace").first).to_be_visible()
    for name in METHODS:
        expect(chart.get_by_text(f"{name} ({COMPARED})")).to_be_attached()
    children = site.client.search_runs(
        [site.world.experiment], f"tags.`mlflow.parentRunId` = '{site.world.comparison}'"
    )
    best = sorted(children, key=lambda run: -run.data.metrics["ground_truth/spearman"])
    assert names() == [run.info.run_name for run in best]
    expect(card(page, "cost/influence_seconds vs. ground_truth/spearman").locator(".points path")).to_have_count(4)
    shot("compare-methods")


def test_influence_runs_of_two_kinds_lie_over_each_other(page, site, shot) -> None:
    page.goto(printed(site.world.said, "influence runs", site))
    expect(page.get_by_text("2 matching runs")).to_be_visible()
    chart = card(page, COMPARED)
    for asked in ("local 5 windows", "cumulative 2 windows"):
        expect(chart.get_by_text(f"{asked} · influence mnist logreg ({COMPARED})")).to_be_visible()
    expect(chart.locator(".scatterlayer .trace")).not_to_have_count(0)
    shot("compare-influence-runs")


def test_trainings(page, site, shot) -> None:
    page.goto(printed(site.world.said, "trainings", site))
    expect(page.get_by_text("2 matching runs")).to_be_visible()
    expect(card(page, "validation/accuracy").locator(".bartext")).to_have_count(2)
    expect(card(page, "training/loss").locator(".scatterlayer .trace")).not_to_have_count(0)
    shot("compare-trainings")


def test_tables_of_two_influence_runs_side_by_side(page, site, shot) -> None:
    page.goto(printed(site.world.said, "influence runs", site).replace("=CHART", "=ARTIFACT"))
    expect(page.get_by_role("combobox").filter(has_text="influence/windows.json")).to_be_visible()
    expect(page.get_by_role("combobox", name="selected option: most_harmful")).to_be_visible()
    for run_id in (site.world.local, site.world.cumulative):
        expect(page.get_by_role("grid").last.locator(f"a[href*='{run_id}']")).to_be_visible()
    shot("compare-tables")


def test_page_that_compares_chosen_runs_begins_with_agreement(page, site, shot) -> None:
    runs = site.client.search_runs([site.world.experiment], f"tags.`mlflow.parentRunId` = '{site.world.local}'")
    chosen = quote(json.dumps([run.info.run_id for run in runs]))
    experiments = quote(json.dumps([site.world.experiment]))
    page.goto(f"{site.url}/#/compare-runs?runs={chosen}&experiments={experiments}")
    expect(page.get_by_text("Comparing 5 Runs from 1 Experiment")).to_be_visible()
    plot = page.locator(".js-plotly-plot").filter(has=page.locator(".parcoords"))
    expect(plot).to_be_visible()
    expect(plot.get_by_text("ground_truth/pearson")).to_be_visible()
    expect(plot.get_by_text("window_start")).to_be_visible()
    shot("compare-chosen-runs")
