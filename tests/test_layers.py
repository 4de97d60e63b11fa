"""The house rules that a reader relies on: who may import whom, and that public names are documented."""

import ast
import inspect
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

import ancer_jax
from ancer_jax import cli

PACKAGE = pathlib.Path(ancer_jax.__file__).parent
ROOT = PACKAGE.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAYERS = {
    "_checks": 0, "bounds": 0, "duals": 0, "regions": 0,
    "certificates": 1, "classifiers": 1, "smoothing": 1, "leakage": 1,
    "certification": 2, "optimize": 2,
    "differentiable": 3, "memory": 3, "metrics": 3, "parallel": 3, "sequential": 3,
    "storage": 4, "runs": 4, "results": 4, "config": 4, "counting": 4, "data": 4, "models": 4, "report": 4,
    "training": 4,
    "execution": 5,
    "pipeline": 6,
    "cli": 7,
}  # fmt: skip
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_lower_layers(path):
    layer = LAYERS[module_of(path)]
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "ancer_jax":
            other = parts[1]
            assert other == module_of(path) or LAYERS[other] < layer or (LAYERS[other] == layer and layer in (0, 1, 4))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_outside_libraries_and_the_outside_world_stay_where_they_belong(path):
    tree, module = ast.parse(path.read_text()), module_of(path)
    names = {name.split(".")[0] for name in imports(tree)}
    assert "flax" not in names or module in ("classifiers", "models", "training")
    top_level = {
        name.split(".")[0]
        for name in imports(ast.Module([n for n in tree.body if not isinstance(n, ast.FunctionDef)], []))
    }
    assert top_level.isdisjoint({"matplotlib", "torch", "tensorflow_datasets"})
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in calls or module == "cli"
    assert "open" not in calls


def test_importing_the_package_starts_no_heavy_library():
    code = "import sys, ancer_jax; print(sorted({'matplotlib', 'torch', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ancer_jax.__all__)
def test_public_names_are_documented(name):
    thing = getattr(ancer_jax, name)
    if callable(thing):
        assert len(inspect.getdoc(thing)) > 30
        assert inspect.getdoc(thing) != inspect.getdoc(type(thing))


def test_public_names_are_sorted_and_complete():
    assert sorted(ancer_jax.__all__) == ancer_jax.__all__
    public = {name for name, thing in vars(ancer_jax).items() if name[0] != "_" and not inspect.ismodule(thing)}
    assert public == set(ancer_jax.__all__)


@pytest.mark.usefixtures("quick_compilation")
def test_the_examples_of_the_readme_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _run_examples(README)
    printed = capsys.readouterr().out
    assert "certified radius" in printed and "False" in printed
    assert len(ancer_jax.load_memory(tmp_path / "memory.npz")) == 1


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_examples_of_the_guides_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _run_examples(page.read_text())


def _run_examples(text):
    examples = "\n".join(_blocks(text, "python"))
    exec(compile(examples.replace("n=100_000", "n=2_000"), "examples", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_are_understood(page, monkeypatch):
    understood = []
    for command in (cli.Certify, cli.Convert, cli.Demo, cli.Report, cli.Train):
        monkeypatch.setattr(command, "run", lambda self: understood.append(self))
    lines = "\n".join(_blocks(page.read_text(), "sh")).replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("ancer-jax ")]
    for command in commands:
        cli.main(command)
    assert len(understood) == len(commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_pages_link_to_is_there(page):
    links = re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text())
    for name, heading in [link for link in links if not link[0].startswith("https://")]:
        target = page.parent / name if name else page
        assert target.exists()
        assert not heading or heading in _anchors(target.read_text())


def _anchors(text):
    """Names of the headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
