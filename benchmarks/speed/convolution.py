"""The convolutions of `ancer_jax.models._convolution`, and one device for each core, against XLA's own and one device.

Reports microseconds per row of the forward pass, and of the gradient with respect to the input, which a theta search
needs. Both run inside a `lax.scan` of 100 rows, as they do in certification and search: with XLA's own convolutions,
with ours, and with ours and the rows sharded over one device for each core (`devices.use_all_cores`). The three
alternate in one process. Values must agree, and gradients of at least nine images in ten: where an activation is
within rounding of the kink of a ReLU, gradients may fall on either side of it.
"""

import argparse
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from ancer_jax import Classifier, devices
from ancer_jax.metrics import round_down
from benchmarks.benchmark import Benchmark, Found, Line, Lines, load, markdown
from benchmarks.speed import overhead

REPEATS, STEPS, ROWS = 5, 3, 100
TOLERANCE = 1e-4


def plain(*arguments, in_loop, **options):
    """XLA's own convolution, with the signature of ours."""
    return jax.lax.conv_general_dilated(*arguments, **options)


def programs(
    classifier: Classifier, mesh: Mesh, x: jax.Array
) -> tuple[dict[str, Callable[[], jax.Array]], list[np.ndarray]]:
    """The timed programs, compiled for images [rows, *d] on the mesh, and the values and gradients to compare."""
    rows = PartitionSpec("rows")
    top = lambda x: jax.nn.softmax(classifier(x)).max(-1).sum()
    steps = {"forward": lambda x: 1e-6 * classifier(x).max(), "gradient": lambda x: 1e-6 * jax.grad(top)(x)}

    def repeated(step):
        def scan(x):
            return jax.lax.scan(lambda x, _: (x + step(x), None), x, length=STEPS)[0]

        on_each_device = jax.shard_map(scan, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        sharded = devices.shard_rows(x, mesh)
        compiled = jax.jit(on_each_device).lower(sharded).compile()
        return lambda: compiled(sharded)

    values = jax.jit(lambda x: (classifier(x), jax.grad(top)(x)))(x)
    return {name: repeated(step) for name, step in steps.items()}, [np.asarray(v) for v in values]


def _differences(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The largest difference of each row, relative to the largest expected value of all rows."""
    return np.abs(found - expected).reshape(len(found), -1).max(axis=1) / np.abs(expected).max()


def measure(options: argparse.Namespace) -> Iterator[Any]:
    """All networks, forward and backward."""
    devices.use_all_cores()
    one, cores = devices.device_mesh(1), devices.device_mesh()
    rng, rows = np.random.default_rng(options.seed), []
    for name in options.networks:
        classifier, shape = overhead.make_classifier(name, options.seed)
        x = jnp.asarray(rng.uniform(0, 1, (ROWS // cores.size * cores.size, *shape)), jnp.float32)
        module = "cnn" if name == "SmallCNN" else "resnet"  # that imports our convolution
        with unittest.mock.patch(f"ancer_jax.models.{module}.convolution", plain):
            theirs, expected = programs(classifier, one, x)
        ours, found = programs(classifier, one, x)
        on_cores, _ = programs(classifier, cores, x)
        values, gradients = (_differences(*pair) for pair in zip(found, expected, strict=True))
        difference = float(max(values.max(), np.quantile(gradients, 0.9, method="higher")))
        for kind in ("forward", "gradient"):
            times = overhead.seconds({"xla": theirs[kind], "ours": ours[kind], "cores": on_cores[kind]}, REPEATS)
            per_row = {who: float(np.median(t)) / len(x) / STEPS * 1e6 for who, t in times.items()}
            row = {"network": name, "what": kind, "rows": len(x)}
            row |= {f"{who}_us_per_row": value for who, value in per_row.items()}
            row |= {f"xla_over_{who}": per_row["xla"] / per_row[who] for who in ("ours", "cores")}
            rows.append(row | {"relative_difference": difference})
        yield {"steps": STEPS, "repeats": REPEATS, "devices": cores.size, "rows": rows}


def lines(found: Found) -> Lines:
    devices = found["results"]["devices"]
    for r in found["results"]["rows"]:
        figure = " / ".join(f"{r[who + '_us_per_row']:,.0f}" for who in ("xla", "ours", "cores"))
        what = f"{r['network']}, {r['what']}: us a row, XLA / ours / ours, {devices} devices"
        yield Line(what, figure, f"values agree to {TOLERANCE:g}", r["relative_difference"] < TOLERANCE)


def _times(who: str, what: str, *networks: str) -> str:
    """How many times as fast as XLA on one device: the least and the most of some networks (of all, by default)."""
    rows = [r for r in load("convolution")["results"]["rows"] if r["what"] == what]
    ratios = [r[f"xla_over_{who}"] for r in rows if not networks or r["network"] in networks]
    return " to ".join(dict.fromkeys(round_down(ratio, 1) for ratio in (min(ratios), max(ratios))))


def _table() -> str:
    one, many = "one device that has both cores", "one device per core"
    return markdown(
        ["", "forward pass", "gradient with respect to the image"],
        [
            [title, *(_times(who, what, *networks) for what in ("forward", "gradient"))]
            for title, who, networks in (
                (f"{many}: all networks", "cores", ()),
                (f"{many}: ResNet-18 of ANCER's code", "cores", ("ancer_resnet18",)),
                (f"{many}: WRN-40-2", "cores", ("wrn_40_2",)),
                (f"{one}: all networks", "ours", ()),
            )
        ],
    )


BENCHMARK = Benchmark(
    claim="Our convolutions for CPUs compute what XLA's own do; times on one device, and of ours on all cores.",
    takes="10 minutes",
    measure=measure,
    sizes={"networks": (["SmallCNN"], ["SmallCNN", "cifar_resnet20", "ancer_resnet18", "wrn_40_2"])},
    outputs={"convolution": lines},
    figures={
        "table": _table,
    },
)
