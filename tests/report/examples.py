"""What the tests of the report share: tables written by hand, a small run directory, and cells of printed tables."""

import numpy as np
import PIL.Image

from ancer_jax import report
from ancer_jax.data import Dataset
from ancer_jax.runs import RunConfig, open_run
from ancer_jax.search import AnisotropicConfig, IsotropicConfig, LeakageConfig
from ancer_jax.smoothing import ABSTAIN, CertifyConfig
from ancer_jax.smoothing.certify import random_evidence

HEADER = "idx\tlabel\tpredict\tradius\tcorrect\ttime"
FIXED = f"""{HEADER}
0\t3\t3\t0.5\t1\t0:00:01.500000
1\t4\t4\t1.25\t1\t0:00:02.500000
2\t5\t1\t2\t0\t0:00:00
5\t6\t-1\t0.0\t0\t0:00:04
6\t7\t7\t0.25\t1\t0:00:02
7\t8\t8\t0.2\t1\t0:00:02
"""
ANCER = f"""{HEADER}\tradius_proxy\tmethod\tat_theta_max
0\t3\t3\t0.5\t1\t0:00:10\t0.75\tancer\t0.0
1\t4\t4\t1.0\t1\t1:00:00\t1.5\tancer\t0.25
2\t5\t1\t2\t0\t0:01:00\t3\tancer\t0.75
"""
# Columns that a report of a memory needs, after it: the last image got another class.
MEMORY = f"""{HEADER}\tradius_proxy\tmethod\tat_theta_max\tleakage\tsoft_leakage\tchanged\tanswered_by
0\t3\t3\t0.5\t1\t0:00:10\t0.75\tancer\t0.0\t0.05\t0.2\t0\t-1
1\t4\t3\t1.0\t0\t1:00:00\t1.5\tancer\t0.25\t0.05\t0.2\t1\t0
"""


def from_text(folder, name, text):
    """The results of a table of this text."""
    (folder / name).write_text(text)
    return report.load_results(folder / name)


def grey(ids, channels=1):
    """Grey images of 4 x 5 pixels with these ids."""
    pixels = np.full((len(ids), 4, 5, channels), 0.5, np.float32)
    return Dataset("grey", np.array(ids), pixels, np.zeros(len(ids), np.int64), 10)


def write_run(path, method, theta, *, ids=(0, 20, 40), norm="l2", alpha=0.001, dataset=None):
    """Write a run of these thetas, in one shard, with 50, 80 and 99 of 100 votes; the bound of theta is 1."""
    dataset = grey(ids) if dataset is None else dataset
    config = RunConfig(
        norm=norm,
        method=method,
        certify=CertifyConfig(n0=10, n=100, alpha=alpha),
        isotropic=IsotropicConfig(theta_max=1.0),
        anisotropic=AnisotropicConfig(theta_max=1.0),
        leakage=LeakageConfig(20, 8),
    )
    data = {"name": dataset.name, "fingerprint": dataset.fingerprint, "num_classes": dataset.num_classes}
    data |= {"image_shape": [*dataset.images.shape[1:]]}
    n, counts = len(ids), np.array([50, 80, 99])[: len(ids)]
    evidence = random_evidence(counts, config.certify)
    p_lower, gap = evidence.bound_and_gap(config.certified_noise)
    with open_run(path, config.settings() | {"data": data}, {}) as run:
        run.write_shard(
            {
                "ids": np.array(ids),
                "labels": np.arange(n),
                "pixels": np.arange(n, dtype=np.uint64),
                "predictions": np.where(gap > 0, np.arange(n) - 1, ABSTAIN),
                "counts": counts,
                "n": np.full(n, 100),
                "draws": np.full(n, 110),
                "passes": np.array(128 * n),
                "p_lower": p_lower,
                "gap": gap,
                "theta": theta,
                **{f"bound_{name}": column for name, column in evidence._asdict().items()},
                "leakage_num_leaked": np.arange(n),
                "leakage_num_eligible": np.full(n, 20),
                "leakage_votes": 10 * np.arange(n),
                "leakage_draws": np.full(n, 80),
                "seconds": np.ones(n),
            }
        )
        run.export()
    return path


def cells(table, line):
    """The cells in a line of a printed table."""
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def png_size(path):
    """Width and height of a PNG file that can be read whole."""
    with PIL.Image.open(path, formats=["PNG"]) as picture:
        picture.load()
        return picture.size
