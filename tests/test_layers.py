"""Rules that a reader relies on: who may import whom, what is decided where, that public names are documented."""

import ast
import graphlib
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
# From low to high: a module imports from its own folder and from lines above that of its own.
LAYERS = [
    ["_checks", "_messages", "_numerics"],
    ["basis", "metrics", "storage"],
    ["regions"],
    ["smoothing"],
    ["devices", "memory", "verifier"],
    ["differentiable"],
    ["search"],
    ["data"],
    ["models", "torch"],
    ["runs"],
    ["training"],
    ["report"],
    ["cli"],
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")
TREES = {path: ast.parse(path.read_text()) for path in FILES}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def module_of(path):
    """Name of the folder or of the module at the top of the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def full_name(path):
    """Name by which the module is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_in(node):
    """Names and attributes in a piece of code."""
    return {
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute)
    }


def conditions(tree):
    """What the code branches on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node.test
        elif isinstance(node, ast.BoolOp):
            yield node
        elif isinstance(node, ast.Match):
            yield node.subject


def test_every_module_has_one_layer():
    assert set(LAYER) == {module_of(path) for path in FILES}
    assert len(LAYER) == sum(map(len, LAYERS))


@each_file
def test_a_module_imports_only_from_lower_layers(path):
    for name in imports(TREES[path]):
        parts = name.split(".")
        if parts[0] == "ancer_jax":
            other = parts[1]
            assert other == module_of(path) or LAYER[other] < LAYER[module_of(path)], f"{name} is not below"


def test_no_module_imports_itself_by_way_of_others():
    known = {full_name(path) for path in FILES}
    graph = {}
    for path, tree in TREES.items():
        named = {name if name in known else name.rpartition(".")[0] for name in imports(tree)}
        graph[full_name(path)] = named & known
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@each_file
def test_outside_libraries_and_the_outside_world_stay_where_they_belong(path):
    tree, module = TREES[path], module_of(path)
    names = {name.split(".")[0] for name in imports(tree)}
    assert "flax" not in names or module in ("models", "training") or path.name == "classifier.py"
    at_once = [n for n in tree.body if not isinstance(n, ast.FunctionDef) and "TYPE_CHECKING" not in ast.unparse(n)]
    top_level = {name.split(".")[0] for name in imports(ast.Module(at_once, []))}
    assert top_level.isdisjoint({"matplotlib", "torch", "tensorflow_datasets"})
    calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "print" not in calls or module == "cli"
    assert "open" not in calls


@each_file
def test_the_settings_of_a_run_are_read_in_two_places(path):
    """`RunConfig.from_settings` gives them back: nobody else looks them up by name."""
    if full_name(path) in ("ancer_jax.runs.directory", "ancer_jax.runs.config"):
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Subscript):
            assert "settings" not in names_in(node.value), f"line {node.lineno}: {ast.unparse(node)}"


@each_file
def test_a_public_function_has_at_most_six_parameters(path):
    def check(body):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                check(node.body)
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found = parameters(node)
                assert len(found) <= 6, f"line {node.lineno}: {node.name}({', '.join(found)})"

    check(TREES[path].body)


def parameters(function):
    """Names of all parameters but `self` and `cls`."""
    of = function.args
    found = [*of.posonlyargs, *of.args, *of.kwonlyargs, *filter(None, (of.vararg, of.kwarg))]
    return [argument.arg for argument in found if argument.arg not in ("self", "cls")]


@each_file
def test_whether_draws_are_enumerable_is_the_answer_of_the_noise(path):
    """The job of a run and its config ask for it; everybody else asks `RunConfig.enumerable`."""
    if module_of(path) == "smoothing" or full_name(path) in ("ancer_jax.runs.job", "ancer_jax.runs.config"):
        return
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute):
            assert node.attr != "num_draws", f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and names_in(node.func) & {"isinstance", "issubclass", "type"}:
            assert "Splitting" not in names_in(node), f"line {node.lineno}: {ast.unparse(node)}"
    for condition in conditions(TREES[path]):
        assert "exact" not in names_in(condition), f"line {condition.lineno}: {ast.unparse(condition)}"


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
def test_the_example_of_the_readme_prints_what_it_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = _blocks(README, "python")
    exec(compile(example, "README", "exec"), {})
    printed, said = capsys.readouterr().out.strip(), example.splitlines()[-1].removeprefix("# ")
    number = r"\d+(?:\.\d+)?"
    assert re.sub(number, "", printed) == re.sub(number, "", said)
    # A search rounds differently on other machines.
    numbers = [[float(found) for found in re.findall(number, text)] for text in (printed, said)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.05)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_the_examples_of_the_guides_run(page, tmp_path, monkeypatch):
    if page.name in (needed := {"torch.md": "torch", "tools.md": "foolbox"}):
        pytest.importorskip(needed[page.name], reason="the page uses it")
    monkeypatch.chdir(tmp_path)
    _run_examples(page.read_text())


def _run_examples(text):
    examples = "\n".join(_blocks(text, "python"))
    for large, small in (("n=100_000", "n=2_000"), ("max_images=1_000", "max_images=128")):
        examples = examples.replace(large, small)
    exec(compile(examples, "examples", "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_the_pages_are_understood(page, monkeypatch):
    understood = []
    for command in (cli.Certify, cli.Convert, cli.Demo, cli.Fetch, cli.LearnTheta, cli.Report, cli.Train):
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
