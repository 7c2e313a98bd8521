"""README and the pages of docs: what they show is run as it stands, and what they list is all there is."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib
import mlflow
import numpy as np
import pytest
import stores
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader
from workloads import datasets, digits_model

import dit_mlflow
from dit_mlflow import tracking
from dit_mlflow.cli import cli
from dit_mlflow.methods import NAMES
from dit_mlflow.tracking import load_trajectory

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"


def text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(source: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", source, re.DOTALL | re.M)


def run(page: str, names: dict[str, Any]) -> None:
    for number, block in enumerate(blocks(text(page)), 1):
        if "dit_mlflow.quanda" in block and not find_spec("quanda"):
            continue  # the metrics of quanda and what they take: tests/test_quanda.py
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def column(page: str, heading: str) -> dict[str, str]:
    """A column of the first table that has it, by the names in the table's first column."""
    lines = text(page).splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("| method |") and f"| {heading} |" in line)
    place = [cell.strip() for cell in lines[start].split("|")].index(heading)
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.split("|")]
        found[cells[1].strip("`")] = cells[place]
    return found


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIT_MLFLOW_CACHE", str(tmp_path / "cache"))
    matplotlib.use("agg")
    return tmp_path


def test_the_loop_of_the_readme_is_short_and_changes_nothing(empty_folder: Path) -> None:
    source = README.read_text(encoding="utf-8")
    (block,) = blocks(source)
    assert len([line for line in block.splitlines() if line]) <= 12
    assert source[: source.index(block)].count("\n") + block.count("\n") <= 35
    train_set, validation_set = datasets()
    loops = {True: block, False: re.sub(r"^with .*$", "if True:", block, flags=re.M).split("losses =")[0]}
    trained = {}
    for recorded, loop in loops.items():
        torch.manual_seed(0)
        model = digits_model()
        names = {
            "model": model,
            "optimizer": torch.optim.SGD(model.parameters(), lr=0.5),
            "train_loader": DataLoader(train_set, batch_size=8, shuffle=True),
            "train_set": train_set,
            "validation_set": validation_set,
            "epochs": 4,
        }
        exec(loop if recorded else loop.replace("recorder.watch(train_loader)", "train_loader"), names)
        trained[recorded] = model.state_dict()
    assert all(torch.equal(trained[True][name], value) for name, value in trained[False].items())


@pytest.mark.slow
def test_the_guide_runs_from_loop_to_methods(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    with stores.sqlite(empty_folder) as store, stores.tracking(store, empty_folder, monkeypatch):
        run("loop.md", names)
        assert (names["trajectory"].num_steps, names["trajectory"].verify(names["workload"]).max_drift) == (30, 0)
        assert load_trajectory(names["run_id"]).verify(names["workload"]).max_drift == 0
        # One by the loop, one by each trainer, and one that is followed.
        recorded = [run for run in mlflow.search_runs()["run_id"] if is_recorded(run)]
        assert len(recorded) == 4
        for page in ("question.md", "answer.md", "acting.md", "scale.md", "methods.md"):
            # The pages say that they go on from the first record.
            names["trajectory"] = dit_mlflow.Trajectory.open("recorded")
            run(page, names)
    exact, derivative = names["exact"], names["derivative"]
    ((change,), foretold) = names["true"]["change"], names["scores"][names["best"]].sum()
    # Chosen by their scores, they are overrated; the page says so.
    assert 0.3 < change / foretold < 1.2
    known = np.isfinite(exact.scores)
    assert known.sum() == 3 * 3
    np.testing.assert_array_equal(np.sign(exact.scores[known]), np.sign(derivative.scores[known]))
    assert Path("answer.html").stat().st_size > 10_000
    assert len(Path("scores.csv").read_text().splitlines()) == 1 + 4 * 200


def is_recorded(run_id: str) -> bool:
    return any(found.path == "trajectory" for found in mlflow.MlflowClient().list_artifacts(run_id))


def test_the_quickstart_runs_without_mlflow(empty_folder: Path) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    run("quickstart.md", names)
    assert names["answer"].influence.method == "removal"
    assert not Path("mlflow.db").exists()


@pytest.mark.slow
def test_what_is_kept_with_the_model_answers(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "--model logreg --n-train 40 --n-validation 30 --epochs 4 --windows 2 --ground-truth none --trust 0"
    names: dict[str, Any] = {"__name__": "page"}
    with stores.sqlite(empty_folder) as store, stores.tracking(store, empty_folder, monkeypatch):
        said = succeeded(f"influence {small}")
        (influence_run,) = re.findall(r"^influence run +(\w+)$", said, re.M)
        succeeded(f"register --influence-run {influence_run} --model-name digits --influence-model digits-influence")
        run("mlflow.md", names)
        assert names["load_influence"]("models:/digits/1").scores.shape == (2, 1, 40)
        rows = names["result"].tables["influence_on_rows"]
        assert set(rows["row"]) <= set(range(50))  # but for rows on which no sample stands out


def succeeded(command: str) -> str:
    finished = CliRunner().invoke(cli, command.split())
    assert finished.exit_code == 0, finished.output
    return finished.stdout


@pytest.mark.slow
def test_the_tutorial_finds_what_its_sentences_say(empty_folder: Path) -> None:
    cells = json.loads(text("tutorial.ipynb"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["trajectory"].verify(names["workload"]).max_drift == 0
    top = names["answer"].top(5)
    assert (top.loc[top["side"] == "harmful", "sample_index"] < 40).sum() >= 4
    assert names["found"] >= 25
    foretold, true = names["scores"][names["worst"]].sum(), names["true"]
    assert foretold < 0 and 0.5 < true / foretold < 1.5
    without, at_random, everything = (
        names["results"][name] for name in ("without the worst 40", "without 40 at random", "all")
    )
    assert (without < everything).all()
    assert at_random.mean() > without.mean()


def test_every_public_name_has_its_place_in_the_reference() -> None:
    for names, module in ((dit_mlflow.__all__, "dit_mlflow"), (tracking.__all__, "dit_mlflow.tracking")):
        (part,) = re.findall(rf"currentmodule:: {module}$(.*?)(?=currentmodule|\Z)", text("api.md"), re.DOTALL | re.M)
        assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", part, re.M)) == sorted(names)


def test_every_parameter_of_every_command_is_described() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text("commands.md"), re.DOTALL | re.M))
    for command in cli.commands.values():
        name = str(command.name)  # That of influence has two.
        told = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", sections[name], re.M)))
        assert sorted(told) == sorted(str(parameter.name) for parameter in command.params), name


def test_every_method_is_listed_with_what_was_measured() -> None:
    assert set(column("methods.md", "what it is")) == set(NAMES)
    for heading in ("LDS", "seconds"):
        told = {name: value for name, value in column("methods.md", heading).items() if value != "–"}
        assert told == column("comparison.md", heading)


@pytest.mark.parametrize("page", sorted({README, ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")}), ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """Sphinx checks those within the site; GitHub shows the pages too, and the README is no page of the site."""
    if page.parent == DOCS / "projects":
        pytest.skip("made by the site's build")
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_scripts_name_files_that_are_there() -> None:
    """What CI's scripts are given stands in the tree; the last of them runs after an hour."""
    for script in sorted((ROOT / ".ci").iterdir()):
        named = re.findall(
            r"(?<![\w/.])(?:tests|docs|benchmarks|projects)/[\w/.]*\w", script.read_text(encoding="utf-8")
        )
        assert [path for path in named if not (ROOT / path).exists()] == [], script.name
