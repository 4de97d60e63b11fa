"""What users can see of a signature: every parameter and result has a type, and none is `Any` without need."""

import inspect
import typing

import pytest

import ancer_jax
from ancer_jax import data, differentiable, metrics, models, regions, report, runs, search, smoothing, training

_MODULES = (ancer_jax, data, differentiable, models, regions, report, runs, search, smoothing, training)
# Keyword arguments that are passed on to something else.
_PASSED_ON = {"changes", "arguments", "attributes", "more"}
_PYTREES = {"variables"}


def _functions():
    things = {name: getattr(module, name) for module in _MODULES for name in getattr(module, "__all__", ())}
    things |= {name: thing for name, thing in vars(metrics).items() if name[0] != "_"}
    for name, thing in things.items():
        if inspect.isfunction(thing) and thing.__module__.startswith("ancer_jax"):
            yield name, thing
        if inspect.isclass(thing):
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                if method[0] != "_" and function.__name__ == method and function.__module__.startswith("ancer_jax"):
                    yield f"{name}.{method}", function


FUNCTIONS = dict(_functions())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_and_result_has_a_type(name):
    function = inspect.unwrap(FUNCTIONS[name])
    signature = inspect.signature(function)
    untyped = [
        parameter
        for parameter, about in signature.parameters.items()
        if parameter not in ("self", "cls") and about.annotation is inspect.Parameter.empty
    ]
    assert not untyped
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_parameter_is_of_any_type(name):
    function = inspect.unwrap(FUNCTIONS[name])
    free = {
        parameter
        for parameter, about in inspect.signature(function).parameters.items()
        if about.annotation is typing.Any and parameter not in _PASSED_ON | _PYTREES
    }
    assert not free
