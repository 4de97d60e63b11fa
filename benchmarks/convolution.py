"""The convolutions of `ancer_jax.models._convolution`, and one device for each core, against XLA's own and one device.

    python benchmarks/convolution.py            # ten minutes on two CPU cores that do nothing else
    python benchmarks/convolution.py --small    # one network, two minutes

Reports microseconds per row of the forward pass, and of the gradient with respect to the input, which a theta search
needs. Both run inside a `lax.scan` of 100 rows, as they do in certification and search: with XLA's own convolutions,
with ours, and with ours and the rows sharded over one device for each core (`devices.use_all_cores`). The three
alternate in one process. Values and gradients are compared first.

Exit status 1 if they disagree.
"""

import sys
import unittest.mock
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import overhead
import record
from jax.sharding import Mesh, PartitionSpec

import ancer_jax as aj
from ancer_jax import devices
from ancer_jax.models import make_network

REPEATS, STEPS, ROWS = 5, 3, 100
TOLERANCE = 1e-4
# The module that imports `convolution`, and the shape of an image.
NETWORKS = {
    "SmallCNN": ("cnn", (28, 28, 1)),
    "cifar_resnet20": ("resnet", (32, 32, 3)),
    "ancer_resnet18": ("resnet", (32, 32, 3)),
    "wrn_40_2": ("resnet", (32, 32, 3)),
}


def plain(*arguments, in_loop, **options):
    """XLA's own convolution, with the signature of ours."""
    return jax.lax.conv_general_dilated(*arguments, **options)


def load(name: str, seed: int) -> aj.Classifier:
    """The bundled classifier, or a network with random weights."""
    if name == "SmallCNN":
        return aj.load_bundled("l2").classifier
    network = make_network(name)
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
    return aj.from_linen(network, variables, num_classes=10)


def programs(
    classifier: aj.Classifier, mesh: Mesh, x: jax.Array
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


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS))
    options = parser.parse_args()
    devices.use_all_cores()
    one, cores = devices.device_mesh(1), devices.device_mesh()
    rng, lines, worst = np.random.default_rng(options.seed), [], 0.0
    for name in options.networks or (["SmallCNN"] if options.small else NETWORKS):
        module, shape = NETWORKS[name]
        x = jnp.asarray(rng.uniform(0, 1, (ROWS // cores.size * cores.size, *shape)), jnp.float32)
        with unittest.mock.patch(f"ancer_jax.models.{module}.convolution", plain):
            theirs, expected = programs(load(name, options.seed), one, x)
        ours, found = programs(load(name, options.seed), one, x)
        on_cores, _ = programs(load(name, options.seed), cores, x)
        difference = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
        worst = max(worst, difference)
        for kind in ("forward", "gradient"):
            times = overhead.seconds({"xla": theirs[kind], "ours": ours[kind], "cores": on_cores[kind]}, REPEATS)
            per_row = {who: float(np.median(t)) / len(x) / STEPS * 1e6 for who, t in times.items()}
            ratios = {f"xla_over_{who}": per_row["xla"] / per_row[who] for who in ("ours", "cores")}
            line = {"network": name, "what": kind, "rows": len(x)}
            line |= {f"{who}_us_per_row": value for who, value in per_row.items()} | ratios
            lines.append(line | {"relative_difference": difference})
            record.show(lines[-1:])
    stored = {"steps": STEPS, "repeats": REPEATS, "devices": cores.size, "rows": lines}
    record.save("convolution", stored, seed=options.seed, small=options.small)
    print("they agree" if worst < TOLERANCE else "THEY DISAGREE")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
