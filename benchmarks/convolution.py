"""Is `ancer_jax.models.convolution` worth having? SmallCNN with it and with XLA's own convolution.

Microseconds per row of the forward pass and of the gradient with respect to the input (what a theta search needs),
both inside a `lax.scan`, as they are in certification and search; the two alternate in one process. The gradients are
compared first.

    python benchmarks/convolution.py    # two minutes on two CPU cores that do nothing else

Exit status 1 if the gradients disagree.
"""

import argparse
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import overhead
import record

from ancer_jax import load_bundled

REPEATS = 7
TOLERANCE = 1e-4


def programs(classifier, steps):
    """Jitted forward and gradient scans of images [rows, *d], and the plain gradient; traced when first called."""

    def top(x):
        return jax.nn.softmax(classifier(x)).max(-1).sum()

    def forward(x):
        step = lambda x, _: (x + 1e-6 * classifier(x).max(), None)
        return jax.lax.scan(step, x, length=steps)[0]

    def gradient(x):
        step = lambda x, _: (x + 1e-6 * jax.grad(top)(x), None)
        return jax.lax.scan(step, x, length=steps)[0]

    return {"forward": jax.jit(forward), "gradient": jax.jit(gradient), "check": jax.jit(jax.grad(top))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10, help="steps of each scan")
    parser.add_argument("--rows", type=int, nargs="+", default=[100, 1000], help="rows per step")
    arguments = parser.parse_args()
    classifier, rng, rows = load_bundled("l2").classifier, np.random.default_rng(arguments.seed), []
    worst = 0.0
    for size in arguments.rows:
        x = jnp.asarray(rng.uniform(0, 1, (size, 28, 28, 1)), jnp.float32)
        ours = programs(classifier, arguments.steps)
        gradients = [np.asarray(ours["check"](x))]
        ours["forward"](x), ours["gradient"](x)
        with unittest.mock.patch("ancer_jax.models.cnn.convolution", None):  # Linen's default is XLA's
            theirs = programs(classifier, arguments.steps)
            gradients.append(np.asarray(theirs["check"](x)))
            theirs["forward"](x), theirs["gradient"](x)
        difference = float(np.abs(gradients[0] - gradients[1]).max() / np.abs(gradients[1]).max())
        worst = max(worst, difference)
        for kind in ("forward", "gradient"):
            functions = {"ours": lambda f=ours[kind], x=x: f(x), "xla": lambda f=theirs[kind], x=x: f(x)}
            times = overhead.seconds(functions, REPEATS)
            per_row = {name: float(np.median(t)) / size / arguments.steps * 1e6 for name, t in times.items()}
            rows.append(
                {"rows": size, "what": kind}
                | {f"{name}_us_per_row": value for name, value in per_row.items()}
                | {"xla_over_ours": per_row["xla"] / per_row["ours"], "relative_difference": difference}
            )
    record.show(rows)
    record.save("convolution", {"steps": arguments.steps, "repeats": REPEATS, "rows": rows}, seed=arguments.seed)
    print("gradients agree" if worst < TOLERANCE else "GRADIENTS DISAGREE")
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
