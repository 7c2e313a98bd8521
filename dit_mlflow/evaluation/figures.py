"""Every figure that runs log, written once: its name, heading, unit, direction, and what it says.

What logs, sorts, colours, tabulates or explains a figure takes it from here. ``docs/figures.md`` is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHARE = "share"
"""Unit of figures in [0, 1], which are shown in percent."""

LOW, HIGH, CHANCE = "_low", "_high", "_chance"
"""Behind a figure's name: the ends of its interval (95 %), and what scores in random order give."""

BESIDE = (LOW, HIGH, CHANCE)
"""Suffixes of values that are read beside a figure, and have no chart of their own."""

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

ALONE = ("", BY_FRACTION, BEFORE)
"""Forms in which most figures are logged by default: what stands around the name, if anything."""

BOUNDED = (*ALONE, LOW, HIGH)
"""As :data:`ALONE`, and the ends of the interval."""

RARELY: tuple[str, ...] = ()
"""Forms of a figure that is logged only where all figures are asked for."""

VALIDATION, TEST = "validation/", "test/"
"""Before a metric of a workload: the data that it is of."""

LOSS, ACCURACY = "loss", "accuracy"
"""Metrics of a workload: the one that all have, and the usual name of another. The rest is up to the workload."""


@dataclass(frozen=True)
class Figure:
    """A number that runs log, with its heading in tables and its sentence in legends.

    Attributes:
        name: of the metric, ``group/leaf``.
        heading: of a column, an axis or a chart.
        sentence: what it says, as a legend has it behind heading and colon.
        unit: :data:`SHARE`, ``seconds``, ``MiB``, ``samples``, ``steps``; empty for a plain number.
        higher_is_better: ``None`` where neither is better.
        forms: of its name that are logged by default (:func:`by_default`): what stands around it, ``""`` for nothing.
    """

    name: str
    heading: str
    sentence: str
    unit: str = ""
    higher_is_better: bool | None = True
    forms: tuple[str, ...] = ALONE

    @property
    def group(self) -> str:
        """The name's part before the slash; empty without one."""
        return self.name.rpartition("/")[0]

    @property
    def leaf(self) -> str:
        """The name's part behind the slash, for places that have only one group, as a comparison's table."""
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
        """The improvement by cleaning; higher is better, for a loss too."""
        sentence = f"of {self.heading} over that without cleaning, positive = better"
        return Figure(GAIN + self.name, "gain", sentence, unit=self.unit, forms=BOUNDED)


def _seconds(name: str, heading: str, sentence: str, forms: tuple[str, ...] = ALONE) -> Figure:
    return Figure(name, heading, sentence, "seconds", False, forms)


def _count(name: str, heading: str, sentence: str) -> Figure:
    return Figure(name, heading, sentence, "samples", None)


SPEARMAN = Figure(
    "ground_truth/spearman",
    "Spearman",
    "agreement of the scores with exact retraining without each sample, by rank",
    forms=(*BOUNDED, BY_WINDOW, ATTAINABLE),
)
PEARSON = Figure(
    "ground_truth/pearson",
    "Pearson",
    "agreement of the scores with exact retraining without each sample, by value",
    forms=(*ALONE, BY_WINDOW),
)
KENDALL = Figure(
    "ground_truth/kendall",
    "Kendall",
    "agreement of the scores with exact retraining without each sample, by the order within pairs of samples (tau-b)",
    forms=RARELY,
)
JACCARD_30 = Figure(
    "ground_truth/jaccard_30",
    "Jaccard of the highest 30 %",
    "overlap of the 30 % of the samples that help most with those by exact retraining",
    SHARE,
    forms=RARELY,
)
JACCARD_BOTTOM_30 = Figure(
    "ground_truth/jaccard_bottom_30",
    "Jaccard of the lowest 30 %",
    "overlap of the 30 % of the samples that harm most with those by exact retraining",
    SHARE,
    forms=RARELY,
)
LDS = Figure(
    "ground_truth/lds",
    "LDS",
    "linear datamodeling score: agreement of summed scores with training on random subsets of the data, by rank",
    forms=BOUNDED,
)

REMOVAL_LDS = Figure(
    "removal/lds",
    "LDS of removals",
    "agreement of summed scores with retraining without random shares of the samples that did not fit them, by rank",
    forms=(*BOUNDED, BY_WINDOW),
)
REMOVAL_SLOPE = Figure(
    "removal/slope",
    "slope of removals",
    "real change over the foretold one, over retrainings without random shares of the samples; 1 is the right size",
    higher_is_better=None,
    forms=(*ALONE, BY_WINDOW),
)

TRUST_SPEARMAN = Figure(
    "trust/spearman",
    "Spearman",
    "agreement of the scores of random samples with exact retraining without each, by rank",
    forms=(*BOUNDED, BY_WINDOW),
)
TRUST_PEARSON = Figure(
    "trust/pearson",
    "Pearson",
    "agreement of the scores of random samples with exact retraining without each, by value",
    forms=RARELY,
)
TRUST_SAMPLES = _count("trust/samples", "samples", "how many random samples were left out exactly")
SPREAD_RATIO = Figure(
    "trust/spread_ratio",
    "spread ratio",
    "spread of the scores over that of the true effects; 1 is right, above 1 effects are exaggerated",
    "",
    None,
)
SMOOTHNESS = Figure(
    "trust/smoothness",
    "smoothness",
    "1 if training is linear in the samples' weights, as the estimate assumes",
    forms=(*ALONE, BY_WINDOW),
)
SLOPE_RATIO = Figure(
    "trust/slope_ratio",
    "slope ratio",
    "true over predicted change when weights move along the scores by as much as one removal; 1 is right",
    "",
    None,
    forms=RARELY,
)

DETECTION_ACCURACY = Figure(
    "detection/accuracy",
    "accuracy",
    "share of all samples judged rightly if the k lowest scores are flagged, k = number of damaged samples",
    SHARE,
    forms=RARELY,
)
RECALL_AT_K = Figure(
    "detection/recall_at_k",
    "recall@k",
    "share of the damaged samples among the k lowest scores, k = their number",
    SHARE,
    forms=(*ALONE, BY_WINDOW, CHANCE),
)
AUROC = Figure(
    "detection/auroc",
    "AUROC",
    "probability that a damaged sample scores lower than another one",
    forms=(*ALONE, BY_WINDOW),
)
PLANTED_AUROC = Figure(
    "detection/planted_auroc",
    "AUROC of planted labels",
    "probability that a sample whose label was made wrong on purpose, in a training of its own, scores lower",
    forms=BOUNDED,
)
AVERAGE_PRECISION = Figure(
    "detection/average_precision",
    "average precision",
    "precision at the rank of each damaged sample, lowest scores first; mean over them",
    forms=RARELY,
)
PRECISION = Figure("detection/precision", "precision", "share of the cleaned samples that truly are damaged", SHARE)
RECALL = Figure("detection/recall", "recall", "share of the damaged samples that are cleaned", SHARE)

INFLUENCE_SECONDS = _seconds("cost/influence_seconds", "seconds", "time that the estimate took")
CPU_SECONDS = _seconds(
    "cost/cpu_seconds", "CPU seconds", "time that the estimate took, summed over cores", forms=RARELY
)
TRUTH_SECONDS = _seconds("cost/ground_truth_seconds", "ground truth seconds", "time that exact retraining took")
TRAINING_SECONDS = _seconds("cost/training_seconds", "training seconds", "time that the recorded training took")
PEAK_MEMORY = Figure(
    "cost/peak_memory_mb", "peak memory", "largest resident memory of the process until then", "MiB", False
)
MAX_DRIFT = Figure(
    "replay/max_drift",
    "max drift",
    "largest distance of a replayed state from the recorded one, relative to how far training moved; 0 = bit for bit",
    "",
    False,
)
FOLLOW_SECONDS = _seconds(
    "follow/window_seconds",
    "window seconds",
    "time from when a window was seen in the record until its influence was logged",
)
STEPS_BEHIND = Figure(
    "follow/steps_behind",
    "steps behind",
    "recorded steps that training was ahead of the window when its influence was logged",
    "steps",
    False,
)

EARLY = _count("patterns/early", "early", "samples most of whose influence falls in the first half of training")
LATE = _count("patterns/late", "late", "samples most of whose influence falls in the second half of training")
STABLE = _count("patterns/stable", "stable", "samples whose influence is spread over training and mostly of one sign")
FLUCTUATING = _count("patterns/fluctuating", "fluctuating", "samples whose influence changes its sign during training")

TRAINING_LOSS = Figure("training/loss", "training loss", "loss of each step's batch", "", False)
VALIDATION_LOSS = Figure("validation/loss", "validation loss", "mean loss over the validation split", "", False)
TEST_LOSS = Figure("test/loss", "test loss", "mean loss over the test split", "", False)

FLAGGED_HELPFUL = Figure(
    "flagged/helpful", "helpful", "cleaned samples that help, as far as the estimate goes", "samples", False
)
RELABELLED_CHANGED = _count("relabelled/changed", "changed", "relabelled samples whose new label is another one")

MEAN_LOSS = Figure("dit/mean_loss", "mean loss", "mean loss of the rows", "", False)
HARMFUL_SHARE = Figure(
    "dit/harmful_share",
    "harmful share",
    "share of the training samples whose removal would lower the mean loss of the rows",
    SHARE,
    None,
)
ROWS_HURT_BY_WORST = Figure(
    "dit/rows_hurt_by_worst",
    "rows hurt by the worst",
    "share of the rows that are hurt by the sample most harmful to their mean",
    SHARE,
    None,
)
CORRUPTED_AMONG_WORST = Figure(
    "dit/corrupted_among_worst",
    "damaged among the worst",
    "share of damaged samples among those listed as most harmful to the mean of the rows",
    SHARE,
)

WINDOW_START = Figure("window_start", "from step", "first step of the window", "steps", None)
WINDOW_END = Figure(
    "window_end", "to step", "the step before which the window ends", "steps", None, (*ALONE, BY_WINDOW)
)

FIGURES: Mapping[str, Figure] = {found.name: found for found in globals().values() if isinstance(found, Figure)}
"""All of the above by name, in their order. A workload's own metrics are not among them."""

FIDELITY = (REMOVAL_LDS, SPEARMAN, TRUST_SPEARMAN)
"""Figures of an estimate's agreement with exact retraining; the first that is known is shown."""


def figure_of(name: str) -> Figure:
    """The figure of a metric, without the prefixes and suffixes of its name.

    ``by_window/ground_truth/spearman``, ``detection/auroc_chance`` and ``patterns/early/pearson_low`` have theirs in
    :data:`FIGURES`; ``gain/test/loss`` has a gain. A workload's own metric on validation or test data gets a figure in
    which higher is better.

    Raises:
        KeyError: the name is of none.
    """
    return _parsed(name)[0]


def by_default(name: str) -> bool:
    """Whether a metric is logged where not all figures are asked for.

    It is if the figure has the form of its name: ``ground_truth/spearman_low`` the form :data:`LOW`. A name with more
    than one form, as ``by_window/ground_truth/attainable_spearman``, is not; a name of no figure is.
    """
    try:
        figure, around = _parsed(name)
    except KeyError:
        return True
    return len(around) < 2 and all(form in figure.forms for form in around or [""])


def _parsed(name: str) -> tuple[Figure, list[str]]:
    """The figure of a name, and what stands around the figure's own; raises :class:`KeyError` if it is of none."""
    own, around = name, list[str]()
    for prefix in (BY_WINDOW, MEAN_OVER_WINDOWS, BY_FRACTION, BEFORE):
        if own.startswith(prefix):
            own, around = own.removeprefix(prefix), [*around, prefix]
    for suffix in (*BESIDE, LOWEST_DRAW, HIGHEST_DRAW):
        if own.endswith(suffix):
            own, around = own.removesuffix(suffix), [*around, suffix]
    if own in FIGURES:
        return FIGURES[own], around
    if own.startswith(GAIN):
        figure, within = _parsed(own.removeprefix(GAIN))
        return figure.gain, [*around, *within]
    group, _, leaf = own.rpartition("/")
    # Agreement among the samples of a pattern, or of exact retraining with itself.
    agreement = TRUTH + leaf.removeprefix(ATTAINABLE)
    if agreement in FIGURES and own.startswith(TRUTH):
        return FIGURES[agreement], [*around, ATTAINABLE]
    if agreement in FIGURES and group in FIGURES:
        return FIGURES[agreement], [*around, PATTERN]
    if f"{group}/" in (VALIDATION, TEST):
        unit = SHARE if leaf == ACCURACY else ""
        return Figure(own, f"{group} {leaf}", f"mean of the workload's {leaf} over the {group} split", unit), around
    raise KeyError(f"{name!r} is the name of no figure; write it into dit_mlflow/evaluation/figures.py")
