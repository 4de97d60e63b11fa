"""Tables and pictures, made from results only."""

from ancer_jax.report.plots import plot_certified_accuracy, plot_theta
from ancer_jax.report.tables import NOT_RECONCILED, Results, compare_proxy_radius, load_results, summary_table

__all__ = [
    "NOT_RECONCILED",
    "Results",
    "compare_proxy_radius",
    "load_results",
    "plot_certified_accuracy",
    "plot_theta",
    "summary_table",
]
