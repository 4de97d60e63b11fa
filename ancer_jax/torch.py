"""PyTorch modules as base classifiers: as they are, or translated to JAX. Needs the extra `torch` or `torchax`."""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from ancer_jax._checks import check_choice
from ancer_jax.smoothing.classifier import Classifier, check_classifier, from_function, from_host

if TYPE_CHECKING:
    import torch

Channels = Literal["first", "last"]


def from_module(
    module: "torch.nn.Module",
    example: Float[ArrayLike, "*d"],
    *,
    device: "str | torch.device" = "cpu",
    channels: Channels = "first",
) -> Classifier:
    """A base classifier that runs any PyTorch module in PyTorch, while JAX draws the noise and counts the votes.

    The noise is the same, bit for bit, as for a classifier in JAX. There are no gradients, so theta cannot be searched:
    certify under one theta or a theta map, or see `translate`. A copy of the module is set to evaluation mode; later
    changes of `module` are not noticed.

    A stopped run is continued if weights, structure (`repr`) and the source code of the classes of all parts are the
    same. Functions that they call are not looked at.

    Args:
      module: returns logits [n, K] of float32 inputs, row by row. It should normalise its inputs itself, so that theta
        and radii are in units of [0, 1] pixels.
      example: [*d] one input, on which the module is tried.
      device: PyTorch's name of the device that it runs on.
      channels: "first" if it takes images [n, channels, height, width], though they have channels last here; "last"
        if it takes them as they are. Inputs that are not [height, width, channels] are passed as they are.

    Raises:
      ImportError: if PyTorch is not installed (extra `torch`).
      ValueError: if the module does not work on the example, or `check_classifier` refuses it.
    """
    check_choice("channels", channels, Channels)
    module, example = _evaluation(module, device), np.asarray(example, np.float32)
    logits = functools.partial(_logits, module, device, channels)
    classifier = from_host(logits, num_classes=_count_classes(logits, example), digest=_digest(module, channels))
    check_classifier(classifier, example)
    return classifier


def translate(
    module: "torch.nn.Module", example: Float[ArrayLike, "*d"], *, channels: Channels = "first"
) -> Classifier:
    """A base classifier in JAX that computes what a PyTorch module computes: everything works with it.

    torchax runs the module's code on JAX's arrays, once for each shape of inputs, when a program is compiled. Compiled
    programs do not contain PyTorch. The module must not decide by the values of tensors. Arguments as in `from_module`.

    Guarantee: on the example and three noisy copies of it, logits are those of the module to 1e-4 of the largest.

    Raises:
      ImportError: if PyTorch or torchax is not installed (extra `torchax`).
      ValueError: if torchax does not know an operation, or logits differ.
    """
    check_choice("channels", channels, Channels)
    torchax = _import_torchax()
    module, example = _evaluation(module, "cpu"), np.asarray(example, np.float32)
    num_classes = _count_classes(functools.partial(_logits, module, "cpu", channels), example)
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, *example.shape)).astype(np.float32)
    inputs = np.concatenate([example[None], example + noise])
    expected = _logits(module, "cpu", channels, inputs)
    other = "from_module certifies it without gradients"
    try:
        variables, function = torchax.extract_jax(module)
        classifier = from_function(_Translated(function, channels), variables, num_classes=num_classes)
        with jax.default_matmul_precision("highest"):
            found = np.asarray(jax.jit(Classifier.__call__)(classifier, inputs))
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"torchax cannot translate this {type(module).__name__} ({other}): {reason}") from error
    if not np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max():
        largest = f"differ by up to {np.abs(found - expected).max():.3g} from the module's"
        raise ValueError(f"logits of the translated {type(module).__name__} {largest} ({other})")
    check_classifier(classifier, example)
    return classifier


@dataclasses.dataclass(frozen=True)
class _Translated:
    function: Callable[[Any, Any], jax.Array]
    channels: Channels

    def __call__(self, variables, x: jax.Array) -> jax.Array:
        with _without_fast_path():
            return self.function(variables, (_ordered(x, self.channels, jnp.moveaxis),))


def _evaluation(module: "torch.nn.Module", device: "str | torch.device") -> "torch.nn.Module":
    """A copy of the module on a device, in evaluation mode, whose weights need no gradients."""
    torch = _import_torch()
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    return copy.deepcopy(module).to(device).eval().requires_grad_(False)


def _logits(module: "torch.nn.Module", device: "str | torch.device", channels: Channels, x: ArrayLike) -> np.ndarray:
    """What the module returns for inputs [n, *d], in float32."""
    torch = _import_torch()
    inputs = torch.from_numpy(np.array(x)).to(device)  # a copy, which the module may write to
    with torch.inference_mode():
        return module(_ordered(inputs, channels, torch.movedim).contiguous()).float().cpu().numpy()


def _ordered(x: Any, channels: Channels, move_axis: Callable[[Any, int, int], Any]) -> Any:
    """Inputs [n, *d] as the module takes them."""
    return move_axis(x, -1, 1) if channels == "first" and x.ndim == 4 else x


def _count_classes(logits: Callable[[ArrayLike], np.ndarray], example: np.ndarray) -> int:
    try:
        shape = logits(example[None]).shape
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise ValueError(f"the module does not work on an input of shape {list(example.shape)}: {reason}") from error
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(f"the module must return logits [n, K], got shape {list(shape)} for one input")
    return shape[1]


def _digest(module: "torch.nn.Module", channels: Channels) -> str:
    """Hash of weights, structure and the source code of the classes of all parts of a module."""
    torch = _import_torch()
    digest = hashlib.sha256(f"{torch.__version__} {channels} {module!r}".encode())
    for name, value in module.state_dict().items():
        if isinstance(value, torch.Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{name} {value!r}".encode())
    for kind in sorted({type(part) for part in module.modules()}, key=repr):
        with contextlib.suppress(OSError, TypeError):  # made in a shell: only its name is known
            digest.update(inspect.getsource(kind).encode())
    return digest.hexdigest()


def _import_torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("ancer_jax.torch needs PyTorch: pip install 'ancer_jax[torch]'") from error
    return torch


@functools.cache
def _import_torchax() -> Any:
    with _without_fast_path(), _removed_overloads():
        try:
            import torchax
        except ImportError as error:
            raise ImportError("translate needs torchax: pip install 'ancer_jax[torchax]'") from error
        torchax.default_env()
    return torchax


@contextlib.contextmanager
def _without_fast_path() -> Iterator[None]:
    """Without the fused attention of PyTorch, which torchax does not know and switches off for the whole process."""
    torch = _import_torch()
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _removed_overloads() -> Iterator[None]:
    """torchax 0.0.13 lists operators by names of dimensions, which PyTorch 2.13 removed (google/torchax, issue 101)."""
    torch = _import_torch()
    operator = type(torch.ops.aten.prod)
    original = operator.__getattr__

    def lenient(self, key: str) -> Any:
        try:
            return original(self, key)
        except AttributeError:
            if "name" not in key.lower():
                raise
            return f"{self}.{key}"  # never called

    setattr(operator, "__getattr__", lenient)  # noqa: B010
    try:
        yield
    finally:
        setattr(operator, "__getattr__", original)  # noqa: B010
