"""The answer of a cleansing run in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from dit_mlflow.evaluation.cleansing import RANDOM, Cleansing, Outcome, choose
from dit_mlflow.report.markdown import escaped, markdown_table

DONE = {"drop": "dropped", "relabel": "relabelled"}
DOING = {"drop": "dropping", "relabel": "relabelling"}

ANSWERS = {
    "yes": "Cleaning helped",
    "no": "Cleaning did not help",
    "unclear": "Cleaning may have helped, but no more than seeds make trainings differ",
}

REMARK = {
    "drop": "Dropped samples were taken out of the data set and training was run again, with the workload's batch size "
    "and the same seeds. This differs from removal as influence means it (weight 0, all else as recorded): batches are "
    "drawn anew from fewer samples, and an epoch has fewer steps.",
    "relabel": "Relabelled samples were given the class that models trained without them predict (5 parts, each left "
    "out in turn); no true label was used, so a wrong guess costs what it would cost in practice.",
}


def cleansing_answer(cleansing: Cleansing) -> str:
    """Whether cleaning helped, what else came of as many samples, and how many were truly damaged: three sentences."""
    chosen, before, name = cleansing.chosen, cleansing.before, f"test/{cleansing.metric}"
    lead = ANSWERS[cleansing.helped]
    if chosen is before:
        first = (
            f"{lead}: on the validation split, nothing was better than to leave the data as it is "
            f"({name} {before.mean(name):.4f})."
        )
    else:
        first = (
            f"{lead}: {DOING[cleansing.action]} {_samples(chosen)} by {chosen.trial.strategy}, which the validation "
            f"split chose, took {name} from {before.mean(name):.4f} to {chosen.mean(name):.4f} "
            f"({_gain(chosen, before, name)})."
        )
    return " ".join([first, _beside(cleansing, name), _damaged(cleansing)])


def _beside(cleansing: Cleansing, name: str) -> str:
    """The other strategies with as many samples; if none are to be cleaned, with those that validation likes best."""
    chosen = cleansing.chosen
    others = [strategy for strategy in cleansing.strategies if strategy != chosen.trial.strategy]
    if chosen is cleansing.before:
        best = [choose(cleansing.by(strategy), cleansing.metric) for strategy in others]
        told = [f"{_way(outcome)} {_figure(outcome, name)} with {_samples(outcome)}" for outcome in best]
        return f"The best that validation finds of each strategy has {name} {', '.join(told)}."
    same = [o for strategy in others for o in cleansing.by(strategy) if o.trial.count == chosen.trial.count]
    told = [f"{_way(outcome)} {_figure(outcome, name)}" for outcome in same]
    random = [f"; over random, {_gain(chosen, o, name)}" for o in same if o.trial.strategy == RANDOM]
    return f"With as many samples chosen otherwise, it is {', '.join(told)}{''.join(random)}."


def _damaged(cleansing: Cleansing) -> str:
    known, count = len(cleansing.corrupted), cleansing.chosen.trial.count
    if not known:
        return "Which samples are truly damaged is not known."
    found = cleansing.chosen.trial.found(cleansing.corrupted).values
    if not found:
        return f"{known} training samples are known to be damaged."
    damaged = round(found["precision"] * count)
    return f"{damaged} of the {count} are truly damaged, of {known} damaged ones in the training set."


def _way(outcome: Outcome) -> str:
    return "at random" if outcome.trial.strategy == RANDOM else f"by {outcome.trial.strategy}"


def _samples(outcome: Outcome) -> str:
    return f"{outcome.trial.count} samples ({100 * outcome.trial.fraction:g} %)"


def _figure(outcome: Outcome, name: str) -> str:
    values = outcome.summary().values
    if f"{name}_lowest_draw" not in values:
        return f"{values[name]:.4f}"
    low, high = (values[f"{name}_{end}_draw"] for end in ("lowest", "highest"))
    return f"{values[name]:.4f} ({low:.4f} to {high:.4f} by the draw)"


def _gain(outcome: Outcome, other: Outcome, name: str) -> str:
    values = outcome.gain(other).values
    if f"{name}_low" not in values:
        return f"better by {values[name]:+.4f}, one pair of seeds"
    ends = f"{values[f'{name}_low']:+.4f} to {values[f'{name}_high']:+.4f}"
    return f"better by {values[name]:+.4f}, 95 % interval {ends} over {outcome.figures[name].shape[1]} pairs of seeds"


def cleansing_note(cleansing: Cleansing, run_id: str, remarks: Sequence[str] = ()) -> str:
    """Markdown for the run's description: the answer, all trials, how to take the indices away, what to mind.

    Args:
        cleansing: what came out.
        run_id: of the run that holds the artifacts.
        remarks: further sentences of plain text, such as why a trial failed.
    """
    lead, _, rest = cleansing_answer(cleansing).partition(":")
    headings = ["strategy", "samples", *(escaped(name) for name in _columns(cleansing)), "truly damaged"]
    done = DONE[cleansing.action]
    parts = [
        f"**{lead}**:{escaped(rest, longest=5000)}",
        markdown_table(headings, [_row(outcome, cleansing) for outcome in cleansing.outcomes]),
        f"The indices, in Python: `mlflow.artifacts.load_dict('runs:/{run_id}/{done}_indices.json')['indices']`",
        REMARK[cleansing.action],
        "The validation split chose, and influence is measured on it, so that its figures flatter cleaned data; the "
        "test split was only looked at afterwards. Intervals are over seeds, not over other test samples.",
        *(escaped(remark, longest=500) for remark in remarks),
    ]
    return "\n\n".join(parts)


def _columns(cleansing: Cleansing) -> list[str]:
    names = [cleansing.metric, *(["loss"] if cleansing.metric != "loss" else [])]
    return [f"{split}/{name}" for split in ("validation", "test") for name in names]


def _row(outcome: Outcome, cleansing: Cleansing) -> list[str]:
    trial = outcome.trial
    found = trial.found(cleansing.corrupted).values
    cells = [
        escaped(trial.strategy),
        f"{trial.count} ({100 * trial.fraction:g} %)",
        *(f"{outcome.mean(name):.4f}" for name in _columns(cleansing)),
        f"{100 * found['precision']:.0f} %" if found else "–",
    ]
    return [f"**{cell}**" for cell in cells] if outcome is cleansing.chosen else cells
