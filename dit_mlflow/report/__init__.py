"""Plots, tables, and the page that shows a run whole."""

from dit_mlflow.report.against_truth import plot_against_truth
from dit_mlflow.report.cleansing import cleansing_table, plot_cleansing
from dit_mlflow.report.cleansing_note import cleansing_answer, cleansing_note
from dit_mlflow.report.comparison import plot_fidelity_against_cost
from dit_mlflow.report.comparison_note import comparison_note, comparison_sentences
from dit_mlflow.report.gallery import Gallery
from dit_mlflow.report.heat_map import plot_heat_map
from dit_mlflow.report.note import Links, compare_line, influence_note, window_note
from dit_mlflow.report.over_windows import plot_top_samples
from dit_mlflow.report.page import influence_page
from dit_mlflow.report.pattern_panels import plot_patterns
from dit_mlflow.report.recall import plot_recall_curves
from dit_mlflow.report.sentences import Findings, answer_sentences
from dit_mlflow.report.tables import paragraph, terminal_table, top_samples_table, whole_run_table, windows_table
from dit_mlflow.report.training_note import training_note
from dit_mlflow.report.window_correlations import plot_window_correlations, window_correlations_table
from dit_mlflow.report.window_samples import plot_window_samples

__all__ = [
    "Findings",
    "Gallery",
    "Links",
    "answer_sentences",
    "cleansing_answer",
    "cleansing_note",
    "cleansing_table",
    "compare_line",
    "comparison_note",
    "comparison_sentences",
    "influence_note",
    "influence_page",
    "paragraph",
    "plot_against_truth",
    "plot_cleansing",
    "plot_fidelity_against_cost",
    "plot_heat_map",
    "plot_patterns",
    "plot_recall_curves",
    "plot_top_samples",
    "plot_window_correlations",
    "plot_window_samples",
    "terminal_table",
    "top_samples_table",
    "training_note",
    "whole_run_table",
    "window_correlations_table",
    "window_note",
    "windows_table",
]
