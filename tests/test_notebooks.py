"""The notebooks: stored are the cells of the text, which uses public names. `make notebooks-check` runs them."""

import ast
import importlib
import inspect
import pathlib
import re

import pytest

import ancer_jax

jupytext = pytest.importorskip("jupytext", reason="reads notebooks: pip install '.[notebooks]'")
nbformat = pytest.importorskip("nbformat", reason="reads notebooks: pip install '.[notebooks]'")

TEXTS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("[0-9]*.py"))
MACHINE = re.compile(r"(/home/|/root/|/tmp/|/Users/|site-packages|[A-Z]:\\\\)")


def stored(text):
    return nbformat.read(text.with_suffix(".ipynb"), as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_four_notebooks_and_each_is_stored():
    assert [text.name[:2] for text in TEXTS] == ["01", "02", "03", "04"]
    assert [text.with_suffix(".ipynb") for text in TEXTS] == sorted(TEXTS[0].parent.glob("*.ipynb"))


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_the_stored_notebook_has_the_cells_of_its_text(text):
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells(stored(text)) == cells(jupytext.read(text)), "run make notebooks"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_a_notebook_uses_public_names_only(text):
    for node in ast.walk(ast.parse(text.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [*(getattr(node, "module", None) or "").split("."), *(alias.name for alias in node.names)]
            parts = [part for name in names for part in name.split(".")]
            assert not [part for part in parts if part.startswith("_")]
        elif isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_"), f"line {node.lineno}: {node.attr}"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_the_names_that_a_notebook_uses_are_there(text):
    tree = ast.parse(text.read_text())
    there = {"aj": ancer_jax}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ancer_jax"):
            module = importlib.import_module(node.module)
            there |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and inspect.ismodule(there.get(node.value.id))
        ):
            assert hasattr(there[node.value.id], node.attr), f"line {node.lineno}: {node.value.id}.{node.attr}"


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_a_notebook_opens_with_words_and_ends_with_a_figure(text):
    notebook = stored(text)
    assert notebook.cells[0].cell_type == "markdown"
    assert any("image/png" in output.get("data", ()) for output in code(notebook)[-1].outputs)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.stem)
def test_a_stored_notebook_was_run_from_top_to_bottom_and_tells_nothing_of_the_machine(text):
    notebook, file = stored(text), text.with_suffix(".ipynb")
    assert [cell.execution_count for cell in code(notebook)] == [*range(1, len(code(notebook)) + 1)]
    for output in (output for cell in code(notebook) for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
    assert all(not cell.metadata for cell in notebook.cells)
    assert not MACHINE.search(re.sub(r'"image/png": "[^"]*"', "", file.read_text()))
    assert file.stat().st_size < 300_000
