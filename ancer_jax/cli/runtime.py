"""JAX's runtime: compiled programs that are kept, and several processes that do one job."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any

import jax
import tqdm
from jax.experimental import multihost_utils

from ancer_jax._messages import first_line
from ancer_jax.devices import keep_freed_memory

_SECONDS_TO_LEAVE = 3.0


@dataclasses.dataclass(frozen=True)
class Runtime:
    """Flags that `certify` and `train` share."""

    compilation_cache: bool = True
    """Keep compiled programs in the user's cache folder (or $JAX_COMPILATION_CACHE_DIR), so that starting again is
    quick."""
    multihost: bool = False
    """This is one of several processes, on one host or many, that do this together: start them all with the same flags.
    TPU pods and Slurm are recognised; elsewhere the next three flags say who is who."""
    coordinator: str | None = None
    """With --multihost: address and port of the first process, host:port."""
    processes: int | None = None
    """With --multihost: how many there are."""
    process: int | None = None
    """With --multihost: which of them this is, from 0."""

    def start(self, *, survive: bool) -> None:
        """Set JAX up; with `survive`, a process that dies does not take the others with it."""
        keep_freed_memory()
        if not self.compilation_cache:
            jax.config.update("jax_enable_compilation_cache", False)
        elif getattr(jax.config, "jax_compilation_cache_dir") is None:  # noqa: B009
            folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
            jax.config.update("jax_compilation_cache_dir", str(folder / "ancer-jax"))
            # JAX would not keep what compiles within a second: a run has dozens of such programs.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if self.multihost:
            self._join(survive)
        elif (self.coordinator, self.processes, self.process) != (None, None, None):
            raise ValueError("--coordinator, --processes and --process need --multihost")

    def _join(self, survive: bool) -> None:
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdecimal():
            raise ValueError(f"--coordinator must be host:port, got {self.coordinator!r}")
        jax.config.update("jax_enable_recoverability", survive)
        jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from us
        try:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"--multihost: {first_line(error)}") from None


def advance(bar: "tqdm.tqdm[Any]", title: str, done: int, begins: str) -> None:
    """Move a progress bar by `done`. The first call shows the bar, which was made with a delay, and until the next call
    it says with what the work `begins`.
    """
    first = bool(bar.delay)
    if first:  # what an earlier process finished says nothing about speed
        bar.delay, bar.initial = 0, done
    waiting = first and done < bar.total
    bar.set_description(f"{title} ({begins})" if waiting else title, refresh=False)
    bar.update(done)
    if first:
        bar.refresh()


def leave() -> None:
    """Wait until all processes that live have come here; then end, the first one last: the runtime is its."""
    # Whoever dies while the others wait is an error to JAX; to us it is one process less to wait for.
    with contextlib.suppress(multihost_utils.ProcessFailureError), multihost_utils.live_devices(jax.devices()):
        pass
    if jax.process_index() > 0:
        sys.stdout.flush()
        os._exit(0)
    time.sleep(_SECONDS_TO_LEAVE)
