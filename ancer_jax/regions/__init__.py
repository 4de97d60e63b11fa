"""Certified regions, their sizes, and how two of them lie to each other."""

from ancer_jax.regions.pairs import disjoint, is_superset, largest_inside, largest_outside, separation
from ancer_jax.regions.region import Region

__all__ = ["Region", "disjoint", "is_superset", "largest_inside", "largest_outside", "separation"]
