"""Is `ancer_jax.models.convolution` worth having, and is a device for each core? Against XLA's own and one device.

Microseconds per row of the forward pass and of the gradient with respect to the input (what a theta search needs),
both inside a `lax.scan`, as they are in certification and search, of 100 rows: by XLA's own convolutions, by ours, and
by ours with the rows shared out to one device per core (`parallel.use_all_cores`); these alternate in one process. The
values and gradients are compared first.

    python benchmarks/convolution.py    # ten minutes on two CPU cores that do nothing else

Exit status 1 if they disagree.
"""

import argparse
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import overhead
import record
from jax.sharding import PartitionSpec

import ancer_jax as aj
from ancer_jax.models import make_network

REPEATS, STEPS, ROWS = 5, 3, 100
TOLERANCE = 1e-4
# Module that takes `convolution`, and the shape of an image.
NETWORKS = {
    "SmallCNN": ("cnn", (28, 28, 1)),
    "cifar_resnet20": ("resnet", (32, 32, 3)),
    "ancer_resnet18": ("resnet", (32, 32, 3)),
    "wrn_40_2": ("resnet", (32, 32, 3)),
}


def plain(*arguments, in_loop, **options):
    """XLA's own."""
    return jax.lax.conv_general_dilated(*arguments, **options)


def load(name, seed):
    if name == "SmallCNN":
        return aj.load_bundled("l2").classifier
    network = make_network(name)
    variables = jax.jit(network.init)(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)))
    return aj.from_linen(network, variables, num_classes=10)


def programs(classifier, mesh, x):
    """What is timed, compiled for images [rows, *d] on the mesh, and the values that are compared."""
    rows = PartitionSpec("rows")
    top = lambda x: jax.nn.softmax(classifier(x)).max(-1).sum()
    steps = {"forward": lambda x: 1e-6 * classifier(x).max(), "gradient": lambda x: 1e-6 * jax.grad(top)(x)}

    def repeated(step):
        def scan(x):
            return jax.lax.scan(lambda x, _: (x + step(x), None), x, length=STEPS)[0]

        shared = jax.shard_map(scan, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
        x_there = aj.parallel.split_rows(x, mesh)
        compiled = jax.jit(shared).lower(x_there).compile()
        return lambda: compiled(x_there)

    values = jax.jit(lambda x: (classifier(x), jax.grad(top)(x)))(x)
    return {name: repeated(step) for name, step in steps.items()}, [np.asarray(v) for v in values]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    arguments = parser.parse_args()
    aj.parallel.use_all_cores()
    one, cores = aj.parallel.device_mesh(1), aj.parallel.device_mesh()
    rng, lines, worst = np.random.default_rng(arguments.seed), [], 0.0
    for name in arguments.networks:
        module, shape = NETWORKS[name]
        x = jnp.asarray(rng.uniform(0, 1, (ROWS // cores.size * cores.size, *shape)), jnp.float32)
        with unittest.mock.patch(f"ancer_jax.models.{module}.convolution", plain):
            theirs, expected = programs(load(name, arguments.seed), one, x)
        ours, found = programs(load(name, arguments.seed), one, x)
        shared, _ = programs(load(name, arguments.seed), cores, x)
        difference = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, expected, strict=True))
        worst = max(worst, difference)
        for kind in ("forward", "gradient"):
            times = overhead.seconds({"xla": theirs[kind], "ours": ours[kind], "cores": shared[kind]}, REPEATS)
            per_row = {who: float(np.median(t)) / len(x) / STEPS * 1e6 for who, t in times.items()}
            ratios = {f"xla_over_{who}": per_row["xla"] / per_row[who] for who in ("ours", "cores")}
            line = {"network": name, "what": kind, "rows": len(x)}
            line |= {f"{who}_us_per_row": value for who, value in per_row.items()} | ratios
            lines.append(line | {"relative_difference": difference})
            record.show(lines[-1:])
    stored = {"steps": STEPS, "repeats": REPEATS, "devices": cores.size, "rows": lines}
    record.save("convolution", stored, seed=arguments.seed)
    print("they agree" if worst < TOLERANCE else "THEY DISAGREE")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
