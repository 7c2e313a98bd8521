"""The facts of an influence run that the description of a model version tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run

from dit_mlflow.explanation.markdown import escaped
from dit_mlflow.explanation.model_card import CardFacts
from dit_mlflow.explanation.numbers import figure
from dit_mlflow.explanation.ranking import best_known
from dit_mlflow.influence import Influence
from dit_mlflow.tracking.store.artifacts import load_influence
from dit_mlflow.tracking.store.names import GROUND_TRUTH, WHOLE_RUN, WHOLE_RUN_EXACT
from dit_mlflow.tracking.ui.links import model_link, run_link
from dit_mlflow.trajectory.manifest import LARGEST
from dit_mlflow.trajectory.untrusted import open_regular, parse_json


def card_facts(
    run: Run,
    training: Run,
    model: LoggedModel,
    influence: Influence,
    folder: Path,
    by_window: Mapping[str, Sequence[float | None]],
) -> CardFacts:
    """The facts of an influence run whose ``influence/`` is in ``folder``; ``by_window``: its metrics of windows."""
    stored = folder / Path(WHOLE_RUN).name
    whole, exact = Influence.load(stored) if stored.is_dir() else None, _exact(run.info.run_id)
    if exact is not None and influence.windows == exact.windows:
        whole = influence
    if whole is not None:
        whole = best_known(whole, exact)
    return CardFacts(
        _known_samples(folder),
        run.data.metrics,
        by_window,
        _made(run, training, model, influence),
        whole,
        0 if exact is None else int(np.isfinite(exact.scores[0, 0]).sum()),
    )


def _exact(run_id: str) -> Influence | None:
    """Exact scores of the whole run, if the run has any."""
    folders = {item.path for item in MlflowClient().list_artifacts(run_id, GROUND_TRUTH)}
    return load_influence(run_id, WHOLE_RUN_EXACT) if WHOLE_RUN_EXACT in folders else None


def _known_samples(folder: Path) -> dict[int, str]:
    """Descriptions of samples, from the run's tables."""
    found = {}
    for name in ("top_samples.json", f"{Path(WHOLE_RUN).name}.json"):
        try:
            with open_regular(folder / name) as file:
                table = parse_json(file.read(LARGEST))
            at = {column: place for place, column in enumerate(table["columns"])}
            for row in table["data"]:
                text = str(row[at["sample"]] or "") if "sample" in at else ""
                if "corrupted" in at and row[at["corrupted"]]:
                    text += f"{', ' if text else ''}corrupted"
                found[int(row[at["sample_index"]])] = text
        except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError):
            continue  # A run of the user's own, which logged only scores.
    return found


def _made(run: Run, training: Run, model: LoggedModel, influence: Influence) -> list[str]:
    versions = influence.metadata.get("versions", {})
    seconds = influence.metadata.get("seconds")
    how = f"By {escaped(influence.method)}, {len(influence.samples)} training samples" + (
        f", in {figure(seconds, 3)} s" if isinstance(seconds, (int, float)) else ""
    )
    known = ", ".join(
        f"{escaped(name)} {escaped(str(versions[name]))}" for name in ("dit-mlflow", "torch") if name in versions
    )
    links = (
        f"[influence run]({run_link(run)}), [training run]({run_link(training)}), "
        f"[tables, plots and scores]({model_link(model)})"
    )
    load = f"`dit_mlflow.tracking.load_influence('models:/{model.model_id}')`"
    return [f"### How it was computed\n\n{how}{f' ({known})' if known else ''}.", f"{links}; {load}"]
