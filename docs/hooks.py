"""What the site takes from outside of docs/: notebooks, the benchmarks' page and raw outputs; links to them hold."""

import pathlib
import re

import nbconvert
from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent


def on_files(files, config):
    """Add benchmarks/README.md, benchmarks/results/ and the notebooks, as Markdown, to the files of the site."""
    for path in [_ROOT / "benchmarks" / "README.md", *sorted((_ROOT / "benchmarks" / "results").iterdir())]:
        name = path.relative_to(_ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in sorted((_ROOT / "notebooks").glob("*.ipynb")):
        text, more = nbconvert.MarkdownExporter().from_filename(path, {"unique_key": path.stem})
        parts = {f"{path.stem}.md": text} | more["outputs"]
        for name, content in parts.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that hold in the repository, as they hold in the site."""
    markdown = re.sub(r"\]\(\.\./(notebooks/\w+)\.ipynb", r"](\1.md", markdown)
    return markdown.replace("](../benchmarks/", "](benchmarks/")
