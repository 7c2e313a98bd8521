"""Every figure that runs log, written once: its name, heading, unit, direction, and what it says.

What logs, sorts, colours, tabulates or explains a figure takes it from here. ``docs/figures.md`` is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARE = "share"
"""Unit of what lies between 0 and 1 and is told in percent."""

LOW, HIGH, CHANCE = "_low", "_high", "_chance"
"""Behind a figure's name: the ends of its interval (95 %), and what scores in random order give."""

BESIDE = (LOW, HIGH, CHANCE)
"""What is read beside a figure, and has no chart of its own."""

LOWEST_DRAW, HIGHEST_DRAW = "_lowest_draw", "_highest_draw"
"""Behind the name of a figure of several random draws: its least and its largest value."""

BY_WINDOW, MEAN_OVER_WINDOWS = "by_window/", "mean_over_windows/"
"""Before a figure's name: its value in each window, the step being the window's number; and their mean."""

BY_FRACTION, BEFORE = "by_fraction/", "before/"
"""Before the name of a figure of a cleansed training: over the number of samples cleaned; and without cleaning."""

GAIN = "gain/"
"""Before the name of a figure of a cleansed training: how much better it is than without cleaning."""

TRUTH, TRUST, DETECTION, PATTERN = "ground_truth/", "trust/", "detection/", "patterns/"
"""Before the leaves of a group, as the functions that compute them name what they return."""

ROWS = "dit/"
"""The group of an evaluation of given rows, which stands among the metrics of other evaluators."""

ATTAINABLE = "attainable_"
"""Before the leaf of an agreement with exact retraining: that of exact retraining, as recorded, with itself."""

VALIDATION, TEST = "validation/", "test/"
"""Before a metric of a workload: the data that it is of."""

LOSS, ACCURACY = "loss", "accuracy"
"""Metrics of a workload: the one that all have, and the usual name of another. The rest is up to the workload."""


@dataclass(frozen=True)
class Figure:
    """What runs log under a name, tables head, and legends explain.

    Attributes:
        name: of the metric, ``group/leaf``.
        heading: of a column, an axis or a chart.
        unit: :data:`SHARE`, ``seconds``, ``MiB``, ``samples``, ``steps``; empty for a plain number.
        higher_is_better: ``None`` where neither is better.
        sentence: what it says, as a legend has it behind heading and colon.
    """

    name: str
    heading: str
    unit: str
    higher_is_better: bool | None
    sentence: str

    @property
    def group(self) -> str:
        """What stands before the slash, empty without one."""
        return self.name.rpartition("/")[0]

    @property
    def leaf(self) -> str:
        """What stands behind the slash: the figure's name where its group is plain, as in a comparison's table."""
        return self.name.rpartition("/")[2]

    @property
    def low(self) -> str:
        """Name of the lower end of its interval."""
        return self.name + LOW

    @property
    def high(self) -> str:
        """Name of the upper end of its interval."""
        return self.name + HIGH

    @property
    def chance(self) -> str:
        """Name of its value for scores in random order."""
        return self.name + CHANCE

    @property
    def by_window(self) -> str:
        """Name of its series over windows."""
        return BY_WINDOW + self.name

    @property
    def attainable(self) -> str:
        """Name of the most that an estimate can reach, see :func:`dit_mlflow.evaluation.attainable`."""
        return f"{self.group}/{ATTAINABLE}{self.leaf}"

    @property
    def gain(self) -> Figure:
        """How much better it is after cleaning: more is better, whatever is of the figure itself."""
        sentence = f"of {self.heading} over that without cleaning, positive = better"
        return Figure(GAIN + self.name, "gain", self.unit, True, sentence)


SPEARMAN = Figure(
    "ground_truth/spearman",
    "Spearman",
    "",
    True,
    "agreement of the scores with exact retraining without each sample, by rank",
)
PEARSON = Figure(
    "ground_truth/pearson",
    "Pearson",
    "",
    True,
    "agreement of the scores with exact retraining without each sample, by value",
)
KENDALL = Figure(
    "ground_truth/kendall",
    "Kendall",
    "",
    True,
    "agreement of the scores with exact retraining without each sample, by the order within pairs of samples (tau-b)",
)
JACCARD_30 = Figure(
    "ground_truth/jaccard_30",
    "Jaccard of the highest 30 %",
    SHARE,
    True,
    "overlap of the 30 % of the samples that help most with those by exact retraining",
)
JACCARD_BOTTOM_30 = Figure(
    "ground_truth/jaccard_bottom_30",
    "Jaccard of the lowest 30 %",
    SHARE,
    True,
    "overlap of the 30 % of the samples that harm most with those by exact retraining",
)
LDS = Figure(
    "ground_truth/lds",
    "LDS",
    "",
    True,
    "linear datamodeling score: agreement of summed scores with training on random halves of the data, by rank",
)

REMOVAL_LDS = Figure(
    "removal/lds",
    "LDS of removals",
    "",
    True,
    "agreement of summed scores with retraining without random shares of the samples that did not fit them, by rank",
)
REMOVAL_SLOPE = Figure(
    "removal/slope",
    "slope of removals",
    "",
    None,
    "real change over the foretold one, over retrainings without random shares of the samples; 1 is the right size",
)

TRUST_SPEARMAN = Figure(
    "trust/spearman",
    "Spearman",
    "",
    True,
    "agreement of the scores of random samples with exact retraining without each, by rank",
)
TRUST_PEARSON = Figure(
    "trust/pearson",
    "Pearson",
    "",
    True,
    "agreement of the scores of random samples with exact retraining without each, by value",
)
TRUST_SAMPLES = Figure("trust/samples", "samples", "samples", None, "how many random samples were left out exactly")
SPREAD_RATIO = Figure(
    "trust/spread_ratio",
    "spread ratio",
    "",
    None,
    "spread of the scores over that of the true effects; 1 is right, above 1 effects are exaggerated",
)
SMOOTHNESS = Figure(
    "trust/smoothness",
    "smoothness",
    "",
    True,
    "1 if training is linear in the samples' weights, as the estimate takes it to be",
)
SLOPE_RATIO = Figure(
    "trust/slope_ratio",
    "slope ratio",
    "",
    None,
    "true change over the foretold one, where weights change along the scores by as much as one removal; 1 is right",
)

DETECTION_ACCURACY = Figure(
    "detection/accuracy",
    "accuracy",
    SHARE,
    True,
    "share of all samples that are told rightly by as many lowest scores as samples are damaged",
)
RECALL_AT_K = Figure(
    "detection/recall_at_k",
    "recall@k",
    SHARE,
    True,
    "share of the damaged samples among as many lowest scores",
)
AUROC = Figure("detection/auroc", "AUROC", "", True, "probability that a damaged sample scores lower than another one")
AVERAGE_PRECISION = Figure(
    "detection/average_precision",
    "average precision",
    "",
    True,
    "mean, over the damaged samples, of the share of damaged ones down to each, lowest scores first",
)
PRECISION = Figure(
    "detection/precision", "precision", SHARE, True, "share of the cleaned samples that truly are damaged"
)
RECALL = Figure("detection/recall", "recall", SHARE, True, "share of the damaged samples that are cleaned")

INFLUENCE_SECONDS = Figure("cost/influence_seconds", "seconds", "seconds", False, "time that the estimate took")
CPU_SECONDS = Figure("cost/cpu_seconds", "CPU seconds", "seconds", False, "time that the estimate took of all cores")
TRUTH_SECONDS = Figure(
    "cost/ground_truth_seconds", "ground truth seconds", "seconds", False, "time that exact retraining took"
)
TRAINING_SECONDS = Figure(
    "cost/training_seconds", "training seconds", "seconds", False, "time that the recorded training took"
)
PEAK_MEMORY = Figure(
    "cost/peak_memory_mb", "peak memory", "MiB", False, "largest resident memory of the process until then"
)
MAX_DRIFT = Figure(
    "replay/max_drift",
    "max drift",
    "",
    False,
    "largest distance of a replayed state from the recorded one, over that which training moved; 0 = bit for bit",
)

EARLY = Figure(
    "patterns/early", "early", "samples", None, "samples most of whose influence falls in the first half of training"
)
LATE = Figure(
    "patterns/late", "late", "samples", None, "samples most of whose influence falls in the second half of training"
)
STABLE = Figure(
    "patterns/stable",
    "stable",
    "samples",
    None,
    "samples whose influence is spread over training and mostly of one sign",
)
FLUCTUATING = Figure(
    "patterns/fluctuating", "fluctuating", "samples", None, "samples whose influence changes its sign during training"
)

TRAINING_LOSS = Figure("training/loss", "training loss", "", False, "loss of each step's batch")
VALIDATION_LOSS = Figure("validation/loss", "validation loss", "", False, "mean loss over the validation split")
TEST_LOSS = Figure("test/loss", "test loss", "", False, "mean loss over the test split")

FLAGGED_HELPFUL = Figure(
    "flagged/helpful", "helpful", "samples", False, "cleaned samples that help, as far as the estimate goes"
)
RELABELLED_CHANGED = Figure(
    "relabelled/changed", "changed", "samples", None, "relabelled samples whose new label is another one"
)

MEAN_LOSS = Figure("dit/mean_loss", "mean loss", "", False, "mean loss of the rows")
HARMFUL_SHARE = Figure(
    "dit/harmful_share",
    "harmful share",
    SHARE,
    None,
    "share of the training samples whose removal would lower the mean loss of the rows",
)
ROWS_HURT_BY_WORST = Figure(
    "dit/rows_hurt_by_worst",
    "rows hurt by the worst",
    SHARE,
    None,
    "share of the rows that are hurt by the sample which is most harmful to their mean",
)
CORRUPTED_AMONG_WORST = Figure(
    "dit/corrupted_among_worst",
    "damaged among the worst",
    SHARE,
    True,
    "share of damaged samples among those listed as most harmful to the mean of the rows",
)

WINDOW_START = Figure("window_start", "from step", "steps", None, "first step of the window")
WINDOW_END = Figure("window_end", "to step", "steps", None, "the step before which the window ends")

FIGURES: Mapping[str, Figure] = {found.name: found for found in globals().values() if isinstance(found, Figure)}
"""All of the above by name, in their order. A workload's own metrics are not among them."""

FIDELITY = (SPEARMAN, REMOVAL_LDS, TRUST_SPEARMAN)
"""How well an estimate agrees with exact retraining: the first that is known tells it."""


def figure_of(name: str) -> Figure:
    """The figure that a metric is of, whatever stands before and behind the figure's own name.

    Names as ``by_window/ground_truth/spearman``, ``detection/auroc_chance`` and ``patterns/early/pearson_low`` lead to
    their figure in :data:`FIGURES`; ``gain/test/loss`` to the gain. A metric of a workload's own, of validation or test
    data, is told by its name, and higher is better.

    Raises:
        KeyError: the name is of none.
    """
    own = name
    for prefix in (BY_WINDOW, MEAN_OVER_WINDOWS, BY_FRACTION, BEFORE):
        own = own.removeprefix(prefix)
    for suffix in (*BESIDE, LOWEST_DRAW, HIGHEST_DRAW):
        own = own.removesuffix(suffix)
    if own in FIGURES:
        return FIGURES[own]
    if own.startswith(GAIN):
        return figure_of(own.removeprefix(GAIN)).gain
    group, _, leaf = own.rpartition("/")
    # Agreement among the samples of a pattern, and of exact retraining with itself.
    agreement = TRUTH + leaf.removeprefix(ATTAINABLE)
    if agreement in FIGURES and (group in FIGURES or own.startswith(TRUTH)):
        return FIGURES[agreement]
    if f"{group}/" in (VALIDATION, TEST):
        unit = SHARE if leaf == ACCURACY else ""
        return Figure(own, f"{group} {leaf}", unit, True, f"mean of the workload's {leaf} over the {group} split")
    raise KeyError(f"{name!r} is the name of no figure; write it into dit_mlflow/evaluation/figures.py")
