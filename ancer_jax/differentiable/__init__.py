"""Certified regions as differentiable functions of the input, of theta and of the network: estimates, not certificates.

What goes into a loss or an attack is a `Region` whose gap can be differentiated; its `radius`, `proxy_radius` and
`log_volume` take it from there. What comes out of training or a search is then certified by `certify`, with fresh
draws.
"""

from ancer_jax.differentiable.attack import attack
from ancer_jax.differentiable.estimates import EstimateConfig, estimated_region, vote_share

__all__ = ["EstimateConfig", "attack", "estimated_region", "vote_share"]
