"""Runs: whole data sets certified into directories that can be continued."""

from ancer_jax.runs.carry import CarryRunConfig, carry_run
from ancer_jax.runs.config import Execution, RunConfig
from ancer_jax.runs.directory import Run, open_run, read_run
from ancer_jax.runs.memory_file import load_memory, save_memory
from ancer_jax.runs.pipeline import certify_dataset
from ancer_jax.runs.table import COLUMNS, MEMORY_COLUMNS, read_table

__all__ = [
    "COLUMNS",
    "MEMORY_COLUMNS",
    "CarryRunConfig",
    "Execution",
    "Run",
    "RunConfig",
    "carry_run",
    "certify_dataset",
    "load_memory",
    "open_run",
    "read_run",
    "read_table",
    "save_memory",
]
