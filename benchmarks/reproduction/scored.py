"""Scores of every method on one training, for all tables but cleansing and cost."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from dit_mlflow import Influence, Trajectory, Window, Workload, leave_one_out, parse_windows, track, train
from dit_mlflow.evaluation import mean_scores
from dit_mlflow.influence import Kind
from dit_mlflow.influence.question import Question
from dit_mlflow.methods import method
from dit_mlflow.methods.tracin import TracIn
from dit_mlflow.retraining.counterfactuals import Reweighted
from dit_mlflow.retraining.retrain import retrain

from .cases import Case
from .final_query import final_query
from .memory import ROOT, remembered

HERE = Path(__file__).parent
SOURCES = (
    *(ROOT / "dit_mlflow" / folder for folder in ("trajectory", "influence", "methods", "evaluation", "workloads")),
    ROOT / "projects",
    *(HERE / f"{name}.py" for name in ("authors", "cases", "final_query", "scored")),
)
"""Code that scores depend on: if it changes, they are computed again."""

KINDS: tuple[Kind, ...] = ("local", "final", "cumulative")
WHOLE = "whole"
THIRDS = ("early", "middle", "late")

TENTH = 0.1
"""Share of flipped labels at which exact leave-one-out is asked for the thirds as well."""

CHECKED, STEP = 4, 1e-6
"""Samples whose scores are held against central differences, and by how much their weight is changed: little, because
pooling and ReLU have kinks that a larger change meets."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the methods on one training.

    Attributes:
        windows: names and bounds; the last is all of training.
        values: by method and kind (``none`` where a method has no kinds), ``[windows, samples]``; NaN = not computed.
        seconds: of CPU time, by what was computed.
        corrupted: the flipped training samples.
        figures: further ones.
    """

    windows: dict[str, tuple[int, int]]
    values: dict[tuple[str, str], np.ndarray]
    seconds: dict[str, float]
    corrupted: tuple[int, ...]
    figures: dict[str, float]

    def of(self, method: str, kind: str, window: str) -> np.ndarray:
        """Scores ``[samples]``."""
        return self.values[method, kind][list(self.windows).index(window)]


@cache
def fingerprint() -> str:
    """Digest of the code that scores depend on."""
    files = sorted(path for source in SOURCES for path in ([source] if source.is_file() else source.rglob("*.py")))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def scores(case: Case, seed: int) -> Scores:
    """On clean data: every window and kind, with exact leave-one-out in float64."""
    return _clean(case, seed, fingerprint())


def flipped_scores(case: Case, seed: int, share: float) -> Scores:
    """With flipped labels: whole run and thirds of training."""
    return _flipped(case, seed, share, fingerprint())


class _Asked:
    """A training, and the scores that come of it."""

    def __init__(self, trajectory: Trajectory, workload: Workload, windows: dict[str, Window]) -> None:
        self.trajectory, self.workload, self.windows = trajectory, workload, windows
        self.values: dict[tuple[str, str], np.ndarray] = {}
        self.seconds: dict[str, float] = {}

    def ask(
        self, name: str, kind: str, windows: list[str], compute: Callable[[list[Window]], Influence], note: str = ""
    ) -> None:
        """Scores for ``windows``, and the CPU time as ``name kind note``."""
        begun = time.process_time()
        found = compute([self.windows[window] for window in windows])
        self.seconds[" ".join(filter(None, (name, kind, note)))] = time.process_time() - begun
        table = self.values.setdefault((name, kind), np.full((len(self.windows), len(found.samples)), np.nan))
        for window in windows:
            table[list(self.windows).index(window)] = found.of(self.windows[window])

    def ask_method(self, name: str, windows: list[str], kind: str = "local", note: str = "") -> None:
        """The same of a method of this library, as it is by default."""
        estimator = method(name)
        found = "none" if not estimator.kinds else kind
        self.ask(name, found, windows, lambda of: estimator(self.trajectory, self.workload, of, kind), note)

    def result(self, **figures: float) -> Scores:
        windows = {name: (window.start, window.end) for name, window in self.windows.items()}
        return Scores(windows, self.values, self.seconds, tuple(self.workload.corrupted), figures)


@contextmanager
def _trained(workload: Workload, seed: int) -> Iterator[Trajectory]:
    with TemporaryDirectory() as folder:
        yield train(workload, Path(folder) / "trajectory", init_seed=seed, order_seed=seed)


@remembered
def _clean(case: Case, seed: int, code: str) -> Scores:
    workload = case.workload(seed)
    with _trained(workload, seed) as trajectory:
        epochs = [(str(number), window) for number, window in enumerate(parse_windows("epochs", trajectory))]
        ends = list(dict.fromkeys([0, len(epochs) // 2, len(epochs) - 1]))
        chosen = epochs if case.windows == "epochs" else [epochs[k] for k in ends]
        windows = {**dict(chosen), WHOLE: Window(0, trajectory.num_steps)}
        epoch_names = [name for name in windows if name != WHOLE]
        asked = _Asked(trajectory, workload, windows)
        linear = [final_query(trajectory, workload)]
        for kind in KINDS:
            few = kind == "final" and case.final_windows == "ends"
            # On all of training the three kinds are one.
            also = [WHOLE] if kind == "final" else []
            tested = [*([epochs[k][0] for k in ends] if few else epoch_names), *also]
            exactly = partial(leave_one_out, trajectory, workload, kind=kind, samples=case.truth)
            asked.ask("leave_one_out", kind, tested, exactly)
            asked.ask_method("dit", [*epoch_names, *also], kind)
        shortcut = partial(track, trajectory, workload, kind="cumulative", queries=linear)
        asked.ask("final_query", "cumulative", epoch_names, shortcut)
        asked.ask_method("tracin", list(windows))
        asked.ask("no_hessians", "none", list(windows), lambda of: TracIn()(trajectory, workload, of, queries=linear))
        asked.ask_method("influence_function", [WHOLE])
        asked.ask_method("sgd_influence", [WHOLE])
        return asked.result(sweep_error=_sweep_error(trajectory, workload, windows[WHOLE], seed))


def _sweep_error(trajectory: Trajectory, workload: Workload, window: Window, seed: int) -> float:
    """Largest difference between the sweep and central differences in float64, in units of the largest score."""
    drawn = np.random.default_rng(seed).choice(workload.num_samples, CHECKED, replace=False)
    moved = np.ones((2 * CHECKED, workload.num_samples))
    for row, sample in enumerate(drawn):
        moved[2 * row : 2 * row + 2, sample] += [STEP, -STEP]
    question = Question.of(trajectory, workload, [window], "final", None)
    changes, _ = retrain(question, Reweighted(moved), torch.float64)
    differences = -(changes[0, 0, ::2] - changes[0, 0, 1::2]) / (2 * STEP)
    exact = track(trajectory, workload, [window], "final", dtype=torch.float64).of(0)
    return float(np.abs(exact[drawn] - differences).max() / np.abs(exact).max())


@remembered
def _flipped(case: Case, seed: int, share: float, code: str) -> Scores:
    workload = case.workload(seed, share)
    with _trained(workload, seed) as trajectory:
        thirds = dict(zip(THIRDS, parse_windows("3", trajectory), strict=True))
        epochs = {str(number): window for number, window in enumerate(parse_windows("epochs", trajectory))}
        asked = _Asked(trajectory, workload, {**epochs, **thirds, WHOLE: Window(0, trajectory.num_steps)})
        asked.ask_method("dit", [*THIRDS, *epochs])
        for third in THIRDS:
            asked.ask_method("dit", [third], note=third)
        for kind in ("final", "cumulative"):
            asked.ask_method("dit", list(THIRDS), kind)
        # On all of training the three kinds are one.
        asked.ask_method("dit", [WHOLE], note=WHOLE)
        for name in ("tracin", "loss"):
            asked.ask_method(name, [*THIRDS, WHOLE])
        for name in ("influence_function", "aum", "confident_learning"):
            asked.ask_method(name, [WHOLE])
        if case.detects:
            asked.ask_method("leave_one_out", [WHOLE], note=WHOLE)
            if share == TENTH:
                asked.ask_method("leave_one_out", list(THIRDS))
        losses = _validation_losses(trajectory, workload, [0, *(window.end for window in thirds.values())])
        fallen = {
            f"loss_fallen_by_{third}": float((losses[0] - losses[k]) / (losses[0] - losses.min()))
            for k, third in enumerate(THIRDS)
        }
        return asked.result(**fallen)


def _validation_losses(trajectory: Trajectory, workload: Workload, steps: list[int]) -> np.ndarray:
    found = []
    for step in steps:
        (state,) = trajectory.states(workload, step, step)
        model = state.load_into(workload.build_model()).eval()
        found.append(mean_scores(workload, model, workload.validation_set).values["loss"])
    return np.array(found)
