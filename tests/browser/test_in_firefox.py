"""MLflow's UI on our runs in Firefox: the list, a run, its report, and the charts that a note leads to."""

from __future__ import annotations

from collections.abc import Iterator

import firefox
import pytest
from browsing import REQUIRED, SETTLED
from world import SMALL, WINDOWS

pytestmark = pytest.mark.slow

SAYS = "document.body.innerText.includes(arguments[0])"
CARDS = "[...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')]"


@pytest.fixture(scope="module")
def fox() -> Iterator[firefox.Firefox]:
    if firefox.firefox() is None:
        (pytest.fail if REQUIRED else pytest.skip)("no Firefox in PATH (apt-get install firefox-esr)")
    with firefox.launched() as found:
        yield found


@pytest.fixture
def visit(fox):
    """Goes to an address and waits for a text there."""

    def go(address: str, text: str) -> firefox.Firefox:
        fox.visit(address, SETTLED)
        fox.wait(SAYS, text)
        return fox

    return go


def test_runs_are_listed_by_names_that_differ(visit, site) -> None:
    fox = visit(site.runs(), "local 5 windows · influence mnist logreg")
    for name in ("cumulative 2 windows · influence mnist logreg", "train mnist logreg"):
        assert fox.run(f"return {SAYS}", name), name


def test_a_run_answers_and_shows_its_windows(visit, site) -> None:
    fox = visit(site.run(site.world.local), "hurt the model most")
    fox.wait(SAYS, "ground_truth/spearman")
    for window in WINDOWS:
        fox.wait(SAYS, window)
    links = fox.run("return [...document.links].map(link => link.href)")
    assert sum("/runs/" in link for link in links) >= len(WINDOWS)


def test_a_note_leads_to_charts_of_the_windows(visit, site) -> None:
    fox = visit(site.run(site.world.local), "Show more")
    fox.run("[...document.querySelectorAll('button')].find(b => b.innerText === 'Show more').click()")
    link = fox.wait("[...document.links].find(link => link.innerText === 'windows')?.href")
    visit(link, "5 matching runs")
    bars = f"{CARDS}.find(card => card.innerText.includes(arguments[0]))?.querySelectorAll('.bartext').length"
    fox.wait(f"({bars}) === {len(WINDOWS)}", "ground_truth/spearman")


def test_the_report_is_alive_inside_the_ui(visit, site) -> None:
    fox = visit(site.run(site.world.local, "artifacts/influence/report.html"), "influence/report.html")
    fox.wait("document.querySelector('iframe')")
    fox.enter("iframe")
    rows = "document.querySelectorAll('#samples tbody tr').length"
    assert fox.wait(rows) > 1
    assert str(SMALL["n_train"]) in fox.run("return document.querySelector('#count').innerText")
    fox.click("#damaged option[value=yes]")
    fox.wait(f"{rows} === {round(0.1 * SMALL['n_train'])}")


def test_a_plot_and_a_table_are_shown(visit, site) -> None:
    plot = "influence/influence_over_windows.png"
    fox = visit(site.run(site.world.local, f"artifacts/{plot}"), plot)
    fox.wait("[...document.images].some(image => image.alt.endsWith('.png') && image.naturalWidth > 500)")
    visit(site.run(site.world.local, "artifacts/influence/windows.json"), "most_harmful")


def test_charts_of_a_run_are_drawn(visit, site) -> None:
    fox = visit(site.run(site.world.local, "model-metrics"), "ground_truth")
    fox.wait(f"{CARDS}.some(card => card.querySelector('.main-svg'))")
