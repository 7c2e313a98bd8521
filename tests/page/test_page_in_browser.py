"""The page in Chromium, in the sandbox that MLflow's UI puts it into: no network, no storage, no origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, Opener, Samples, random_scores, result

from dit_mlflow import Window
from dit_mlflow.page import influence_page

COUNT = 130
PIXELS = np.random.default_rng(3).integers(0, 256, (COUNT, 8, 8), dtype=np.uint8)
LABELS = [("one", "seven")[index % 2] for index in range(COUNT)]
NOTES = [f"digit number {index}" for index in range(COUNT)]
DAMAGED = tuple(range(0, COUNT, 13))
WINDOWS = tuple(Window(10 * k, 10 * k + 10) for k in range(4))
SCORES = random_scores(5, COUNT)
SCORES[1, 0, 17] = np.nan
TRUTH = random_scores(5, COUNT, seed=1)
TRUTH[:, :, 5:] = np.nan
RANKED = np.where(np.isnan(TRUTH), SCORES, TRUTH)
"""Exact scores stand in the place of estimates."""


@pytest.fixture(scope="module")
def digits() -> str:
    subjects = Samples(list(PIXELS), LABELS, NOTES, DAMAGED)
    return influence_page(
        result(SCORES),
        result(TRUTH, method="leave_one_out"),
        subjects,
        WINDOWS,
        sentences=("They harm.", "So they say."),
    )


def indices(page: Any) -> list[int]:
    return [int(text) for text in page.locator("#samples td.index").all_inner_texts()]


def scores_of(page: Any, key: str) -> list[str]:
    return page.locator(f"#samples td.{key}").all_inner_texts()  # type: ignore[no-any-return]


def order_by(scores: np.ndarray) -> list[int]:
    """NaN last, equal ones in their order."""
    return np.argsort(scores, kind="stable").tolist()


def button(page: Any, name: str) -> Any:
    """Of the picker, by the window's name."""
    return page.locator("#picker button", has_text=name)


def ascending(page: Any, key: str) -> str | None:
    return page.locator(f"th[data-key='{key}']").get_attribute("aria-sort")  # type: ignore[no-any-return]


def test_it_opens_with_the_answer_and_the_most_harmful_first(opened: Opener, digits: str) -> None:
    page = opened(digits)
    assert page.locator(".answer li").all_inner_texts() == ["They harm.", "So they say."]
    assert indices(page) == order_by(RANKED[4, 0])[:50]
    worst = RANKED[4, 0].min() * 1e3
    assert scores_of(page, "overall")[0] == f"−{-worst:.3f}"
    assert "×10⁻³" in page.locator("th[data-key='overall']").inner_text()
    assert ascending(page, "overall") == "ascending"
    assert page.locator("#count").inner_text() == f"{COUNT} of {COUNT} samples"


def test_sorting_by_clicking_headers(opened: Opener, digits: str) -> None:
    page = opened(digits)
    page.locator("th[data-key='overall'] button").click()
    assert indices(page) == order_by(-RANKED[4, 0])[:50]
    assert ascending(page, "overall") == "descending"
    page.locator("th[data-key='index'] button").click()
    assert indices(page) == list(range(50))
    assert (ascending(page, "index"), ascending(page, "overall")) == ("ascending", "none")
    page.locator("th[data-key='estimate'] button").click()
    # The estimates that exact scores replaced.
    assert indices(page)[:6] == [*order_by(SCORES[4, 0, :5]), 5]
    assert scores_of(page, "estimate")[5] == "–"


def test_turning_pages_reaches_every_sample_once(opened: Opener, digits: str) -> None:
    page = opened(digits)
    found = indices(page)
    while page.locator("#next").is_enabled():
        page.locator("#next").click()
        found += indices(page)
    assert found == order_by(RANKED[4, 0])
    assert page.locator("#page-number").inner_text() == "page 3 of 3"


@pytest.mark.parametrize("way", ["button", "chart"])
def test_picking_a_window_sorts_by_it(opened: Opener, digits: str, way: str) -> None:
    page = opened(digits)
    if way == "button":
        button(page, "10–20").click()
    else:
        page.locator("#overview rect.slot[data-column='2']").click(position={"x": 4, "y": 4})
    assert indices(page) == order_by(RANKED[1, 0])[:50]
    assert button(page, "10–20").get_attribute("aria-pressed") == "true"
    assert button(page, "whole run").get_attribute("aria-pressed") == "false"
    assert "10–20" in page.locator("th[data-key='picked']").inner_text()
    page.locator("#search").fill("digit number 17")
    # Not computed in this window, and so at the end.
    assert scores_of(page, "picked")[indices(page).index(17)] == "–"


def test_filters_and_search(opened: Opener, digits: str) -> None:
    page = opened(digits)
    page.locator("#damaged").select_option("yes")
    assert sorted(indices(page)) == list(DAMAGED)
    page.locator("#flagged").select_option("yes")
    flagged = set(order_by(RANKED[4, 0])[: len(DAMAGED)])
    assert set(indices(page)) == flagged & set(DAMAGED)
    page.locator("#clear").click()
    page.locator("#label").select_option(label="seven")
    page.locator("#side").select_option("helpful")
    page.locator("#search").fill("NUMBER 1")
    expected = {k for k in range(COUNT) if k % 2 and RANKED[4, 0, k] > 0 and str(k).startswith("1")}
    assert set(indices(page)) == expected
    assert page.locator("#count").inner_text() == f"{len(expected)} of {COUNT} samples"
    page.locator("#search").fill("no such thing")
    assert page.locator("#count").inner_text() == f"0 of {COUNT} samples"


def test_opening_a_sample_shows_it_with_its_influence_and_the_exact_one(opened: Opener, digits: str) -> None:
    page = opened(digits)
    page.locator("th[data-key='index'] button").click()
    page.locator("tr[data-index='3']").click()
    detail = page.locator(".detail")
    picture = detail.locator("img.picture")
    box = picture.bounding_box()
    assert box["width"] == box["height"] == 196
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 8
    assert picture.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    facts = detail.locator("dl").inner_text().split("\n")
    assert facts[facts.index("label") + 1] == "seven"
    assert facts[facts.index("about") + 1] == NOTES[3]
    detail.get_by_text("Numbers").click()
    rows = [row.split("\t") for row in detail.locator(".numbers tbody").inner_text().strip().split("\n")]
    assert [row[0] for row in rows] == ["whole run", "0–10", "10–20", "20–30", "30–40"]
    for row, place in zip(rows, (4, 0, 1, 2, 3), strict=True):
        for cell, expected in ((row[1], SCORES[place, 0, 3]), (row[2], TRUTH[place, 0, 3])):
            assert float(cell.split(" ")[0].replace("−", "-")) == pytest.approx(expected * 1e3, abs=6e-4)
    points = detail.locator("svg.chart circle.point")
    heights = [float(points.nth(k).get_attribute("cy")) for k in range(points.count())]
    np.testing.assert_allclose(np.corrcoef(heights, SCORES[:4, 0, 3])[0, 1], -1, atol=1e-5)
    assert detail.locator("svg.chart path.hollow").count() == 4
    page.locator("tr[data-index='3']").click()
    assert detail.count() == 0


def test_the_overview_leads_to_the_sample(opened: Opener, digits: str) -> None:
    page = opened(digits)
    best = int(RANKED[4, 0].argmax())
    page.locator("#search").fill("no such thing")
    page.get_by_role("button", name=f"show sample {best}", exact=True).click()
    assert page.locator("tr.open").get_attribute("data-index") == str(best)
    assert page.locator(".detail img.picture").is_visible()


def test_the_keyboard_is_enough(opened: Opener, digits: str) -> None:
    page = opened(digits)
    first, second = indices(page)[:2]
    page.locator(f"tr[data-index='{first}'] td.index button").press("ArrowDown")
    at = page.locator(f"tr[data-index='{second}'] td.index button")
    assert at.evaluate("button => button === document.activeElement")
    at.press("Enter")
    assert page.locator("tr.open").get_attribute("data-index") == str(second)
    assert at.evaluate("button => button === document.activeElement")
    assert at.get_attribute("aria-expanded") == "true"
    picked = button(page, "20–30")
    picked.focus()
    picked.press("Enter")
    assert picked.get_attribute("aria-pressed") == "true"
    assert picked.evaluate("button => button === document.activeElement")
    assert page.locator("tr.open").count() <= 1


CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const painted = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (getComputedStyle(at).backgroundColor.startsWith('rgb(')) return colour;
    }
    return [255, 255, 255];
  };
  const light = (colour) => colour.slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  return [...document.querySelectorAll('body *')].filter((element) => element.checkVisibility()
    && [...element.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()))
    .filter((element) => !element.closest('script, style, button:disabled, option'))
    .map((element) => {
      const style = getComputedStyle(element);
      const ink = light(parse(element.closest('svg') ? style.fill : style.color));
      const paper = light(painted(element));
      return [(Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05), element.outerHTML.slice(0, 90)];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground_in_both_themes(opened: Opener, digits: str, scheme: str) -> None:
    page = opened(digits, scheme)
    page.locator("tr.sample").first.click()
    ground = page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    shades = [int(part) for part in ground[4:-1].split(",")]
    assert max(shades) < 60 if scheme == "dark" else min(shades) > 240
    found = page.locator("body").evaluate(CONTRAST)
    assert len(found) > 300
    assert [(ratio, where) for ratio, where in found if ratio < 4.5] == []


@pytest.mark.parametrize("width", [700, 800, 1000])
def test_nothing_is_cut_off_at_the_width_of_the_artifact_pane(opened: Opener, digits: str, width: int) -> None:
    page = opened(digits, width=width)
    button(page, "10–20").click()
    page.locator("tr.sample").first.click()
    for part in ("html", ".table-scroll"):
        wide = page.locator(part).evaluate("part => part.scrollWidth - part.clientWidth")
        assert wide <= 0, part


def test_hostile_strings_are_shown_as_they_are(opened: Opener) -> None:
    looks = [text if k % 2 else {text: text, "other": 1} for k, text in enumerate(HOSTILE)]
    count = len(HOSTILE)
    scores = result(random_scores(3, count, queries=2), queries=(HOSTILE[1], HOSTILE[8]))
    sentences = (HOSTILE[0], HOSTILE[2])
    html = influence_page(scores, None, Samples(looks, HOSTILE, HOSTILE), WINDOWS[:2], None, HOSTILE[3], sentences)
    page = opened(html)
    assert page.locator(".answer li").all_inner_texts() == list(sentences)
    assert page.locator("#label option").count() == count + 1
    page.locator("#query").select_option("1")
    page.locator("th[data-key='index'] button").click()
    for index, text in enumerate(HOSTILE):
        kept = text if len(text) <= 200 else text[:199] + "…"
        kept = kept.encode("utf-8", "replace").decode()
        row = page.locator(f"tr[data-index='{index}']")
        assert row.locator("td.label").text_content() == kept
        assert row.locator("td.sample").text_content() == kept
        row.click()
        shown = page.locator(".detail .text, .detail .row-values").first.text_content()
        whole = text.encode("utf-8", "replace").decode()
        if index % 2:
            assert shown == whole
        else:
            assert shown in (f"{kept}{kept}other1", f"other1{kept}{kept}")
        assert page.locator(".detail img, .detail script, .detail b").count() == 0
        row.click()
    page.locator("#search").fill("onerror")
    assert indices(page) == [2]
    # Characters that turn the direction of writing stay within their own cell.
    cell = page.locator("bdi.data").first
    assert cell.evaluate("cell => getComputedStyle(cell).unicodeBidi") == "isolate"


def test_what_is_injected_all_the_same_cannot_run_or_load(browser: Any, tmp_path: Path, digits: str) -> None:
    """The policy holds even if escaping did not."""
    injected = (
        "<script>document.title='ran'</script><img src='http://192.0.2.1/x.png' onerror=\"document.title='ran'\">"
    )
    (tmp_path / "report.html").write_text(digits.replace("<main", injected + "<main", 1), encoding="utf-8")
    page = browser.new_page()
    asked: list[str] = []
    page.on("requestfinished", lambda request: asked.append(request.url))
    page.goto((tmp_path / "report.html").as_uri())
    page.locator("#samples tbody tr").first.wait_for()
    assert page.title() == "Influence of training samples"
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()


def test_a_page_without_scripts_still_answers(browser: Any, tmp_path: Path, digits: str) -> None:
    (tmp_path / "report.html").write_text(digits, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.get_by_text("They harm.").is_visible()
    assert page.get_by_role("cell", name=str(int(RANKED[4, 0].argmin())), exact=True).is_visible()
    context.close()


def test_what_to_do_now_can_be_copied(opened: Opener) -> None:
    """From inside of the sandbox, which has no clipboard API."""
    steps = [("See <this>", "dit-mlflow cleanse --training-run 'a b'"), ("And that", "dit-mlflow compare")]
    page = opened(influence_page(result(random_scores(3, 9)), next_steps=steps))
    assert page.locator(".steps code").all_inner_texts() == [command for _, command in steps]
    assert page.locator(".steps li").first.inner_text().startswith("See <this>")
    page.locator("body").evaluate(
        "() => document.addEventListener('copy', () => { window.copied = getSelection().toString(); })"
    )
    page.get_by_role("button", name="Copy: See <this>").click()
    assert page.locator("body").evaluate("() => window.copied") == steps[0][1]
    assert page.locator("#copied").inner_text() == "Copied."
    assert opened(influence_page(result(random_scores(3, 9)))).locator(".steps").count() == 0


def test_where_samples_are_images_every_row_has_its_picture(opened: Opener) -> None:
    count = 3000
    digits = np.random.default_rng(0).integers(0, 256, (count, 9, 9), dtype=np.uint8)
    page = opened(influence_page(result(random_scores(3, count)), gallery=Samples(list(digits), [None] * count)))
    assert page.locator("#count").inner_text() == "2,500 of 2,500 samples on this page"
    assert "2,500 of 3,000 samples" in page.locator(".left-out").inner_text()
    assert page.locator("#spread rect.bar").count() == 60
    for _ in range(2):
        assert page.locator("tr.sample").count() == page.locator("tr.sample img.thumb").count() == 50
        page.locator("th[data-key='index'] button").click()


DEGENERATE = {
    "one window": (random_scores(1, 9), False, Samples([None] * 9, [None] * 9)),
    "one window of the run": (random_scores(2, 9), True, Samples(["text"] * 9, ["a"] * 9)),
    "one sample": (random_scores(3, 1), True, Samples([PIXELS[0]], ["a"])),
    "constant": (np.full((3, 1, 9), 2e-5), True, None),
    "zero": (np.zeros((3, 1, 9)), True, None),
    "nothing computed": (np.full((3, 1, 9), np.nan), True, None),
    "colour": (random_scores(3, 4), True, Samples([np.full((40, 70, 3), 0.4)] * 4, ["a"] * 4)),
    "two hundred windows": (random_scores(200, 9), False, None),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_unusual_results_open_and_their_samples_too(opened: Opener, name: str) -> None:
    scores, whole, subjects = DEGENERATE[name]
    page = opened(influence_page(result(scores, whole), None, subjects))
    assert page.locator("tr.sample").count() == scores.shape[2]
    page.locator("tr.sample").first.click()
    assert page.locator(".detail svg.chart").is_visible()
    for drawing in page.locator("svg.chart").all():
        assert "NaN" not in drawing.inner_html()
        assert "Infinity" not in drawing.inner_html()
    cells = scores_of(page, "overall")
    assert (cells[0] == "–") == np.isnan(scores).all()


def test_of_several_queries_one_is_picked(opened: Opener) -> None:
    scores = random_scores(3, 20, queries=3)
    page = opened(influence_page(result(scores, queries=("loss", "margin", "norm"))))
    page.locator("#query").select_option(label="norm")
    assert indices(page) == order_by(scores[2, 2])
    assert "norm" in page.locator("#overview").inner_text()


def test_ten_thousand_samples_are_sorted_and_filtered_at_once(opened: Opener) -> None:
    count = 10_000
    scores = random_scores(22, count)
    labels = [str(index % 10) for index in range(count)]
    page = opened(influence_page(result(scores), gallery=Samples(["some text"] * count, labels)))
    took = page.locator("body").evaluate(
        """() => {
          const started = performance.now();
          document.querySelector("th[data-key='sample'] button").click();
          document.querySelector('#picker button:nth-child(5)').click();
          return performance.now() - started;
        }"""
    )
    assert indices(page) == order_by(scores[3, 0])[:50]
    assert took < 2000
    page.locator("#search").fill("1234")
    assert set(indices(page)) == {k for k in range(count) if "1234" in str(k)}
