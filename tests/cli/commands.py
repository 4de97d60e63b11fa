"""What the tests of the command line share: a toy data set, a classifier of one's own, short command lines."""

import json

import numpy as np
import pytest

from ancer_jax import cli

PLUGIN = """
import jax.numpy as jnp
from ancer_jax import from_function

weights = jnp.array([[1.0, -1.0, 0.5], [-1.0, 1.0, 0.0]])

def linear(weights, x):
    return x.reshape(len(x), -1)[:, :2] @ weights

def three():
    return from_function(linear, weights, num_classes=3)

def nothing():
    return None

def needs(argument):
    return argument

def wrong_logits():
    return from_function(linear, weights, num_classes=4)

def infinite():
    return from_function(linear, weights * jnp.inf, num_classes=3)

number = 3
"""
SMALL = ("--devices", "1", "--batch-size", "2", "--n0", "10")
_LEAKAGE = ("--leakage-probes", "5", "--leakage-samples", "8")
_ISOTROPIC = ("--iso-steps", "3", "--iso-samples", "4", "--guard-samples", "50")
_ANCER = (*_ISOTROPIC, "--ancer-steps", "3", "--ancer-samples", "4")
# By method, without and with leakage.
SEARCH_ALONE = {"fixed": (), "isotropic": _ISOTROPIC, "ancer": _ANCER}
SEARCH = {"fixed": (), "isotropic": (*_ISOTROPIC, *_LEAKAGE), "ancer": (*_ANCER, *_LEAKAGE)}


def write_toys(folder):
    """Write `plugin.py`, with classifiers of one's own, and `toy.npz`, four images of 2 x 1 pixels in three classes."""
    (folder / "plugin.py").write_text(PLUGIN)
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 1)).astype(np.uint8)
    np.savez(folder / "toy.npz", images=images, labels=np.array([0, 1, 2, 1]))


def toy(*flags, method="fixed", sigma="0.25", n="100"):
    """The command that certifies the toy data set with the plugin's classifier into `run`."""
    own = ("--data", "toy.npz", "--classifier", "plugin:three", "--out", "run")
    return ["certify", *own, "--method", method, "--sigma", sigma, "--n", n, *SMALL, *flags]


def error_line(capsys, arguments):
    """The one line that a command with bad input prints; its exit status must be 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ancer-jax: error: ")
    return line


def settings_of(run):
    """The settings in the run directory `run`."""
    return json.loads((run / "config.json").read_text())["settings"]
