"""PyTorch modules as base classifiers: as they are, or translated to JAX. Needs the extra `torch` or `torchax`."""

import contextlib
import copy
import dataclasses
import enum
import functools
import hashlib
import inspect
import math
import operator
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from ancer_jax._checks import check_choice
from ancer_jax._messages import type_and_line
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

    The draws are those that a classifier in JAX gets, up to the last digit. There are no gradients, so theta cannot be
    searched: certify under one theta or a theta map, or see `translate`. A deep copy of the module is set to evaluation
    mode; later changes of `module` are not noticed, as far as `copy.deepcopy` copies it.

    A stopped run is continued if everything that the module holds is the same: weights, buffers, attributes, the code
    of its classes, and also the kind of device, the precision of PyTorch's products, and the versions of PyTorch and
    Python. Functions and globals that these classes use are not looked at. A run with a module that holds something
    else than numbers, text, tensors, modules and functions that close over nothing, or whose classes were made in a
    shell, cannot be continued.

    Args:
      module: returns logits [n, K] of float32 inputs, row by row. It should normalise its inputs itself, so that theta
        and radii are in units of [0, 1] pixels.
      example: [*d] one input, on which the module is tried.
      device: PyTorch's name of the device that it runs on.
      channels: "first" if it takes images [n, channels, height, width], though they have channels last here; "last"
        if it takes them as they are. Inputs that are not [height, width, channels] are passed as they are.

    Raises:
      ImportError: if PyTorch is not installed (extra `torch`).
      ValueError: if the module cannot be copied, does not work on the example, or `check_classifier` refuses it.
    """
    check_choice("channels", channels, Channels)
    module, example = _evaluation(module, device), _array(example)
    logits = functools.partial(_logits, module, device, channels)
    digest = _digest(module, f"{channels} {_arithmetic(device)}")
    classifier = from_host(logits, num_classes=_count_classes(logits, example), digest=digest)
    check_classifier(classifier, example)
    return classifier


def translate(
    module: "torch.nn.Module", example: Float[ArrayLike, "*d"], *, channels: Channels = "first"
) -> Classifier:
    """A base classifier in JAX that computes what a PyTorch module computes: everything works with it.

    torchax runs the module's code on JAX's arrays, once for each shape of inputs, when a program is compiled. Compiled
    programs do not contain PyTorch. The module must not decide by the values of tensors. Arguments as in `from_module`.

    Guarantee: on the example and three noisy copies of it, logits are those of the module to 1e-4 of the largest, with
    products in float32.

    Raises:
      ImportError: if PyTorch or torchax is not installed (extra `torchax`).
      ValueError: if torchax does not know an operation, or logits differ.
    """
    check_choice("channels", channels, Channels)
    torchax = _import_torchax()
    module, example = _evaluation(module, "cpu"), _array(example)
    num_classes = _count_classes(functools.partial(_logits, module, "cpu", channels), example)
    noise = 0.1 * np.random.default_rng(0).normal(size=(3, *example.shape)).astype(np.float32)
    inputs = np.concatenate([example[None], example + noise])
    expected = _logits(module, "cpu", channels, inputs)
    other = "from_module certifies it without gradients"
    try:
        variables, function = torchax.extract_jax(module.requires_grad_(False))
        classifier = from_function(_Translated(function, channels), variables, num_classes=num_classes)
        with jax.default_matmul_precision("highest"):
            found = np.asarray(jax.jit(Classifier.__call__)(classifier, inputs))
    except Exception as error:
        what = f"torchax cannot translate this {type(module).__name__} ({other})"
        raise ValueError(f"{what}: {type_and_line(error)}") from error
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
    """A copy of the module on a device, in evaluation mode."""
    torch = _import_torch()
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    try:
        copied = copy.deepcopy(module).to(device)
        copied.eval()
    except Exception as error:
        raise ValueError(
            f"the module cannot be copied to {device} in evaluation mode: {type_and_line(error)}"
        ) from error
    return copied


def _array(example: ArrayLike) -> np.ndarray:
    """The example in float32; it may be a tensor."""
    tensor: Any = example
    return np.asarray(tensor.detach().cpu() if hasattr(example, "detach") else example, np.float32)


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
        what = f"the module does not work on an input of shape {list(example.shape)}"
        raise ValueError(f"{what}: {type_and_line(error)}") from error
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(f"the module must return logits [n, K], got shape {list(shape)} for one input")
    return shape[1]


def _arithmetic(device: "str | torch.device") -> str:
    """What decides how a device multiplies, beside the module."""
    torch = _import_torch()
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else kind
    backends = torch.backends
    if not hasattr(backends, "fp32_precision"):  # before PyTorch 2.9
        return f"{name} {torch.get_float32_matmul_precision()} {backends.cudnn.allow_tf32}"
    parts = backends, *(getattr(of, part) for of in (backends.cudnn, backends.mkldnn) for part in ("conv", "rnn"))
    parts = *parts, backends.cuda.matmul, backends.mkldnn.matmul
    return " ".join([name, *(part.fp32_precision for part in parts)])


def _digest(module: "torch.nn.Module", settings: str) -> str:
    """Hash of all that a module holds and of the code of its classes; "" if it holds something that has no hash."""
    digest = hashlib.sha256(f"{_import_torch().__version__} {settings}".encode())
    try:
        for text in _description(module):
            digest.update(len(text).to_bytes(8, "little") + text)
    except (TypeError, OSError, RuntimeError):  # RuntimeError: a tensor that NumPy has no counterpart of
        return ""
    return digest.hexdigest()


# Attributes of modules that say nothing about what they compute in evaluation mode.
_OF_TRAINING = ("_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")
_OF_TRAINING += ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_non_persistent_buffers_set")


# Attributes that Python gives to every class.
_OF_CLASSES = ("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__parameters__")
_OF_CLASSES += ("__abstractmethods__", "__firstlineno__", "__static_attributes__", "__annotate_func__", "_abc_impl")


def _description(value: Any) -> Iterator[bytes]:
    """Texts that differ if two values compute something different; TypeError or OSError if there are none."""
    torch = _import_torch()
    known = torch, torch.nn.functional, math, operator
    plain = bool | int | float | complex | str | bytes | enum.Enum | np.generic | torch.dtype | torch.device
    plain |= types.EllipsisType
    yield f"{type(value).__module__}.{type(value).__qualname__}".encode()
    if value is None or isinstance(value, plain):
        yield repr(value).encode()
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        yield f"{value.dtype} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, torch.nn.Module):
        yield from _code(type(value))
        yield from _description({name: held for name, held in vars(value).items() if name not in _OF_TRAINING})
    elif isinstance(value, Mapping):
        yield from _description([pair for item in value.items() for pair in item])
    elif isinstance(value, list | tuple | set | frozenset):
        held = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        yield str(len(held)).encode()
        for one in held:
            yield from _description(one)
    elif isinstance(value, functools.partial):
        yield from _description([value.func, value.args, value.keywords])
    elif isinstance(value, weakref.ref):
        yield from _description(value())
    elif inspect.iscode(value):
        yield value.co_code
        yield from _description([value.co_names, value.co_varnames, value.co_consts])
    elif inspect.ismethod(value):
        yield from _description([value.__self__, value.__func__])
    elif inspect.isfunction(value) or inspect.isclass(value):
        yield from _code(value)
    elif inspect.isbuiltin(value) and any(getattr(m, value.__name__, None) is value for m in known):
        yield value.__name__.encode()
    else:
        raise TypeError(f"no description of a {type(value).__name__}")


def _code(value: Any) -> Iterator[bytes]:
    """Name and code of a function that closes over nothing, or of a class and its bases, with what the class holds."""
    yield f"{value.__module__}.{value.__qualname__}".encode()
    if value.__module__.partition(".")[0] in ("torch", "builtins"):  # their version is in the digest
        return
    yield inspect.getsource(value).encode()
    if inspect.isfunction(value):
        yield from _program(value)
        return
    for name, held in vars(value).items():
        functions = [held]  # a method may have been replaced
        if isinstance(held, staticmethod | classmethod | property | functools.cached_property):
            functions = [getattr(held, part, None) for part in ("__func__", "func", "fget", "fset", "fdel")]
        functions = list(filter(inspect.isfunction, functions))
        yield name.encode()
        for function in functions:
            yield from _program(function)
        if not functions and name not in _OF_CLASSES:
            yield from _description(held)
    for base in value.__bases__:
        yield from _code(base)


def _program(function: Any) -> Iterator[bytes]:
    """What a function does: its source code does not tell two lambdas of one line apart."""
    if {*function.__code__.co_freevars} - {"__class__"}:
        raise TypeError(f"{function.__qualname__} closes over {', '.join(function.__code__.co_freevars)}")
    yield from _description([function.__defaults__, function.__kwdefaults__, function.__code__])


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
