"""What the site takes from outside of docs/: the benchmarks' page and raw outputs, so that links to them hold."""

import pathlib

from mkdocs.structure.files import File

_ROOT = pathlib.Path(__file__).parent.parent


def on_files(files, config):
    """Add benchmarks/README.md and benchmarks/results/ to the files of the site."""
    for path in [_ROOT / "benchmarks" / "README.md", *sorted((_ROOT / "benchmarks" / "results").iterdir())]:
        name = path.relative_to(_ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links that hold in the repository, as they hold in the site."""
    return markdown.replace("](../benchmarks/", "](benchmarks/")
