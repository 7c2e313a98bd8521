"""What samples of usual data sets look like."""

from __future__ import annotations

import warnings
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_mlflow import Workload
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.plots.pictures import is_image
from dit_mlflow.workload.appearance import LONGEST_ROW, appearance_of, label_of

GREY = np.arange(30.0).reshape(5, 6)


@pytest.mark.parametrize(
    ("sample", "image"),
    [
        ((torch.tensor(GREY)[None] - 7, 1), GREY / 29),
        ({"pixel_values": torch.tensor(np.stack([GREY] * 3)), "labels": 1}, np.stack([GREY / 29] * 3, axis=2)),
        ((GREY[:, :, None].astype(np.uint8), 0), GREY.astype(np.uint8)),
        ((np.ones((5, 6)), 0), np.zeros((5, 6))),
    ],
)
def test_images(sample: Any, image: np.ndarray) -> None:
    np.testing.assert_allclose(appearance_of(sample), image)


@pytest.mark.parametrize(
    ("sample", "seen", "label"),
    [
        (("some words", 3), "some words", "3"),
        ({"text": "some words", "label": "spam"}, "some words", "spam"),
        ((torch.tensor([1.5, 2.0]), torch.tensor(1.0)), {"x0": 1.5, "x1": 2.0}, "1"),
        ({"input_ids": torch.tensor([37, 21, 18]), "labels": torch.tensor(2)}, "37 21 18", "2"),
        ({"age": 39, "y": torch.tensor([0])}, {"age": 39, "y": 0}, "0"),
        ({"age": 39, "work": "private"}, {"age": 39, "work": "private"}, None),
        ((torch.zeros(1000), torch.zeros(7)), None, None),
        (torch.zeros(3, 2), None, None),
        (object(), None, None),
    ],
)
def test_texts_rows_and_labels(sample: Any, seen: Any, label: str | None) -> None:
    assert appearance_of(sample) == seen
    assert label_of(sample) == label


def test_a_workload_knows_better() -> None:
    data = [(torch.zeros(2), 0), (torch.ones(2), 1)]
    model = torch.nn.Linear(2, 1)
    plain = Workload(model, lambda *_: torch.zeros(1), data, data)  # type: ignore[arg-type]
    assert (plain.appearance(1), plain.label_of(1)) == ({"x0": 1.0, "x1": 1.0}, "1")
    told = Workload(
        model,
        lambda *_: torch.zeros(1),
        data,  # type: ignore[arg-type]
        data,  # type: ignore[arg-type]
        show=lambda index: f"sample {index}",
        label=lambda index: "ab"[index],
    )
    assert (told.appearance(1), told.label_of(1)) == ("sample 1", "b")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I;16", "F"])
def test_pictures_of_pillow_are_drawn(mode: str) -> None:
    picture = Image.new("L" if mode == "I;16" else "RGB", (2000, 30), 255 if mode == "I;16" else (255, 0, 0))
    found = Gallery(shows(lambda _: picture.convert(mode))).appearance(0)
    assert is_image(found)
    assert found.shape[1] == 500
    if mode in {"P", "RGB", "RGBA", "CMYK"}:
        assert found[3, 3, 0] > 250 > 5 > found[3, 3, 1:3].max()
        assert is_image(appearance_of({"image": picture.convert("RGB"), "label": 1}))


@pytest.mark.parametrize(
    "shown",
    [
        torch.rand(3, 8, 9),
        torch.rand(1, 8, 9, requires_grad=True),
        torch.rand(8, 9).bfloat16(),
        np.ones((3, 8, 9)),
        np.ones((8, 9, 1), dtype=np.uint8),
    ],
)
def test_tensors_and_channels_in_front_are_drawn(shown: Any) -> None:
    found = Gallery(shows(lambda _: shown)).appearance(0)
    assert is_image(found)
    assert found.shape[:2] == (8, 9)


def shows(show: Any) -> Workload:
    data = [(torch.zeros(2), 0)]
    return Workload(torch.nn.Linear(2, 1), lambda *_: torch.zeros(1), data, data, show=show)  # type: ignore[arg-type]


def test_of_rows_no_more_is_looked_at_than_is_shown() -> None:
    class Endless(dict[str, int]):
        def items(self) -> Any:
            return ((f"word {number}", number) for number in count())

    assert appearance_of(Endless()) == {f"word {number}": number for number in range(LONGEST_ROW)}


def test_pixels_that_are_no_numbers_leave_the_others_visible() -> None:
    image = np.arange(64.0).reshape(8, 8)
    image[0, 1], image[0, 2] = np.nan, np.inf
    shown = appearance_of(image)
    assert isinstance(shown, np.ndarray)
    assert (shown[0, 0], shown[7, 7]) == (0, 1)
    assert np.isnan(appearance_of(np.full((8, 8), np.nan)) + 0.0).sum() == 0  # type: ignore[operator]
    huge = np.where(np.arange(64).reshape(8, 8) % 2, 1e308, -1e308)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        appearance_of(huge)
