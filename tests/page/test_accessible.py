"""The page without findings of axe-core, by keyboard alone, on narrow screens, in Chromium and in Firefox."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import firefox
import numpy as np
import pytest
from browsing import REQUIRED
from pages import Opener, Samples, random_scores, result

from dit_mlflow import Window
from dit_mlflow.page import influence_page

COUNT = 80
RUN = "return axe.run(document, {resultTypes: ['violations']})"
COMMAND = "mlflow run '/home/me/a clone' -e influence --env-manager local -P training_run=0123456789abcdef"
LONG = " ".join(["words"] * 400)
PIXELS = np.random.default_rng(3).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
LOOKS = {
    "pictures": list(PIXELS),
    "texts": [f"{index} {LONG}" for index in range(COUNT)],
    "rows": [{f"column {k}": index * k for k in range(30)} for index in range(COUNT)],
}


def page_of(looks: str, windows: int = 4) -> str:
    scores, exact = random_scores(windows + 1, COUNT, 2), random_scores(windows + 1, COUNT, 2, seed=1)
    exact[:, :, 7:] = np.nan
    queries = ("loss", "margin of the first validation sample")
    notes = [f"sample {index} of the training set" for index in range(COUNT)]
    samples = Samples(LOOKS[looks], ["one", "seven"] * (COUNT // 2), notes, range(0, COUNT, 9))
    found = result(scores, queries=queries)
    said = ("Sample 3 hurt the model most.", "Sample 5 helped.")
    asked = {"sentences": said, "next_steps": [("See whether it helps", COMMAND)], "rest": "All are elsewhere"}
    return influence_page(found, result(exact, queries=queries), samples, found.windows[:-1], **asked)


@pytest.fixture(scope="module")
def axe() -> str:
    """The script of axe-core."""
    if find_spec("axe_playwright_python") is None:
        (pytest.fail if REQUIRED else pytest.skip)("axe-playwright-python is not installed (the extra dev)")
    return (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["light", pytest.param("dark", marks=pytest.mark.slow)])
def fox(request: pytest.FixtureRequest) -> Iterator[firefox.Firefox]:
    """A Firefox in either scheme."""
    if firefox.firefox() is None:
        (pytest.fail if REQUIRED else pytest.skip)("no Firefox in PATH (apt-get install firefox-esr)")
    with firefox.launched(request.param == "dark") as found:
        yield found


def serious(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Findings that keep somebody from the page."""
    return [
        (one["id"], node["html"][:200])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


@pytest.mark.parametrize(
    ("scheme", "width", "looks"),
    [
        ("light", 400, "pictures"),
        ("dark", 1280, "rows"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("light", 1280, "pictures"), *(("dark", width, "pictures") for width in (400, 1280)))
        ),
        pytest.param("light", 400, "texts", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing_serious(opened: Opener, axe: str, scheme: str, width: int, looks: str) -> None:
    page = opened(page_of(looks), scheme, width)
    page.locator("td.index button").nth(1).click()
    page.locator("summary").click()
    page.locator("#picker button").nth(2).click()
    page.locator("body").evaluate(f"() => {{ {axe} }}")
    assert serious(page.locator("body").evaluate(f"() => {{ {RUN} }}")) == []


def test_axe_looks(opened: Opener, axe: str) -> None:
    """A picture without a text, and grey on grey, are found."""
    body = opened(page_of("pictures")).locator("body")
    body.evaluate("body => { body.append(new Image()); document.querySelector('h1').style.color = '#8888'; }")
    body.evaluate(f"() => {{ {axe} }}")
    assert {name for name, _ in serious(body.evaluate(f"() => {{ {RUN} }}"))} == {"image-alt", "color-contrast"}


@pytest.mark.parametrize("windows", [*(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4)), 40])
@pytest.mark.parametrize("looks", LOOKS)
def test_on_a_narrow_screen_nothing_is_cut_off(opened: Opener, looks: str, windows: int) -> None:
    page = opened(page_of(looks, windows), width=400)
    page.locator("td.index button").first.click()
    page.locator("summary").click()
    for part in ("html", ".table-scroll"):
        assert page.locator(part).evaluate("part => part.scrollWidth - part.clientWidth") <= 0, part
    for seen in ("#samples td.overall", ".detail svg.chart", "#overview g.name", ".copy"):
        box = page.locator(seen).first.bounding_box()
        assert box["x"] >= 0, seen
        assert box["x"] + box["width"] <= 400, seen


def test_the_tab_key_reaches_all_that_can_be_done(opened: Opener) -> None:
    page = opened(page_of("pictures"))
    body = page.locator("body")
    body.evaluate("() => document.querySelector('.copy').focus()")
    reached: list[str] = []
    focused = (
        "() => { const at = document.activeElement; return at.id || at.getAttribute('aria-label') || at.innerText; }"
    )
    for _ in range(45):
        reached.append(body.evaluate(focused))
        page.locator(":focus").press("Tab")
    wanted = [
        "Copy: See whether it helps",
        "query",
        "search",
        "side",
        "damaged",
        "flagged",
        "label",
        "pattern",
        "clear",
    ]
    # The heading of a column is called label too.
    assert [name for name in reached if name in wanted][: len(wanted)] == wanted
    assert sum(name.startswith("show sample") for name in reached) == 8
    first = page.locator("td.index button").first.inner_text()
    assert f"sample {first}" in reached
    # Opened and closed from there, the focus stays.
    page.locator("td.index button").first.focus()
    for opened_now in (1, 0):
        page.locator(":focus").press("Enter")
        assert page.locator(".detail").count() == opened_now
        assert body.evaluate(focused) == f"sample {first}"


@pytest.mark.parametrize("width", [400, pytest.param(1280, marks=pytest.mark.slow)])
def test_firefox_shows_the_same(fox: firefox.Firefox, axe: str, tmp_path: Path, width: int) -> None:
    path = tmp_path / "report.html"
    path.write_text(page_of("pictures"), encoding="utf-8")
    fox.open(path, width)
    fox.run("window.failed = []; addEventListener('error', (event) => window.failed.push(event.message))")
    assert fox.run("return innerWidth") == width
    rows = "return [...document.querySelectorAll('#samples td.index')].map((cell) => Number(cell.innerText))"
    scores, exact = random_scores(5, COUNT, 2), random_scores(5, COUNT, 2, seed=1)
    scores[:, :, :7] = exact[:, :, :7]
    assert fox.run(rows) == np.argsort(scores[4, 0], kind="stable")[:50].tolist()
    fox.click("td.index button")
    assert fox.run("return document.querySelectorAll('.detail img.picture, .detail svg.chart').length") == 2
    fox.press("td.index button", "\ue015")
    assert fox.run("return document.activeElement.innerText") == str(np.argsort(scores[4, 0])[1])
    fox.click("#picker button:nth-child(3)")
    assert fox.run(rows) == np.argsort(scores[1, 0], kind="stable")[:50].tolist()
    fox.press("#search", "set")
    fox.click(".copy")
    assert fox.run("return document.querySelector('#copied').innerText") == "Copied."
    assert fox.run("return getSelection().toString()") == COMMAND
    assert fox.run("return document.documentElement.scrollWidth") <= width
    assert serious(fox.run(f"{axe}; {RUN}")) == []
    assert fox.run("return window.failed") == []
    if folder := os.environ.get("DIT_SCREENSHOTS"):
        fox.shot(Path(folder) / f"report-firefox-{width}.png")


def test_the_page_says_its_window(opened: Opener) -> None:
    """For who does not see which is pressed."""
    page = opened(page_of("texts"))
    assert page.locator("#picker [aria-pressed='true']").inner_text() == "whole run"
    assert page.get_by_role("table", name="Samples").count() == 1
    assert page.get_by_role("columnheader", name="10–20").count() == 0
    page.get_by_role("button", name=str(Window(10, 20)).replace("-", "–")).click()
    assert page.get_by_role("columnheader", name="10–20").count() == 1
