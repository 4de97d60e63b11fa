"""Runs the notebooks from their text and stores them with their outputs.

    python notebooks/execute.py            # writes every .ipynb beside its text
    python notebooks/execute.py --check    # only runs them; the .ipynb files stay as they are
    python notebooks/execute.py 02         # the notebooks whose names start with 02

If a cell fails, or prints to standard error (a warning, say), the program ends with status 1. Times, versions and
random ids are not stored, because they differ between runs and machines. About two minutes for all on two CPU cores.
"""

import argparse
import base64
import io
import os
import pathlib
import re
import sys
import tempfile
import time

import jupytext
import matplotlib.font_manager  # noqa: F401 (makes the cache of fonts; else a cell prints a warning)
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


def execute(text: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook of a text file, with outputs, run in an empty folder.

    Raises:
      ValueError: if a cell prints to standard error.
      CellExecutionError: if a cell fails.
    """
    notebook = jupytext.read(text)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as profile:
        os.environ["IPYTHONDIR"] = profile  # else IPython makes one in the user's home
        options = {
            "timeout": 600,
            "extra_arguments": ["--log-level=ERROR"],
            "resources": {"metadata": {"path": folder}},
        }
        NotebookClient(notebook, **options).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stderr":
                raise ValueError(f"a cell prints to standard error:\n{cell.source}\n\n{output.text}")
    return notebook


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without times, versions of the interpreter and random ids, so that two runs differ little."""
    kept = ("jupytext", "kernelspec")
    notebook.metadata = {key: value for key, value in notebook.metadata.items() if key in kept}
    notebook.metadata["language_info"] = {"name": "python"}
    for number, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{number:02}", {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", ()):
                output.data["image/png"] = with_palette(output.data["image/png"])
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return notebook


def with_palette(png: str) -> str:
    """A PNG in base64, reduced to 128 colours, which figures do not exceed, and without the name of its writer."""
    small, picture = io.BytesIO(), Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the notebooks.")
    parser.add_argument(
        "start", nargs="*", default=[""], help="run the notebooks whose names start with this (default: all)"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    failed = False
    for text in sorted(HERE.glob("[0-9]*.py")):
        if not text.name.startswith(tuple(arguments.start)):
            continue
        began = time.perf_counter()
        try:
            notebook = execute(text)
        except (CellExecutionError, ValueError) as error:
            print(f"{text.name}: {COLOURS.sub('', str(error))}", file=sys.stderr)
            failed = True
            continue
        print(f"{text.name}: {time.perf_counter() - began:.0f} s", flush=True)
        if not arguments.check:
            nbformat.write(normalise(notebook), text.with_suffix(".ipynb"))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
