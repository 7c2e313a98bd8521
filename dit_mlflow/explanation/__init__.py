"""The explanation of a training, in sentences, tables and notes."""

from dit_mlflow.explanation.cleansing_note import cleansing_answer, cleansing_note
from dit_mlflow.explanation.comparison_note import comparison_note, comparison_sentences
from dit_mlflow.explanation.explainer import explain
from dit_mlflow.explanation.explanation import Explanation
from dit_mlflow.explanation.gallery import Gallery
from dit_mlflow.explanation.run_note import Links, compare_line, influence_note, window_note
from dit_mlflow.explanation.sentences import answer_sentences
from dit_mlflow.explanation.tables import (
    cleansing_table,
    paragraph,
    terminal_table,
    top_samples_table,
    whole_run_table,
    window_correlations_table,
    windows_table,
)
from dit_mlflow.explanation.training_note import training_note
from dit_mlflow.explanation.truth import Checks, Truth, find_truth, noise_floor

__all__ = [
    "Checks",
    "Explanation",
    "Gallery",
    "Links",
    "Truth",
    "answer_sentences",
    "cleansing_answer",
    "cleansing_note",
    "cleansing_table",
    "compare_line",
    "comparison_note",
    "comparison_sentences",
    "explain",
    "find_truth",
    "influence_note",
    "noise_floor",
    "paragraph",
    "terminal_table",
    "top_samples_table",
    "training_note",
    "whole_run_table",
    "window_correlations_table",
    "window_note",
    "windows_table",
]
