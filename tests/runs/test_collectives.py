"""No program of a run on CPUs lets devices wait for each other: XLA ends the process where one of them is 40 s late."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from ancer_jax import CertifyConfig, Execution, RunConfig, certify_dataset, devices
from ancer_jax.data import Dataset, load_dataset, select
from ancer_jax.models.cnn import SmallCNN
from ancer_jax.training import TrainConfig, train
from tests import reference

COLLECTIVE = re.compile(r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(")
# Every kind of run, with networks whose convolutions partition badly if left to XLA (groups), on two devices.
RUNS = """
import sys
import flax.linen as nn
import jax
import numpy as np
import ancer_jax as aj
from ancer_jax.data import Dataset

class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), use_bias=False)(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=8, use_bias=False)(x))
        return nn.Dense(3)(x.mean(axis=(1, 2)))

rng = np.random.default_rng(0)
images = (rng.integers(0, 256, (6, 8, 8, 1)) / np.float32(255)).astype(np.float32)
dataset = Dataset("toy", np.arange(6), images, np.arange(6) % 3, 3)
network = Network()
classifier = aj.from_linen(network, network.init(jax.random.key(0), images[:1]), num_classes=3)
small = {
    "certify": aj.CertifyConfig(n0=10, n=300),
    "isotropic": aj.IsotropicConfig(steps=2, num_samples=4, leakage_weight=1.0, leakage_batch=2),
    "anisotropic": aj.AnisotropicConfig(steps=2, num_samples=4),
    "guard_samples": 20,
    "leakage": aj.LeakageConfig(3, 8),
    "leakage_limit": 0.5,
}
splitting = {"norm": "l1", "noise": "splitting", "exact": True, "period": 60}
fixed = {"certify": small["certify"], "method": "fixed"}
for i, config in enumerate([
    aj.RunConfig(method="ancer", **small),
    aj.RunConfig(method="isotropic", **small | splitting),
    aj.RunConfig(**fixed, norm="l1", sampling=aj.SequentialConfig(tolerance=0.1)),
]):
    execution = aj.Execution(devices=2, batch_size=4)
    aj.certify_dataset(classifier, dataset, config, out=f"{sys.argv[1]}/{i}", execution=execution)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The text of every program that XLA compiled in these runs."""
    folder = tmp_path_factory.mktemp("runs")
    flags = f"--xla_force_host_platform_device_count=2 --xla_dump_to={folder}/xla --xla_dump_hlo_as_text"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNS, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {file.name: file.read_text() for file in (folder / "xla").glob("*after_optimizations.txt")}


@pytest.mark.parametrize("name", ["jit__find_theta", "jit__count_items", "jit__measure_leakage", "jit__classes"])
def test_the_programs_of_a_run_are_of_several_devices(programs, name):
    """Otherwise the next test would say nothing."""
    mine = [text for file, text in programs.items() if f".{name}." in file]
    assert mine and all("num_partitions=2" in text for text in mine)


def test_no_program_of_a_cpu_run_has_a_collective(programs):
    waiting = {file: COLLECTIVE.findall(text) for file, text in programs.items()}
    assert not {file: found for file, found in waiting.items() if found}


IMAGES = select(load_dataset("fashion-mnist-subset"), max_images=8)
DATASET = Dataset("points", np.arange(4), np.zeros((4, 3, 3, 1), np.float32), np.array([0, 1, 0, 1]), 2)


def test_several_cpu_devices_do_not_shard_the_draws_of_a_search(tmp_path):
    config = RunConfig(method="isotropic", certify=CertifyConfig(n0=1, n=20))
    classifier, execution = reference.linear(np.ones(9)), Execution(shard="draws", devices=2)
    with pytest.raises(ValueError, match="2 CPU devices cannot shard the draws of a search"):
        certify_dataset(classifier, DATASET, config, out=tmp_path / "run", execution=execution)
    assert not (tmp_path / "run").exists()


def test_several_cpu_devices_do_not_shard_a_training(tmp_path):
    config = TrainConfig(epochs=1, batch_size=4)
    with pytest.raises(ValueError, match="2 CPU devices cannot shard the batches of training"):
        train(SmallCNN(), (IMAGES, IMAGES), config, out=tmp_path / "net", devices=2)
    assert not (tmp_path / "net").exists()


def test_one_device_may_do_anything():
    devices.refuse_collectives(devices.device_mesh(1), "do this")
