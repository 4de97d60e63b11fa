"""Processes that leave together."""

import contextlib

import jax
import pytest
from jax.experimental import multihost_utils

from ancer_jax.cli import runtime


@pytest.mark.parametrize("dies", [False, True])
def test_leaving_waits_for_the_living_and_survives_who_dies_while_it_waits(monkeypatch, dies):
    """A process killed between the two barriers of `live_devices` is an error to JAX; the work is done all the same."""
    waited = []

    @contextlib.contextmanager
    def live_devices(devices):
        yield devices
        waited.append(devices)
        if dies:
            raise multihost_utils.ProcessFailureError(set(devices))

    monkeypatch.setattr(multihost_utils, "live_devices", live_devices)
    monkeypatch.setattr(runtime, "_SECONDS_TO_LEAVE", 0.0)
    runtime.leave()
    assert waited == [jax.devices()]
