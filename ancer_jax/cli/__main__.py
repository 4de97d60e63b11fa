"""`python -m ancer_jax.cli`."""

from ancer_jax.cli import main

main()
