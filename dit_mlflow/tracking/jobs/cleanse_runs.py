"""Logs a cleansing run and its child runs.

- A child for each strategy and fraction (``dit.kind=cleansed``), named ``influence 10 %``: figures of the retrained
  models under the names that training runs use, their gains, and the samples.
- A child for each strategy (``dit.kind=strategy``), named ``influence``: series ``by_fraction/…`` whose step is **the
  number of samples cleaned** (0 = none), so that a chart overlays the strategies; and the figures of the fraction that
  the validation split chooses for this strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlflow
import numpy as np
import pandas as pd

from dit_mlflow.evaluation import Metrics
from dit_mlflow.evaluation.figures import BEFORE, BY_FRACTION, DETECTION, FLAGGED_HELPFUL, GAIN, RELABELLED_CHANGED
from dit_mlflow.evaluation.trials import NO_CLEANING, RANDOM, Cleansing, Outcome, Trial, choose
from dit_mlflow.explanation import Gallery, cleansing_note, cleansing_table
from dit_mlflow.explanation.cleansing import CleansingTask
from dit_mlflow.explanation.cleansing_note import DONE
from dit_mlflow.plots import plot_cleansing
from dit_mlflow.retraining.changed_data import class_names
from dit_mlflow.told import encodable
from dit_mlflow.tracking.store.artifacts import active_run_id
from dit_mlflow.tracking.store.failed_run import error_text
from dit_mlflow.tracking.store.names import ERROR, HELPED, KIND, NOTE, TRAINING_RUN
from dit_mlflow.tracking.store.run_log import drawing, log_metrics, log_params, log_plot, log_series


@dataclass(frozen=True, eq=False)
class CleansingRuns:
    """Logs on the active run and below it.

    ``seeds``: ``(init_seed, order_seed)`` of each repeat; ``all_figures``: all, not the default ones.
    """

    task: CleansingTask
    training_run: str
    seeds: Sequence[tuple[int, int]]
    all_figures: bool = False

    @cached_property
    def _gallery(self) -> Gallery:
        return Gallery(self.task.workload)

    @cached_property
    def _names(self) -> dict[int, str]:
        """Names of the classes."""
        names = {} if self.task.classes is None else class_names(self.task.workload, self.task.classes)
        return {found: encodable(name) for found, name in names.items()}

    @property
    def done(self) -> str:
        """``dropped`` or ``relabelled``: names the parameter and the table of the samples."""
        return DONE[self.task.action]

    def name(self, trial: Trial) -> str:
        """Sorts by strategy, then by fraction."""
        share = f"{100 * trial.fraction:g}"
        whole, dot, rest = share.partition(".")
        return trial.strategy if trial.strategy == NO_CLEANING else f"{trial.strategy} {whole:0>2}{dot}{rest} %"

    def child(self, trial: Trial, before: Outcome | None, attempt: Callable[[], Outcome]) -> Outcome:
        """Make the attempt in a run of its own; FAILED, with the reason, if it raises."""
        tags = {KIND: "cleansed", TRAINING_RUN: self.training_run}
        with mlflow.start_run(run_name=self.name(trial), nested=True, tags=tags):
            params = {"strategy": trial.strategy, "fraction": trial.fraction, self.done: trial.count}
            log_params({**params, "action": self.task.action})
            mlflow.log_table(self.samples(trial), f"{self.done}.json")
            try:
                outcome = attempt()
            except Exception as error:
                mlflow.set_tag(ERROR, error_text(error))
                raise
            mlflow.log_table(self._repeats(outcome), "repeats.json")
            log_metrics(self._figures(outcome, before or outcome))
            return outcome

    def samples(self, trial: Trial) -> pd.DataFrame:
        """The flagged samples, lowest score first: index, score, description, labels."""
        gallery = self._gallery
        draws, indices = len(trial.flagged), trial.flagged.ravel()
        columns: dict[str, object] = {"draw": np.repeat(np.arange(draws), trial.count)} if draws > 1 else {}
        columns["sample_index"] = indices
        if trial.strategy != RANDOM:
            columns["score"] = np.take_along_axis(trial.scores, trial.flagged, axis=1).ravel()
        if gallery.describe is not None:
            columns["sample"] = [gallery.describe(int(index)) for index in indices]
        if trial.weights is not None:
            columns["weight"] = np.take_along_axis(trial.weights, trial.flagged, axis=1).ravel()
        columns["label"] = [gallery.label_of(int(index)) for index in indices]
        if self.task.predicted is not None:
            columns["new_label"] = [self._names.get(int(found), str(found)) for found in self.task.predicted[indices]]
        if gallery.corrupted:
            columns["corrupted"] = np.isin(indices, list(gallery.corrupted))
        return pd.DataFrame(columns)

    def log_strategies(self, cleansing: Cleansing) -> None:
        """Log a run for each strategy, with series over the number of samples."""
        for strategy in cleansing.strategies:
            outcomes = cleansing.by(strategy)
            best = choose(outcomes, cleansing.metric)
            tags = {KIND: "strategy", TRAINING_RUN: self.training_run}
            with mlflow.start_run(run_name=strategy, nested=True, tags=tags):
                params = {"strategy": strategy, "action": self.task.action, "chosen.fraction": best.trial.fraction}
                log_params(params | {f"chosen.{self.done}": best.trial.count})
                log_metrics(self._figures(best, cleansing.before))
                points = [cleansing.before, *outcomes]
                series = [self._series(outcome) for outcome in points]
                for name in dict.fromkeys(name for figures in series for name in figures):
                    values = [figures.get(name) for figures in series]
                    log_series(BY_FRACTION + name, values, [outcome.trial.count for outcome in points])

    def log_answer(self, cleansing: Cleansing, remarks: Sequence[str]) -> None:
        """Log the answer, table, figure and chosen samples on the active run."""
        chosen, before = cleansing.chosen, cleansing.before
        run_id = active_run_id()
        mlflow.set_tag(HELPED, cleansing.helped)
        log_params(
            {"chosen.strategy": chosen.trial.strategy, "chosen.fraction": chosen.trial.fraction}
            | {f"chosen.{self.done}": chosen.trial.count}
        )
        log_metrics(before.summary().prefixed(BEFORE).shown(self.all_figures).and_(self._figures(chosen, before)))
        mlflow.log_table(cleansing_table(cleansing), "cleansing.json")
        mlflow.log_table(self.samples(chosen.trial), f"{self.done}.json")
        indices = chosen.trial.flagged[0]
        taken: dict[str, object] = {"strategy": chosen.trial.strategy, "indices": indices.tolist()}
        if self.task.predicted is not None:
            taken["classes"] = self.task.predicted[indices].tolist()
        if chosen.trial.weights is not None:
            taken["weights"] = chosen.trial.weights[0, indices].tolist()
        mlflow.log_dict(taken, f"{self.done}_indices.json")
        with drawing("cleansing.png", run_id):
            log_plot(plot_cleansing(cleansing), "cleansing.png", run_id)
        with drawing("note", run_id):
            mlflow.set_tag(NOTE, cleansing_note(cleansing, run_id, remarks))

    def _figures(self, outcome: Outcome, before: Outcome) -> Metrics:
        trial, corrupted = outcome.trial, self.task.workload.corrupted
        found = outcome.summary().and_(trial.found(corrupted).prefixed(DETECTION))
        extra: dict[str, float] = {}
        if trial.strategy.startswith("influence"):
            # More were flagged than are harmful: by the estimate, these help.
            extra[FLAGGED_HELPFUL.name] = float((np.take_along_axis(trial.scores, trial.flagged, axis=1) > 0).sum())
        if self.task.predicted is not None and self.task.classes is not None:
            # Of several draws, the mean number.
            other = self.task.predicted[trial.flagged] != self.task.classes[trial.flagged]
            extra[RELABELLED_CHANGED.name] = float(other.sum(axis=1).mean())
        if outcome is not before:
            found = found.and_(outcome.gain(before).prefixed(GAIN))
        return found.and_(Metrics(extra)).shown(self.all_figures)

    def _series(self, outcome: Outcome) -> dict[str, float]:
        means = {name: outcome.mean(name) for name in outcome.figures}
        return {**means, **outcome.trial.found(self.task.workload.corrupted).prefixed(DETECTION).values}

    def _repeats(self, outcome: Outcome) -> pd.DataFrame:
        draws = len(outcome.trial.flagged)
        init, order = np.array(self.seeds).T
        columns: dict[str, object] = {
            "draw": np.repeat(np.arange(draws), len(self.seeds)),
            "init_seed": np.tile(init, draws),
            "order_seed": np.tile(order, draws),
        }
        return pd.DataFrame(columns | {name: values.ravel() for name, values in outcome.figures.items()})
