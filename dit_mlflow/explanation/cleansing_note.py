"""The answer of a cleansing run in sentences."""

from __future__ import annotations

from collections.abc import Sequence

from dit_mlflow.evaluation.figures import (
    HIGH,
    HIGHEST_DRAW,
    LOSS,
    LOW,
    LOWEST_DRAW,
    PRECISION,
    TEST,
    VALIDATION,
    figure_of,
)
from dit_mlflow.evaluation.trials import RANDOM, Cleansing, Outcome, choose, verdict
from dit_mlflow.explanation.markdown import NOTE_CHARACTERS, escaped, markdown_table
from dit_mlflow.explanation.numbers import cell

TRIALS_LISTED, REMARKS = 40, 4
"""Most trials in the table, and most further sentences."""

DONE = {"drop": "dropped", "relabel": "relabelled", "reweight": "reweighted"}

ANSWERS = {"yes": "Cleaning helped", "no": "Cleaning did not help", "unclear": "Cleaning may have helped"}

SURE = {"yes": "better", "no": "worse", "unclear": "within the noise"}
"""What an interval says of a gain."""

REMARK = {
    "drop": "Dropped samples were taken out of the data set and training was run again, with the workload's batch size "
    "and the same seeds. This differs from removal as influence means it (weight 0, all else as recorded): batches are "
    "drawn anew from fewer samples, and an epoch has fewer steps.",
    "relabel": "Relabelled samples were given the class that models trained without them predict (5 parts, each left "
    "out in turn); no true label was used, so a wrong guess costs what it would cost in practice.",
    "reweight": "The losses of flagged samples were multiplied by weights below 1, in proportion to the harm that the "
    "scores tell of (the most harmful of them: 0), and training was run again, all else as it was. Random samples got "
    "the weights that influence gave.",
}


def cleansing_answer(cleansing: Cleansing) -> str:
    """Three lines: what to clean, what that gains on test, and whether other samples gain as much."""
    chosen, before = cleansing.chosen, cleansing.before
    names = [TEST + name for name in _metrics(cleansing)]
    damaged = _damaged(cleansing)
    if chosen is before:
        known = ", ".join(f"{name} {before.mean(name):.4f}" for name in names)
        what = f"{cleansing.action} nothing; on the validation split, nothing is better than to leave the data as it is"
        gains = f"On test, as it is: {known}."
    else:
        what = f"{cleansing.action} {_samples(chosen)} by {chosen.trial.strategy}, as the validation split chose"
        took = [f"{n} {before.mean(n):.4f} to {chosen.mean(n):.4f}, {_gain(chosen, before, n)}" for n in names]
        gains = f"On test ({_pairs(chosen)}): {'; '.join(took)}."
    return "\n".join([f"{ANSWERS[cleansing.helped]}: {what}; {damaged}.", gains, *_beside(cleansing, names)])


def _beside(cleansing: Cleansing, names: Sequence[str]) -> list[str]:
    """The chosen samples against as many by other strategies; if none was chosen, what validation prefers of each.

    Of several windows of influence, only the one that validation prefers.
    """
    chosen = cleansing.chosen
    tried = [cleansing.by(strategy) for strategy in cleansing.strategies if strategy != chosen.trial.strategy]
    nothing = chosen is cleansing.before
    if nothing:
        others = [choose(outcomes, cleansing.metric) for outcomes in tried]
    else:
        others = [o for outcomes in tried for o in outcomes if o.trial.count == chosen.trial.count]
    windows = [outcome for outcome in others if outcome.trial.strategy.startswith("influence ")]
    if windows:
        window = choose(windows, cleansing.metric)
        others = [outcome for outcome in others if outcome is window or outcome not in windows]
    if not others:
        return []
    if nothing:
        told = [f"{_figure(outcome, names[0])} with {_samples(outcome)}" for outcome in others]
        return [f"Of each strategy, the number that validation likes best gives {names[0]} {', '.join(told)}."]
    told = [
        f"{_by(other)}: {', '.join(f'{name} {_gain(chosen, other, name)}' for name in names)}"
        for other in sorted(others, key=lambda other: other.trial.strategy != RANDOM)
    ]
    return [f"Against as many samples {'; '.join(told)}."]


def _by(outcome: Outcome) -> str:
    return "at random" if outcome.trial.strategy == RANDOM else f"by {outcome.trial.strategy}"


def _damaged(cleansing: Cleansing) -> str:
    known, count = len(cleansing.corrupted), cleansing.chosen.trial.count
    if not known:
        return "which samples are truly damaged is not known"
    found = cleansing.chosen.trial.found(cleansing.corrupted).values
    if not found:
        return f"{known} samples of the training set are truly damaged"
    damaged = round(found[PRECISION.leaf] * count)
    return f"{damaged} of the {count} are truly damaged, of {known} damaged ones in the training set"


def _samples(outcome: Outcome) -> str:
    return f"{outcome.trial.count} samples ({100 * outcome.trial.fraction:g} %)"


def _figure(outcome: Outcome, name: str) -> str:
    values = outcome.summary().values
    if outcome.trial.strategy != RANDOM:
        return f"{values[name]:.4f} by {outcome.trial.strategy}"
    if name + LOWEST_DRAW not in values:
        return f"{values[name]:.4f} at random"
    low, high = (values[name + end] for end in (LOWEST_DRAW, HIGHEST_DRAW))
    return f"{values[name]:.4f} at random (draws from {low:.4f} to {high:.4f})"


def _gain(outcome: Outcome, other: Outcome, name: str) -> str:
    """Positive = better."""
    gain = outcome.gain(other)
    values = gain.values
    if name + LOW not in values:
        return f"{values[name]:+.4f} (no interval)"
    ends = f"{values[name + LOW]:+.4f} to {values[name + HIGH]:+.4f}"
    return f"{values[name]:+.4f} ({ends}: {SURE[verdict(gain, name)]})"


def _pairs(outcome: Outcome) -> str:
    pairs = next(iter(outcome.figures.values())).shape[1]
    seeds = "one pair of seeds" if pairs == 1 else f"{pairs} pairs of seeds"
    return f"{seeds}; gains, positive = better, with 95 % intervals"


def cleansing_note(cleansing: Cleansing, run_id: str, remarks: Sequence[str] = ()) -> str:
    """Markdown for the run's description: the answer, the trials, how to load the indices, and caveats.

    Args:
        cleansing: the outcome.
        run_id: of the run that holds the artifacts.
        remarks: further plain-text sentences, such as why a trial failed.
    """
    rows = min(TRIALS_LISTED, len(cleansing.outcomes))
    while len(note := _note(cleansing, run_id, remarks, rows)) > NOTE_CHARACTERS and rows:
        rows -= 1
    return note


def _note(cleansing: Cleansing, run_id: str, remarks: Sequence[str], rows: int) -> str:
    lead, *more = cleansing_answer(cleansing).split("\n")
    answer, _, rest = lead.partition(":")
    columns = [figure_of(name) for name in _columns(cleansing)]
    headings = ["strategy", "samples", *(escaped(of.heading) for of in (*columns, PRECISION))]
    done = DONE[cleansing.action]
    parts = [
        f"**{answer}**: {escaped(rest.strip(), 900)}\n\n" + "\n\n".join(escaped(line, 1500) for line in more),
        markdown_table(headings, [_row(outcome, cleansing) for outcome in cleansing.outcomes[:rows]])
        + ("\n\nThe other trials are in `cleansing.json`." if len(cleansing.outcomes) > rows else ""),
        f"The indices, in Python: `mlflow.artifacts.load_dict('runs:/{run_id}/{done}_indices.json')['indices']`",
        REMARK[cleansing.action],
        "The validation split chose, and influence is measured on it, so that its figures flatter cleaned data; the "
        "test split was only looked at afterwards. Intervals of gains are over seeds and test samples.",
        *(escaped(remark, longest=300) for remark in remarks[:REMARKS]),
    ]
    return "\n\n".join(parts)


def _metrics(cleansing: Cleansing) -> list[str]:
    return list(dict.fromkeys((cleansing.metric, LOSS)))


def _columns(cleansing: Cleansing) -> list[str]:
    return [data + name for data in (VALIDATION, TEST) for name in _metrics(cleansing)]


def _row(outcome: Outcome, cleansing: Cleansing) -> list[str]:
    trial = outcome.trial
    found = trial.found(cleansing.corrupted).values
    cells = [
        escaped(trial.strategy),
        f"{trial.count} ({100 * trial.fraction:g} %)",
        *(f"{outcome.mean(name):.4f}" for name in _columns(cleansing)),
        cell(PRECISION, found[PRECISION.leaf]) if found else "–",
    ]
    return [f"**{cell}**" for cell in cells] if outcome is cleansing.chosen else cells
