"""Base classifiers as frozen pytrees: wrappers for Flax Linen, Flax NNX, functions in and outside of JAX, and a check.

A wrapper separates what is compiled (`apply`, hashable by value) from what is data (`variables`), so that rebuilding
it, or loading other weights, compiles nothing again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Hashable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jax.typing import ArrayLike

from ancer_jax._checks import check_integer, check_type
from ancer_jax._messages import type_and_line

WRAP_IT = "wrap it with from_linen, from_nnx, from_function, from_host or ancer_jax.torch"
# Compiler options, by platform, of a program that runs a few times only: without what takes long to optimise.
_COMPILED_QUICKLY: dict[str, dict[str, str | bool]] = {
    "cpu": {"xla_backend_optimization_level": "0"},
    "gpu": {"xla_gpu_autotune_level": "0"},
}
# Call arguments by which Linen modules are told training from evaluation, with the value for evaluation.
_EVALUATION_ARGUMENTS = {"train": False, "training": False, "is_training": False, "deterministic": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Classifier:
    """A base classifier `f(x) = argmax_c logits_c(x)`; lowest index wins ties.

    Attributes:
      apply: `apply(variables, x[n, *d]) -> logits[n, num_classes]`, row by row and in evaluation mode (static).
      variables: pytree of arrays.
      num_classes: number of classes K, at least 2 (static).

    Raises:
      ValueError: if `num_classes` is not an integer of at least 2.
    """

    apply: Callable[[Any, jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})
    variables: Any = dataclasses.field(repr=False)
    num_classes: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        check_integer("num_classes", self.num_classes, minimum=2)

    @property
    def on_host(self) -> bool:
        """Whether it runs outside of JAX (`from_host`)."""
        return isinstance(self.apply, _HostApply)

    def __call__(self, x: ArrayLike) -> jax.Array:
        """Logits [n, K] of inputs [n, *d].

        Raises:
          ValueError: at trace time, if `apply` fails, or the logits have another shape; if the classifier runs outside
            of JAX and x is being traced.
        """
        x = jnp.asarray(x)
        if self.on_host and isinstance(x, Tracer):
            raise ValueError(
                "this classifier runs outside of JAX, where there are no gradients, jit or vmap: it can be certified "
                "and can predict, under one theta or a theta map, but there is no search for theta"
            )
        try:
            logits = self.apply(self.variables, x)
            shape = logits.shape
        except (jax.errors.JaxRuntimeError, MemoryError):  # not of the shape
            raise
        except Exception as error:
            reason = type_and_line(error)
            if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3):
                reason += " (images are [height, width, channels] here)"
            with contextlib.suppress(Exception):
                if jax.eval_shape(self.apply, self.variables, x[0]).shape == (x.shape[1], self.num_classes):
                    reason += f" (if this is a batch of {x.shape[1]}: use certify_batch, predict_batch or jax.vmap)"
            message = f"the classifier does not work on inputs of shape {list(x.shape[1:])}: {reason}"
            raise ValueError(message) from error
        if shape != (x.shape[0], self.num_classes):
            raise ValueError(
                f"the classifier must return logits of shape {[x.shape[0], self.num_classes]} for inputs "
                f"{list(x.shape)}, got {list(shape)}"
            )
        return logits


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    module: nn.Module
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, variables, x) -> Any:
        return self.module.apply(variables, x, **dict(self.arguments))


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    graph: Any
    arguments: tuple[tuple[str, Any], ...]

    def __call__(self, variables, x):
        return nnx.merge(self.graph, variables)(x, **dict(self.arguments))


def from_linen(module: nn.Module, variables: Any, *, num_classes: int, **arguments: Hashable) -> Classifier:
    """A classifier from a Flax Linen module and its variables (`{"params": ..., "batch_stats": ...}`).

    Evaluation mode is forced: `train`, `training`, `is_training` = False and `deterministic` = True are passed where
    `module.__call__` takes them. A batch norm or dropout that is still in training mode makes Linen raise.

    Args:
      module: the network; `module.apply(variables, x[n, *d], **arguments)` returns logits [n, num_classes].
      variables: its variables.
      num_classes: K.
      **arguments: further call arguments, hashable.

    Raises:
      ValueError: if an argument contradicts evaluation mode, or `num_classes` is below 2.
    """
    return from_function(_LinenApply(module, _evaluation(module, arguments)), variables, num_classes=num_classes)


def from_nnx(model: nnx.Module, *, num_classes: int) -> Classifier:
    """A classifier from a Flax NNX model; a copy of it is set to evaluation mode, the model itself is left alone.

    `model.eval()` is called on the copy, and `train=False` and the like are passed where `model.__call__` takes them.

    Raises:
      ValueError: if `num_classes` is below 2.
    """
    model = nnx.clone(model)
    model.eval()
    graph, variables = nnx.split(model)
    return from_function(_NnxApply(graph, _evaluation(model, {})), variables, num_classes=num_classes)


def from_function(function: Callable[[Any, jax.Array], jax.Array], variables: Any, *, num_classes: int) -> Classifier:
    """A classifier from `function(variables, x[n, *d]) -> logits[n, num_classes]`, which must be pure.

    Pass the same function object each time (not a new lambda): compiled programs are kept by it. All that may change
    belongs into `variables`: values that the function closes over are frozen when it is compiled for the first time.
    `check_classifier` and `certify_dataset` refuse a function that has changed since they saw it first; they do not
    notice what an inner `jax.jit` or the body of a loop reads.

    Raises:
      ValueError: if `num_classes` is below 2.
    """
    return Classifier(function, jax.tree.map(_own, variables), num_classes)


def _own(leaf: Any) -> jax.Array:
    """An array that nobody else can write into: JAX may share the memory of a NumPy array."""
    if isinstance(leaf, jax.Array):
        return leaf
    if isinstance(leaf, np.ndarray):  # `jnp.array` would compile a program for each shape
        return jax.device_put(leaf.copy())
    return jax.device_put(leaf) if np.isscalar(leaf) else jnp.array(leaf)


@dataclasses.dataclass(frozen=True)
class _HostApply:
    function: Callable[[jax.Array], ArrayLike]
    digest: str

    def __call__(self, variables, x) -> jax.Array:
        return jnp.asarray(self.function(x))


def from_host(function: Callable[[jax.Array], ArrayLike], *, num_classes: int, digest: str = "") -> Classifier:
    """A classifier from `function(x[n, *d]) -> logits[n, num_classes]` that runs outside of JAX.

    JAX draws the noise, the same as for any other classifier up to the last digit, and the function votes. The
    classifier can be certified and can predict, alone and in runs. It has no gradients, so no search for theta.

    Args:
      function: is called with a JAX array of float32 and returns anything that JAX reads as an array, numbers of 64
        bits as 32. Each row's logits must depend on that row alone, and be the same each time.
      num_classes: K.
      digest: a hash of everything that the function computes with, by which a stopped run knows it again. With "", a
        run cannot be continued.

    Raises:
      ValueError: if `num_classes` is below 2, or the digest is no text.
    """
    check_type("digest", digest, str, "a hash of what the function computes with, as text")
    return Classifier(_HostApply(function, digest), (), num_classes)


def _evaluation(module, arguments) -> tuple[tuple[str, Any], ...]:
    """`arguments`, and those that put the module's call into evaluation mode."""
    taken = inspect.signature(type(module).__call__).parameters
    for name, wanted in _EVALUATION_ARGUMENTS.items():
        if name in taken and arguments.setdefault(name, wanted) != wanted:
            raise ValueError(f"{name}={arguments[name]} is training mode, which voids the certificate")
    return tuple(sorted(arguments.items()))


def check_classifier(classifier: Classifier, x: ArrayLike) -> None:
    """Refuse a classifier that no smoothing certificate can be true of.

    Runs it on a few inputs around `x` [*d] and checks that logits are finite and that each row's logits depend on that
    row alone, not on its place or on the rest of the batch: a batch norm in training mode or a dropout would void
    every certificate silently. So would maxima of bfloat16 numbers where the installed jaxlib gets them wrong: from
    0.11.2 on, to 0.12.0.1 at least, on CPUs. A function or module that reads values (of a closure, or globals) that
    have changed since an earlier check is refused, too; not noticed is what an inner `jax.jit` or body of a loop reads.

    Raises:
      ValueError: naming what is wrong.
    """
    x = np.asarray(x, np.float32)
    noise = np.random.default_rng(0).normal(size=(7, *x.shape)).astype(np.float32)
    batch = np.concatenate([x[None], x + 0.1 * noise[:3]])
    others = np.concatenate([x[None], noise[4:6], x[None] + 0.5 * noise[6:]])
    options = _COMPILED_QUICKLY.get(jax.default_backend())
    compiled = functools.partial(jax.jit(Classifier.__call__, compiler_options=options), classifier)
    run = classifier if classifier.on_host else compiled
    try:
        first = run(batch)
        if not jnp.isrealobj(first):
            raise ValueError(f"the classifier's logits must be real numbers, got {first.dtype}")
        logits = np.asarray(first, np.float64)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        line = str(error).partition("\n")[0]
        raise ValueError(f"the classifier does not work on inputs of shape {list(x.shape)}: {line}") from error
    if not classifier.on_host:
        _program(classifier, x)
    # These logits may be right all the same: XLA fuses, and gets wrong, large maxima only.
    if _takes_maxima_of_bfloat16(classifier, x) and not _bfloat16_works():
        raise ValueError(
            "the classifier takes maxima or minima of bfloat16 numbers, which jaxlib "
            f"{importlib.metadata.version('jaxlib')} computes wrongly on this device: take them in float32"
        )
    if not np.isfinite(logits).all():
        raise ValueError("the classifier's logits are not finite")
    tolerance = 1e-3 * np.ptp(logits, axis=-1).max() + 1e-5 * np.abs(logits).max()
    moved = np.asarray(run(batch[::-1]), np.float64)[::-1]
    if not np.abs(moved - logits).max() <= tolerance:  # NaN, too, is a difference
        raise ValueError("the classifier's logits depend on a row's place in the batch (dropout?)")
    company = np.asarray(run(others), np.float64)[0]
    if not np.abs(company - logits[0]).max() <= tolerance:
        raise ValueError("the classifier's logits depend on the rest of the batch (batch norm in training mode?)")


def _takes_maxima_of_bfloat16(classifier: Classifier, x: ArrayLike) -> bool:
    return not classifier.on_host and bool(re.search(r":bf16\S* = (max|min) ", _jaxpr(classifier, x)))


@functools.cache
def _bfloat16_works() -> bool:
    """Whether XLA gets two maxima with one constant, before a sum, right."""
    twice = jax.jit(lambda x: jnp.maximum(2 * jnp.maximum(x, 0.5) - 1, 0.5).sum())
    return bool(twice(jnp.zeros(2**13, jnp.bfloat16)) == 2**12)


def _jaxpr(classifier: Classifier, x: ArrayLike) -> str:
    return str(jax.make_jaxpr(Classifier.__call__)(classifier, jax.ShapeDtypeStruct((1, *np.shape(x)), jnp.float32)))


def _program(classifier: Classifier, x: ArrayLike) -> str:
    """The program that classifies an input like `x` [*d], as text, without the values of the variables.

    ValueError if it closes over arrays and JAX hides their values, or if the function would now give another program:
    JAX would go on with the one that it made first, for the values of that time.
    """
    inputs = jax.ShapeDtypeStruct((1, *np.shape(x)), jnp.float32)
    # Shapes alone, without the devices that the variables are on.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), classifier)
    program = jax.jit(Classifier.__call__).lower(shapes, inputs).as_text()
    if "jax.const" in program:
        raise ValueError(
            "the classifier closes over arrays, whose values JAX_USE_SIMPLIFIED_JAXPR_CONSTANTS hides: make them "
            "variables, or unset that flag"
        )
    again = functools.wraps(Classifier.__call__)(lambda classifier, x: Classifier.__call__(classifier, x))
    if jax.jit(again).lower(shapes, inputs).as_text() != program and not calls_the_host(classifier, x):
        raise ValueError(
            "the classifier's function reads values that have changed since JAX compiled it, which goes on with the "
            "old ones: make them variables, or call jax.clear_caches() after a change"
        )
    return program


def calls_the_host(classifier: Classifier, x: ArrayLike) -> bool:
    """Whether classifying inputs like `x` [*d] calls code outside of the program, which its `fingerprint` cannot hash:
    by `jax.pure_callback`, `io_callback`, `buffer_callback`, `jax.ffi` or `jax2tf.call_tf`, or by `from_host` without a
    digest.
    """
    if isinstance(classifier.apply, _HostApply):
        return not classifier.apply.digest
    called = re.findall(r"\b(\w*callback\w*|ffi_call|call_tf)\b", _jaxpr(classifier, x))
    return bool({*called} - {"debug_callback"})


def fingerprint(classifier: Classifier, x: ArrayLike) -> str:
    """Hash of every variable and of the program that classifies inputs like `x` [*d]: names a base classifier.

    The program is the one that JAX makes of `apply`, so that edited code and values it closes over are noticed (within
    one process, not those inside of an inner `jax.jit` or loop); another version of JAX may write it differently. The
    arithmetic of the device that runs it is not noticed: the programs for a CPU and for a GPU are the same text. A
    classifier outside of JAX is named by the digest that it came with.

    Raises:
      ValueError: if the program closes over arrays and JAX does not write their values into it, or over values that
        have changed in this process.
    """
    if isinstance(classifier.apply, _HostApply):
        return hashlib.sha256(f"{classifier.num_classes} {classifier.apply.digest}".encode()).hexdigest()
    digest = hashlib.sha256(_program(classifier, x).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(classifier.variables):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
