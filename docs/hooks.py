"""Adds pages from outside docs/ to the site: notebooks, benchmarks with their raw outputs, files of the project."""

import pathlib
import re

import nbconvert
from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent
_PROJECT = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def on_files(files, config):
    """Add the pages, the notebooks converted to Markdown."""
    sources = [
        _ROOT / "CITATION.cff",
        *(path for path in (_ROOT / "benchmarks").rglob("*.*") if "small-" not in path.name and path.suffix != ".pyc"),
    ]
    pages = {path.relative_to(_ROOT).as_posix(): path for path in sources}
    pages |= {page: _ROOT / name for name, page in _PROJECT.items()}
    for page, path in pages.items():
        files.append(File.generated(config, page, abs_src_path=str(path)))
    gallery = ["# Notebooks\n\nEach runs on a CPU in a minute or less; the pictures are theirs."]
    for path in sorted((_ROOT / "notebooks").glob("*.ipynb")):
        text, more = nbconvert.MarkdownExporter().from_filename(path, {"unique_key": path.stem})
        parts = {f"{path.stem}.md": text} | more["outputs"]
        for name, content in parts.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        title, summary = text.split("\n\n")[:2]
        picture = [name for name in more["outputs"] if name.endswith(".png")][-1]
        link = f"{path.stem}.md"
        gallery += [f"## [{title.strip('# ').strip()}]({link})", summary, f"[![]({picture}){{ width=500 }}]({link})"]
    files.append(File.generated(config, "notebooks/index.md", content="\n\n".join(gallery)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Change links that work in the repository so that they work in the site."""
    if page.file.src_uri.startswith(("benchmarks/", "notebooks/")):
        return markdown.replace("](../docs/", "](../")
    top = "" if page.file.src_uri in _PROJECT.values() else "../"
    for name, new in ({"docs/": "", "benchmarks/": "benchmarks/"} | _PROJECT).items():
        markdown = markdown.replace(f"]({top}{name}", f"]({new}")
    return re.sub(rf"\]\({top}(notebooks/\w+)\.ipynb", r"](\1.md", markdown)
