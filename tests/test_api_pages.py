"""The API pages: every public name is documented on one page and listed in the table of names."""

import importlib
import inspect
import pathlib
import re
import types

import pytest

import ancer_jax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs" / "api").glob("*.md") if path.name != "index.md")
TABLE = (ROOT / "docs" / "api" / "index.md").read_text()
PACKAGES = ["smoothing", "regions", "search", "differentiable", "runs", "data", "models", "training", "report"]
# Modules that have no `__all__`: their pages say which of their names are public.
MODULES = ["basis", "smoothing.bounds", "training.losses", "devices", "memory", "metrics", "torch", "verifier"]
DOCUMENTED = [
    (page.stem, path) for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def find(path):
    """What a dotted path names."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_names():
    """Names in an `__all__`, by the path that a user writes, without modules."""
    for package in ["", *(f".{name}" for name in PACKAGES)]:
        module = importlib.import_module(f"ancer_jax{package}")
        for name in module.__all__:
            if not isinstance(getattr(module, name), types.ModuleType) and name != "__version__":
                yield f"ancer_jax{package}.{name}"


def documented_as(path):
    """The entries of the API pages that document what a path names."""
    name, thing = path.rpartition(".")[2], find(path)
    return [entry for _, entry in DOCUMENTED if entry.rpartition(".")[2] == name and find(entry) is thing]


@pytest.mark.parametrize("path", list(public_names()))
def test_a_public_name_is_documented_on_one_page(path):
    assert len(documented_as(path)) == 1


@pytest.mark.parametrize("entry", [entry for _, entry in DOCUMENTED])
def test_a_documented_name_is_public_and_listed_in_the_table(entry):
    module = entry.rpartition(".")[0].removeprefix("ancer_jax.")
    assert module in MODULES or any(find(path) is find(entry) for path in public_names())
    assert len(re.findall(rf"\]\[{re.escape(entry)}\]", TABLE)) == 1


@pytest.mark.parametrize("entry", [entry for _, entry in DOCUMENTED])
def test_a_documented_name_is_documented_where_it_is_defined(entry):
    thing = find(entry)
    if inspect.isclass(thing) or inspect.isfunction(thing):
        assert f"{thing.__module__}.{thing.__qualname__}" == entry
        assert len(inspect.getdoc(thing)) > 30


def test_the_table_lists_documented_names_only():
    listed = re.findall(r"\]\[(ancer_jax[\w.]+)\]", TABLE)
    assert sorted(listed) == sorted(entry for _, entry in DOCUMENTED)


def test_every_package_has_its_page():
    assert {path.stem for path in PAGES} == {*PACKAGES, *(name.rpartition(".")[2] for name in MODULES)} - {"losses"}
    folders = {path.parent.name for path in pathlib.Path(ancer_jax.__file__).parent.glob("*/__init__.py")}
    assert folders - {"cli"} == set(PACKAGES)
