"""Figures are written once: names, headings, directions."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

import dit_mlflow
from dit_mlflow.evaluation import Metrics, figures
from dit_mlflow.evaluation.figures import FIGURES, SHARE, Figure, by_default, figure_of
from dit_mlflow.explanation.model_card import CARD_COLUMNS
from dit_mlflow.explanation.over_seeds import COMPARED
from dit_mlflow.explanation.tables import OF_WINDOWS
from dit_mlflow.tracking.ui import views

PACKAGE = Path(dit_mlflow.__file__).parent

AFFIXES = {text for name, text in vars(figures).items() if name.isupper() and isinstance(text, str)}
AFFIXES -= {figures.SHARE, figures.LOSS, figures.ACCURACY}
"""What stands before and behind names."""

COMMON = {
    *("loss", "accuracy"),  # also of steps, methods and workloads
    *("samples", "helpful", "changed"),
    *("early", "late", "stable", "fluctuating"),  # also a sample's pattern
    *("window_start", "window_end", "max_drift"),  # also columns and metadata of scores
}
"""Leaves that are words of other things too."""


def spelled(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and texts of the string literals of a file, its docstrings left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.lineno, node.value


def is_registered(text: str) -> bool:
    """Whether a literal is, or holds, what belongs to the registry alone."""
    names = [name for name in FIGURES if "/" in name]
    series = (figures.BY_WINDOW, figures.MEAN_OVER_WINDOWS, figures.BY_FRACTION)
    leaves = {figure.leaf for figure in FIGURES.values()} - COMMON
    return text in leaves | AFFIXES or any(part in text for part in (*names, *series))


def test_no_other_module_spells_the_name_of_a_figure() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path != Path(figures.__file__)]
    assert len(files) > 100
    found = [
        f"{path.relative_to(PACKAGE)}:{line} {text!r}"
        for path in files
        for line, text in spelled(path)
        if is_registered(text)
    ]
    assert found == []


def test_the_scripts_of_the_page_know_no_figure() -> None:
    scripts = list((PACKAGE / "page" / "assets").glob("*.js"))
    assert scripts
    known = {word for figure in FIGURES.values() for word in (figure.leaf, figure.heading)} - COMMON
    for path in scripts:
        assert set(re.findall(r"\w+", path.read_text(encoding="utf-8"))) & known == set(), path


@pytest.mark.parametrize("text", ["by_window/", "_low", "auroc", "metrics.detection/auroc", "charts `by_window/…`"])
def test_a_spelled_name_would_be_found(text: str, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(f'"""{text}"""\nname = f"{text}{{1}}"\nother = "loss"\n', encoding="utf-8")
    assert [line for line, found in spelled(module) if is_registered(found)] == [2]


CASES = {
    "ground_truth/spearman": figures.SPEARMAN,
    "ground_truth/spearman_low": figures.SPEARMAN,
    "ground_truth/attainable_jaccard_30": figures.JACCARD_30,
    "by_window/trust/smoothness": figures.SMOOTHNESS,
    "mean_over_windows/detection/auroc": figures.AUROC,
    "detection/accuracy_chance": figures.DETECTION_ACCURACY,
    "patterns/late": figures.LATE,
    "patterns/late/pearson_high": figures.PEARSON,
    "by_fraction/validation/loss": figures.VALIDATION_LOSS,
    "before/test/loss_high": figures.TEST_LOSS,
    "test/loss_lowest_draw": figures.TEST_LOSS,
    "window_end": figures.WINDOW_END,
}


@pytest.mark.parametrize("name", CASES)
def test_a_metric_is_found_whatever_stands_around_it(name: str) -> None:
    assert figure_of(name) is CASES[name]


@pytest.mark.parametrize("name", ["spearman", "ground_truth/lucky", "patterns/lucky/spearman", "training/accuracy", ""])
def test_a_name_of_no_figure_is_refused(name: str) -> None:
    with pytest.raises(KeyError, match=r"is the name of no figure; write it into"):
        figure_of(name)


BY_DEFAULT = {
    "ground_truth/spearman": True,
    "ground_truth/spearman_low": True,
    "by_window/ground_truth/spearman": True,
    "ground_truth/attainable_spearman": True,
    "by_window/ground_truth/attainable_spearman": False,  # Two forms at once.
    "ground_truth/kendall": False,
    "ground_truth/pearson_low": False,
    "patterns/early": True,
    "patterns/early/spearman": False,
    "detection/recall_at_k_chance": True,
    "detection/auroc_chance": False,
    "cost/cpu_seconds": False,
    "validation/accuracy": True,
    "by_fraction/validation/accuracy": True,
    "test/loss_low": False,
    "test/loss_lowest_draw": False,
    "gain/test/f1_low": True,
    "of a user": True,
}


@pytest.mark.parametrize("name", BY_DEFAULT)
def test_what_is_logged_by_default(name: str) -> None:
    assert by_default(name) is BY_DEFAULT[name]
    metrics = Metrics({name: 0.5}, {f"{name}_of_none": "why"})
    assert (name in metrics.shown(False).values, name in metrics.shown(True).values) == (BY_DEFAULT[name], True)
    assert f"{name}_of_none" in metrics.shown(False).undefined


def test_what_tables_cards_and_saved_charts_need_is_logged_by_default() -> None:
    run = mlflow.entities.Run(
        mlflow.entities.RunInfo("f" * 32, "1", "u", "FINISHED", 0, 1, "active", run_name="run"),
        mlflow.entities.RunData([mlflow.entities.Metric(figures.SPEARMAN.name, 1, 0, 0)], [], []),
    )
    made = (views.TRAININGS, views.INFLUENCES, views.windows_view(run), views.methods_view(run))
    keys = {"metricKey", "selectedMetricKeys", "selectedMetrics", "xaxis", "yaxis"}
    charts = [value for view in made for chart in view.charts for key, value in chart.items() if key in keys]
    needed = {name for value in charts for name in re.findall(r"[a-z_/0-9]+/[a-z_/0-9]+", str(value))}
    needed |= {column.removeprefix("metrics.") for view in made for column in view.columns if "metrics." in column}
    needed |= {name for figure in OF_WINDOWS for name in (figure.name, figure.by_window)}
    needed |= {name for figure in (figures.REMOVAL_LDS, figures.TRUST_SPEARMAN) for name in (figure.low, figure.high)}
    needed |= {figure.name for figure in (*CARD_COLUMNS, *COMPARED.values(), figures.TRUST_SAMPLES)}
    assert len(needed) > 25
    assert [name for name in needed if not by_default(name)] == []


def test_metrics_of_a_workload_are_of_its_data_and_higher_is_better_but_for_the_loss() -> None:
    accuracy, own = figure_of("by_fraction/validation/accuracy"), figure_of("test/f1_high")
    assert (accuracy.name, accuracy.heading, accuracy.unit) == ("validation/accuracy", "validation accuracy", SHARE)
    assert (own.name, own.heading, own.unit) == ("test/f1", "test f1", "")
    assert accuracy.higher_is_better and own.higher_is_better
    assert [name for name in FIGURES if name.endswith("/loss") and FIGURES[name].higher_is_better is not False] == []


def test_more_gain_is_better_of_a_loss_too() -> None:
    for name, unit in (("test/loss", ""), ("validation/accuracy", SHARE)):
        gain = figure_of(f"gain/{name}_low")
        assert (gain.name, gain.heading, gain.unit, gain.higher_is_better) == (f"gain/{name}", "gain", unit, True)


def test_names_around_a_figure() -> None:
    figure = Figure("a/b", "B", "what b says", higher_is_better=None)
    assert (figure.group, figure.leaf) == ("a", "b")
    assert (figure.low, figure.high, figure.chance) == ("a/b_low", "a/b_high", "a/b_chance")
    assert (figure.by_window, figure.attainable) == ("by_window/a/b", "a/attainable_b")


def test_every_name_leads_to_its_own_figure_and_says_something() -> None:
    for name, figure in FIGURES.items():
        for longer in (name, figure.low, figure.high, figure.chance, figure.by_window):
            assert figure_of(longer) is figure
        assert figure.heading and figure.sentence and not figure.sentence.endswith(".")


def test_the_page_of_all_figures_is_up_to_date() -> None:
    """Written anew by ``python docs/figures.py``."""
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "figures.py"))["page"]()
    assert (docs / "figures.md").read_text(encoding="utf-8") == page
    rows = {
        line.split("`")[1]: line
        for line in page.splitlines()
        if line.startswith("| `") and "…" not in line.split("|")[1]
    }
    assert set(rows) == set(FIGURES)
    assert rows["cost/cpu_seconds"].startswith("| `cost/cpu_seconds` | CPU seconds | seconds | lower | – | time")
    assert "| itself, `…_low`, `…_high`, `by_window/…` |" in rows["removal/lds"]
