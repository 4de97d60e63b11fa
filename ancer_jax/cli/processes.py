"""Several processes that share a run: JAX's distributed runtime says who they are; they do not talk otherwise."""

import os
import sys
import time

import jax
from jax.experimental import multihost_utils

_SECONDS_TO_LEAVE = 3.0


def join(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Become one of several processes; what is None is found out from the cluster or JAX's variables.

    Raises:
      ValueError: if an argument is malformed, or there is no cluster to ask.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator must be host:port, got {coordinator!r}")
    jax.config.update("jax_enable_recoverability", True)  # a process that dies does not take the others with it
    try:
        jax.distributed.initialize(coordinator, count, index)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"--multihost: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def leave() -> None:
    """Wait until all processes that live have come here; then end, the first one last: the runtime is its."""
    with multihost_utils.live_devices(jax.devices()):
        pass
    if jax.process_index() > 0:
        sys.stdout.flush()
        os._exit(0)
    time.sleep(_SECONDS_TO_LEAVE)
