"""Tables and pictures of results."""

from ancer_jax.report.curves import plot_certified_accuracy, plot_training
from ancer_jax.report.notes import NOT_RECONCILED, TWO_CLAIMS, UNKNOWN
from ancer_jax.report.orders import order_rows
from ancer_jax.report.page import write_page
from ancer_jax.report.results import LEAKY_ABOVE, Results, load_results
from ancer_jax.report.tables import compare_proxy_radius, format_table, summary, summary_table
from ancer_jax.report.theta_maps import plot_theta, plot_theta_map

__all__ = [
    "LEAKY_ABOVE",
    "NOT_RECONCILED",
    "TWO_CLAIMS",
    "UNKNOWN",
    "Results",
    "compare_proxy_radius",
    "format_table",
    "load_results",
    "order_rows",
    "plot_certified_accuracy",
    "plot_theta",
    "plot_theta_map",
    "plot_training",
    "summary",
    "summary_table",
    "write_page",
]
