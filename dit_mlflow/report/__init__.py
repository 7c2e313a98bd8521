"""Plots, tables, and the page that shows a run whole."""

from dit_mlflow.report.cleansing import cleansing_table, plot_cleansing
from dit_mlflow.report.cleansing_note import cleansing_answer, cleansing_note
from dit_mlflow.report.comparison import plot_fidelity_against_cost
from dit_mlflow.report.page import influence_page
from dit_mlflow.report.plots import plot_against_truth, plot_top_samples
from dit_mlflow.report.recall import plot_recall_curves
from dit_mlflow.report.tables import terminal_table, top_samples_table, windows_table
from dit_mlflow.report.window_correlations import plot_window_correlations, window_correlations_table

__all__ = [
    "cleansing_answer",
    "cleansing_note",
    "cleansing_table",
    "influence_page",
    "plot_against_truth",
    "plot_cleansing",
    "plot_fidelity_against_cost",
    "plot_recall_curves",
    "plot_top_samples",
    "plot_window_correlations",
    "terminal_table",
    "top_samples_table",
    "window_correlations_table",
    "windows_table",
]
