"""Adds pages from outside docs/ to the site: notebooks, benchmarks with their raw outputs, files of the project."""

import pathlib
import re

import nbconvert
from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_PROJECT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files, config):
    """Add the pages, the notebooks converted to Markdown."""
    sources = [_ROOT / "benchmarks" / "README.md", *sorted((_ROOT / "benchmarks" / "results").iterdir())]
    pages = {path.relative_to(_ROOT).as_posix(): path for path in sources}
    pages |= {page: _ROOT / name for name, page in _PROJECT.items()}
    for page, path in pages.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    for path in sorted((_ROOT / "notebooks").glob("*.ipynb")):
        text, more = nbconvert.MarkdownExporter().from_filename(path, {"unique_key": path.stem})
        parts = {f"{path.stem}.md": text} | more["outputs"]
        for name, content in parts.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Change links that work in the repository so that they work in the site."""
    if page.file.src_uri.startswith(("benchmarks/", "notebooks/")):
        return markdown.replace("](../docs/", "](../")
    if page.file.src_uri in _PROJECT.values():
        markdown = markdown.replace("](docs/", "](")
    for name, new in _PROJECT.items():
        markdown = markdown.replace(f"](../{name}", f"]({new}")
    markdown = re.sub(r"\]\(\.\./(notebooks/\w+)\.ipynb", r"](\1.md", markdown)
    return markdown.replace("](../benchmarks/", "](benchmarks/")
