"""The page holds the numbers it was given, within its size, and no string of the data becomes markup."""

from __future__ import annotations

import base64
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, Samples, random_scores, result
from PIL import Image

from dit_mlflow import Window
from dit_mlflow.evaluation import Metrics, patterns
from dit_mlflow.explanation import Gallery
from dit_mlflow.page import influence_page
from dit_mlflow.workload.appearance import appearance_of


class Page(HTMLParser):
    """Elements, texts, and the embedded data of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: list[str] = []
        self.inside: list[tuple[str, dict[str, str | None]]] = []
        self.data: Any = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self.inside.append((tag, dict(attrs)))

    def handle_data(self, text: str) -> None:
        tag, attributes = self.inside[-1] if self.inside else ("", {})
        if tag == "script" and attributes.get("id") == "data" and self.data is None:
            self.data = json.loads(text)
        elif tag not in ("script", "style"):
            self.texts.append(text)


def floats(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def test_scores_and_exact_values_are_those_given_in_float32() -> None:
    scores = random_scores(5, 30, queries=2)
    exact = random_scores(5, 30, queries=2, seed=1)
    exact[:, :, ::3] = np.nan
    scores[1, 0, 4] = np.nan
    queries = ("loss", "margin of validation sample 3")
    data = Page(influence_page(result(scores, queries=queries), result(exact, queries=queries), None)).data
    # The whole run, which came last, is the first column.
    order = [4, 0, 1, 2, 3, 4]
    assert [column["name"] for column in data["columns"]] == ["whole run", "0–10", "10–20", "20–30", "30–40", "0–40"]
    known = [position for position in range(30) if position % 3]
    assert data["known"] == known
    for place, query in enumerate(data["queries"]):
        assert query["name"] == queries[place]
        np.testing.assert_array_equal(floats(query["scores"]), scores[order, place].ravel().astype("f4"))
        np.testing.assert_array_equal(floats(query["exact"]), exact[order, place][:, known].ravel().astype("f4"))


def test_windows_can_be_chosen_and_the_whole_run_still_ranks() -> None:
    scores = random_scores(4, 12)
    windows = [Window(10, 20)]
    data = Page(influence_page(result(scores), windows=windows)).data
    assert [column["name"] for column in data["columns"]] == ["whole run", "10–20"]
    np.testing.assert_array_equal(floats(data["queries"][0]["scores"]), scores[[3, 1], 0].ravel().astype("f4"))


def test_overview_ranks_by_exact_scores_of_the_whole_run_where_there_are_some() -> None:
    scores = np.array([[[-1.0, 2.0, 3.0]], [[-3.0, 1.0, 2.0]], [[-4.0, 3.0, 5.0]]])
    exact = np.full((1, 1, 3), np.nan)
    exact[0, 0, 0] = 4.0
    estimate = result(scores)
    known = replace(estimate, scores=exact, windows=estimate.windows[-1:])
    page = Page(influence_page(estimate, known))
    query = page.data["queries"][0]
    assert (query["harmful"], query["helpful"], query["flagged"], query["beyond"]) == ([], [2, 0, 1], [], [1, 2, 0])
    assert page.data["exact_ranks"]
    assert query["band"][0] == pytest.approx(np.quantile([4, 3, 5], (0.05, 0.95)))
    alone = Page(influence_page(estimate)).data["queries"][0]
    assert (alone["harmful"], alone["flagged"]) == ([0], [0])
    # Of removals of many, exact removals of one do not take the place.
    many = Page(influence_page(replace(estimate, metadata={"removed": 0.1}), known))
    assert (many.data["queries"][0]["harmful"], many.data["exact_ranks"]) == ([0], False)
    assert any("Alone, exact" in text and "among 10 % of the samples" in text for text in many.texts)


def test_what_is_unclear_is_passed_over_unless_it_is_known_exactly() -> None:
    scores = np.array([[[-3.0, -2.0, -1.0, 4.0, 1.0]]])
    error = np.array([[[9.0, 0.1, 0.1, 9.0, 0.1]]])
    estimate = replace(result(scores, whole=False), standard_error=error)
    page = Page(influence_page(estimate))
    query = page.data["queries"][0]
    assert (query["harmful"], query["helpful"]) == ([1, 2], [4])
    assert np.unpackbits(np.frombuffer(base64.b64decode(query["unclear"]), np.uint8))[:5].tolist() == [1, 0, 0, 1, 0]
    assert any("interval contains 0" in text for text in page.texts)
    exact = np.full((1, 1, 5), np.nan)
    exact[0, 0, 3] = -5.0
    query = Page(influence_page(estimate, replace(estimate, scores=exact, standard_error=None))).data["queries"][0]
    assert (query["harmful"], query["helpful"]) == ([3, 1, 2], [4])


def test_without_the_whole_run_samples_are_ranked_by_the_mean_over_windows() -> None:
    scores = random_scores(3, 12)
    data = Page(influence_page(result(scores, whole=False))).data
    assert data["columns"][0]["name"] == "mean of windows"
    found = floats(data["queries"][0]["scores"]).reshape(4, 12)
    np.testing.assert_allclose(found[0], (scores[0, 0] + scores[1, 0] + scores[2, 0]) / 3, rtol=1e-6)
    assert data["queries"][0]["harmful"][0] == scores[:, 0].mean(axis=0).argmin()


def test_truth_of_some_windows_and_samples_stands_at_their_places() -> None:
    scores = random_scores(3, 6)
    truth = result(random_scores(3, 6, seed=1), method="leave_one_out").select([Window(10, 20)])
    truth.scores[0, 0, [0, 1, 2, 3]] = np.nan
    data = Page(influence_page(result(scores), truth, windows=[Window(0, 10), Window(10, 20)])).data
    assert data["known"] == [4, 5]
    found = floats(data["queries"][0]["exact"]).reshape(3, 2)
    np.testing.assert_array_equal(found[2], truth.scores[0, 0, [4, 5]].astype("f4"))
    assert np.isnan(found[:2]).all()


@pytest.mark.parametrize("damaged", [(), (1, 5, 9, 12)])
def test_flagged_are_the_lowest_negative_scores(damaged: tuple[int, ...]) -> None:
    scores = np.abs(random_scores(3, 40))
    lowest = [31, 7, 22] if damaged else [31, 7]
    scores[2, 0, lowest] = [-3, -2, -1][: len(lowest)]
    scores[2, 0, 0] = np.nan
    subjects = Samples([None] * 40, [None] * 40, corrupted=damaged)
    page = Page(influence_page(result(scores), gallery=subjects))
    # k = 4 either way, of which not all are negative.
    assert page.data["queries"][0]["flagged"] == lowest
    rule = next(text for text in page.texts if text.startswith("Flagged"))
    assert "among the 4 lowest scores" in rule
    assert ("as many as are known to be damaged" in rule) == bool(damaged)
    assert page.data["damaged"] == (list(damaged) or None)


def test_of_more_negative_scores_only_k_are_flagged() -> None:
    scores = -np.abs(random_scores(3, 40))
    data = Page(influence_page(result(scores))).data
    assert data["queries"][0]["flagged"] == np.argsort(scores[2, 0])[:4].tolist()


def test_how_equal_scores_are_flagged_is_said_where_it_matters() -> None:
    scores = np.abs(random_scores(3, 40))
    scores[2, 0, [9, 3, 30, 20]] = -1
    for tied, said in ((4, False), (5, True)):
        scores[2, 0, 7] = 1 if tied == 4 else -1
        page = Page(influence_page(result(scores)))
        rule = next(text for text in page.texts if text.startswith("Flagged"))
        assert ("of equal scores, those of lower index" in rule) == said
        assert page.data["queries"][0]["flagged"] == sorted([9, 3, 30, 20, 7][:tied])[:4]


def test_overview_patterns_band_and_words() -> None:
    scores = random_scores(5, 50)
    found = result(scores)
    windows = list(found.windows[:4])
    metrics = {
        windows[1]: Metrics({"trust/spearman": -0.5, "trust/spearman_low": -0.9, "trust/spearman_high": 0.1}),
        Window(0, 40): Metrics({"ground_truth/spearman": 0.7126, "detection/recall_at_k": 0.875}),
    }
    page = Page(
        influence_page(found, windows=windows, metrics=metrics, training="digits <b>", sentences=("One & two",))
    )
    query = page.data["queries"][0]
    order = np.argsort(scores[4, 0])
    assert (query["harmful"], query["helpful"]) == (order[:4].tolist(), order[::-1][:4].tolist())
    names = [page.data["patterns"][code] for code in query["patterns"]]
    assert names == patterns(found.select(windows)).tolist()
    np.testing.assert_allclose(query["band"][2], np.quantile(scores[1, 0], (0.05, 0.95)))
    assert [column["agreement"] for column in page.data["columns"]] == ["ρ 0.71", None, "ρ −0.50", None, None]
    assert page.data["columns"][2]["trust"] == [
        "Agreement with exact leave-one-out: Spearman −0.50, 95 % interval −0.90 to 0.10."
    ]
    agreement, found_again = page.data["columns"][0]["trust"]
    assert "Spearman 0.71." in agreement
    assert "88\N{NO-BREAK SPACE}%" in found_again
    assert "One & two" in page.texts
    assert any("50 samples in 4 windows of training steps 0–40 of digits <b>" in text for text in page.texts)


def test_hostile_strings_arrive_and_are_never_markup() -> None:
    count = len(HOSTILE)
    harmless = Samples(["x"] * count, ["x"] * count, ["x"] * count)
    plain = influence_page(result(random_scores(3, count)), gallery=harmless)
    queries = [f"loss {text} {k}" for k, text in enumerate(HOSTILE)]
    scores = result(random_scores(3, count, queries=count), queries=queries)
    looks = [text if k % 2 else {text: text, "other": text} for k, text in enumerate(HOSTILE)]
    hostile = influence_page(
        scores, gallery=Samples(looks, HOSTILE, HOSTILE), training=HOSTILE[2], sentences=HOSTILE[:6] + HOSTILE[8:11]
    )
    hostile.encode()
    expected, found = Page(plain), Page(hostile)
    repeated = ("li", "tr", "td")
    assert [tag for tag in found.tags if tag not in repeated] == [tag for tag in expected.tags if tag not in repeated]
    assert set(found.attributes) == set(expected.attributes)
    assert not {name for name in found.attributes if name.startswith("on")}
    assert set(HOSTILE[:6]) <= set(found.data["labels"])
    assert found.data["texts"]["1"] == HOSTILE[1]
    assert found.data["notes"][2] == HOSTILE[2]
    assert len(found.data["notes"][7]) == 200
    assert [found.data["names"][int(at)] for at in found.data["rows"]["0"]] == [HOSTILE[0], "other"]
    assert list(found.data["rows"]["0"].values()) == [HOSTILE[0], HOSTILE[0]]
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", hostile[: hostile.index('id="data"')])


def test_only_our_script_may_run() -> None:
    html = influence_page(result(random_scores(3, 4)))
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://(?!www\.w3\.org/2000/svg)", html
    )


@pytest.mark.parametrize("image", ["digit", "photo", "floats outside", "nan"])
def test_pictures_are_the_samples_own(image: str) -> None:
    digits = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    y, x = np.mgrid[0:1:300j, 0:1:200j]
    shown = {
        "digit": digits,
        "photo": np.stack([x, y, np.sin(9 * x) / 2 + 0.5], axis=2),
        "floats outside": digits / 100 - 0.5,
        "nan": np.where(digits > 99, np.nan, digits / 255),
    }[image]
    data = Page(influence_page(result(random_scores(3, 1)), gallery=Samples([shown], ["7"]))).data
    found = np.asarray(Image.open(BytesIO(base64.b64decode(data["pictures"]["0"].partition(",")[2]))))
    if image == "photo":
        assert found.shape == (128, 85, 3)
        corners = shown[[4, -5]][:, [4, -5]] * 255
        np.testing.assert_allclose(found[[2, -3]][:, [2, -3]], corners, atol=16)
    else:
        expected = np.round(255 * np.clip(np.nan_to_num(shown if image != "digit" else shown / 255), 0, 1))
        np.testing.assert_array_equal(found, expected)


def test_ten_thousand_samples_stay_below_five_megabytes() -> None:
    rng = np.random.default_rng(0)
    count = 10_000
    photo = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    notes = [f"photograph {index} of something, labelled as another ({index})" for index in range(count)]
    subjects = Samples([photo] * count, [f"class {index % 100}" for index in range(count)], notes, range(0, count, 10))
    scores, exact = random_scores(22, count, queries=3), random_scores(22, count, queries=3, seed=1)
    queries = ("a", "b", "c")
    html = influence_page(result(scores, queries=queries), result(exact, queries=queries), subjects)
    assert len(html.encode()) < 5e6
    page = Page(html)
    assert len(page.data["queries"]) == 3
    # Every row that is shown has its picture.
    kept = page.data["samples"]
    assert len(kept) == 2500
    assert {int(position) for position in page.data["pictures"]} == set(range(2500))
    for row in exact[:, 0]:
        assert {int(row.argmin()), int(row.argmax())} <= set(kept)
    assert any("2,500 of 10,000 samples" in text and "to_csv()" in text for text in page.texts)


def test_a_million_samples_stay_below_five_megabytes_and_all_are_counted() -> None:
    count = 1_000_000
    scores, exact = random_scores(4, count), random_scores(4, count, seed=1)
    exact[:, :, 24:] = np.nan
    subjects = Samples([None] * count, ["a", "b"] * (count // 2), None, range(0, count, 20))
    windows = result(scores).windows[:-1]
    html = influence_page(result(scores), result(exact), subjects, windows, rest="The rest is elsewhere")
    assert len(html.encode()) < 5e6
    page = Page(html)
    query, kept = page.data["queries"][0], np.array(page.data["samples"])
    assert len(kept) == 10_000
    ranked = scores[[3, 0, 1, 2], 0].copy()
    ranked[:, :24] = exact[[3, 0, 1, 2], 0, :24]
    for row in ranked:
        assert {*np.argsort(row)[:100].tolist(), *np.argsort(row)[-100:].tolist()} <= set(kept.tolist())
    assert [sum(found["counts"]) for found in query["histogram"]] == [count] * 4
    np.testing.assert_allclose(query["histogram"][2]["from"], ranked[2].min())
    most = int(np.flatnonzero(kept == ranked[0].argmax())[0])
    assert (query["beyond"][most], query["helpful"][0]) == (0, most)
    order = np.argsort(np.argsort(ranked[0]))
    harmful = [place for place, position in enumerate(kept.tolist()) if ranked[0, position] < 0]
    assert [query["beyond"][place] for place in harmful] == order[kept[harmful]].tolist()
    assert any("10,000 of 1,000,000 samples" in text and "The rest is elsewhere." in text for text in page.texts)
    assert any("among the 50,000 lowest scores (as many as are known to be damaged)" in text for text in page.texts)


LARGE = {
    "labels": lambda index: f"{index}<" + "<" * 10**6,
    "texts": lambda index: f"{index}" + "<\x00‮" * 10**5,
    "rows": lambda index: {f"{index} {place}" + "&" * 300: "<" * 300 for place in range(64)},
}


@pytest.mark.parametrize("looks", ["texts", "rows"])
def test_hostile_texts_of_any_length_stay_below_five_megabytes(looks: str) -> None:
    """Markup takes six bytes a character; all is at its most: samples, windows, queries, labels, notes."""
    count, windows = 10_000, 21
    source = SimpleNamespace(
        corrupted=range(count), appearance=LARGE[looks], label_of=LARGE["labels"], describe=LARGE["labels"]
    )
    queries = tuple("<" * 10_000 + str(k) for k in range(3))
    scores, exact = (result(random_scores(windows, count, 3, seed), queries=queries) for seed in (0, 1))
    html = influence_page(scores, exact, Gallery(source), training="<" * 10**6, sentences=["<" * 10**6] * 100)
    html = html.encode().decode()
    assert 2e6 < len(html.encode()) < 5e6
    data = Page(html).data
    assert data["total"] == count
    assert data["texts" if looks == "texts" else "rows"]


def test_many_windows_and_queries_stay_below_five_megabytes() -> None:
    scores = random_scores(1201, 300, queries=2)
    page = Page(
        influence_page(result(scores, queries=("a", "b")), windows=result(scores, queries=("a", "b")).windows[:-1])
    )
    assert page.data["left_out"] == {"queries": 0, "windows": 800}
    assert any("400 of 1,200 windows" in text for text in page.texts)
    many = influence_page(result(random_scores(3, 12, queries=20_000), queries=[f"q{k}" for k in range(20_000)]))
    assert len(many.encode()) < 1e6
    assert "100 of 20,000 queries" in many


def test_texts_are_whole_where_they_matter_and_begun_elsewhere() -> None:
    count = 3000
    texts = [f"{index} " + "word " * 400 for index in range(count)]
    scores = random_scores(3, count)
    data = Page(influence_page(result(scores), gallery=Samples(texts, [None] * count))).data
    assert len(data["texts"]) == count
    assert sum(map(len, data["texts"].values())) <= 1_500_000
    worst = str(int(scores[2, 0].argmin()))
    assert data["texts"][worst] == texts[int(worst)]
    assert int(worst) not in data["cut"]
    begun = str(data["cut"][0])
    assert data["texts"][begun][:-1] == texts[int(begun)][: len(data["texts"][begun]) - 1]


def test_rows_with_different_columns_keep_their_values_apart() -> None:
    looks = [{"age": 3, "name": "a"}, {"size": 0.123456789, "age": 4}, None]
    data = Page(influence_page(result(random_scores(2, 3)), gallery=Samples(looks, ["x", None, "y"]))).data
    for position, row in ((0, {"age": "3", "name": "a"}), (1, {"age": "4", "size": "0.123"})):
        assert {data["names"][int(at)]: value for at, value in data["rows"][str(position)].items()} == row
    assert [data["labels"][code] if code >= 0 else None for code in data["label"]] == ["x", None, "y"]


@pytest.mark.parametrize("scores", [np.zeros((3, 1, 5)), np.full((3, 1, 5), np.nan), np.full((1, 1, 1), -2.0)])
def test_degenerate_scores_have_a_page(scores: np.ndarray) -> None:
    page = Page(influence_page(result(scores, whole=len(scores) > 1)))
    query = page.data["queries"][0]
    assert query["helpful"] == []
    assert query["harmful"] == query["flagged"] == ([0] if scores.flat[0] < 0 else [])
    assert any("Without" in text or "helpful" in text for text in page.texts)


def test_all_is_readable_without_scripts() -> None:
    scores = random_scores(3, 20)
    html = influence_page(result(scores), gallery=Samples([None] * 20, [f"<{k}>" for k in range(20)]))
    table = html[html.index("<noscript>") : html.index("</noscript>")]
    cells = re.findall(r"<td>([^<]*)</td>", table)
    order = np.argsort(scores[2, 0])
    assert [int(cell) for cell in cells[::3]] == [*order[:5], *order[-5:]]
    assert cells[1] == f"&lt;{order[0]}&gt;"
    assert float(cells[2]) == pytest.approx(scores[2, 0, order[0]], rel=0.01)


def test_a_workload_that_cannot_tell_of_its_samples_leaves_gaps() -> None:
    def fail(index: int) -> str:
        raise KeyError(index)

    gallery = Gallery(SimpleNamespace(corrupted=(1,), describe=fail, appearance=fail, label_of=fail))
    data = Page(influence_page(result(random_scores(2, 3)), gallery=gallery)).data
    assert (data["pictures"], data["texts"], data["rows"], data["labels"], data["notes"]) == ({}, {}, {}, None, None)
    assert data["damaged"] == [1]


@pytest.mark.parametrize(
    ("shown", "expected"),
    {
        "numbers up to 255": (np.full((5, 5), 128), np.full((5, 5), 128)),
        "yes and no": (np.eye(4) > 0, 255 * np.eye(4)),
        "transparent, as large as a photograph": (
            np.random.default_rng(0).integers(0, 256, (128, 128, 4), dtype=np.uint8),
            None,
        ),
        "one channel": (np.ones((8, 8, 1)), np.zeros((8, 8))),
        "empty": (np.ones((0, 3)), ...),
        "four axes": (np.ones((2, 2, 2, 2)), ...),
        "words": (np.array([["a"]]), ...),
        "a number": (5, ...),
    }.values(),
)
def test_looks_of_an_unusual_form(shown: Any, expected: Any) -> None:
    """As in the plots: pictures of every kind of number are shown, what is no picture is left out."""
    data = Page(influence_page(result(random_scores(2, 1)), gallery=Samples([shown], ["7"]))).data
    assert list(data["pictures"]) == ([] if expected is ... else ["0"])
    if isinstance(expected, np.ndarray):
        found = np.asarray(Image.open(BytesIO(base64.b64decode(data["pictures"]["0"].partition(",")[2]))))
        np.testing.assert_array_equal(found, expected)


def test_labels_and_descriptions_need_not_be_text() -> None:
    subjects = Samples([None] * 2, [3, 4.5], [1, None])
    data = Page(influence_page(result(random_scores(2, 2)), gallery=subjects)).data
    assert (data["labels"], data["notes"]) == (["3", "4.5"], ["1", None])


def test_rows_with_keys_of_their_own_do_not_widen_the_page() -> None:
    """Bags of words: 3,000 samples with 64 words each that no other has."""
    count = 3000
    looks = [{f"word {index} {place}": 1 for place in range(64)} for index in range(count)]
    begun = time.perf_counter()
    html = influence_page(result(random_scores(2, count)), gallery=Samples(looks, [None] * count))
    assert len(html) < 4_000_000
    assert time.perf_counter() - begun < 20
    data = Page(html).data
    assert {len(row) for row in data["rows"].values()} == {64}
    position, row = next(iter(data["rows"].items()))
    assert {data["names"][int(at)] for at in row} == set(looks[int(position)])


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_what_cannot_be_shown_costs_its_cell() -> None:
    row = {"digits": 10**5000, "mute": Mute(), "long": "x" * 10**6, "plain": 1.5}
    gallery = Gallery(
        SimpleNamespace(
            corrupted=(), appearance=lambda index: row, label_of=lambda index: "l" * 10**6, describe=lambda _: Mute()
        )
    )
    html = influence_page(result(random_scores(2, 3)), gallery=gallery)
    assert len(html) < 200_000
    data = Page(html).data
    shown = {data["names"][int(at)]: value for at, value in data["rows"]["0"].items()}
    assert shown["digits"] == "(int, which cannot be shown: ValueError)"
    assert shown["mute"] == "(Mute, which cannot be shown: RuntimeError)"
    assert shown["long"] == "x" * 199 + "…"
    assert shown["plain"] == "1.5"
    assert data["notes"] is None
    assert len(gallery.line(0)) < 1010


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_images_are_shrunk_before_they_are_copied(dtype: type) -> None:
    """A view of one number may have a side of any length; forty large photographs would take minutes."""
    bomb = np.broadcast_to(np.ones(1, dtype), (500_000, 500_000, 3))
    large = np.zeros((10_000, 10_000, 3), dtype)
    large[:5_000] = 1
    begun = time.perf_counter()
    looks = [bomb, *[large] * 40]
    source = SimpleNamespace(corrupted=(), appearance=lambda k: looks[k], label_of=lambda k: None, describe=None)
    data = Page(influence_page(result(random_scores(2, 41)), gallery=Gallery(source))).data
    assert len(data["pictures"]) == 41
    guessed = appearance_of((bomb, 0))
    assert isinstance(guessed, np.ndarray)
    assert max(guessed.shape) <= 512
    assert time.perf_counter() - begun < 20
