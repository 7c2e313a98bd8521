"""Pictures of influence, of agreement with the truth, and of what cleaning did."""

from dit_mlflow.plots.against_truth import plot_against_truth
from dit_mlflow.plots.cleansing_gain import plot_cleansing
from dit_mlflow.plots.fidelity_against_cost import plot_fidelity_against_cost
from dit_mlflow.plots.heat_map import plot_heat_map, plot_window_correlations
from dit_mlflow.plots.over_windows import plot_top_samples
from dit_mlflow.plots.pattern_panels import plot_patterns
from dit_mlflow.plots.recall import plot_recall_curves
from dit_mlflow.plots.window_samples import plot_window_samples

__all__ = [
    "plot_against_truth",
    "plot_cleansing",
    "plot_fidelity_against_cost",
    "plot_heat_map",
    "plot_patterns",
    "plot_recall_curves",
    "plot_top_samples",
    "plot_window_correlations",
    "plot_window_samples",
]
