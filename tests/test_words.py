"""No text of the project uses a name that has been replaced (CHANGELOG.md, which tells what replaced it, may)."""

import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = sorted(
    file
    for place in ("ancer_jax", "docs", "benchmarks", "notebooks", "tests")
    for file in (ROOT / place).rglob("*")
    if file.suffix in {".py", ".md", ".ipynb", ".html"} and file != pathlib.Path(__file__)
)
TEXTS += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "mkdocs.yml") if (ROOT / name).exists()]

# Names that mean nothing in English: they are not to be found anywhere.
NAMES = [
    "GaussianL2",
    "UniformL1",
    "SplittingL1",
    "OptimizeTrace",
    "MemoryInfo",
    "num_references",
    "make_references",
    "reference_classes",
    "split_rows",
    "share_rows",
    "each_with_its_rows",
    "learn_theta",
    "certification_from",
    "exact_evidence",
    "read_results",
    "parse_results",
]
# Modules that have moved into folders.
MODULES = "certificates certification classifiers config counting duals execution leakage optimize parallel"
MODULES += " pipeline results sequential"
PHRASES = [
    *(rf"\b{name}\b" for name in NAMES),
    rf"\b(?:ancer_jax|aj)\.(?:{'|'.join(MODULES.split())})\b",
    rf"\bfrom ancer_jax import [\w, ]*\b(?:{'|'.join(MODULES.split())})\b",
    r"(?<!def )\bnoise_law\(",  # TrainConfig has a property of that name
    r"--(?:leakage-references|split-devices)\b",
    r"--method[ =]shared\b",
    # The papers' schedule is the published preset.
    r"\.reference\(",
    r"--preset[ =]reference\b",
    r"\b(?:preset|ascent)\b\W{1,8}reference\b",
]
# Words that are English, too: they are not to be found as names.
WORDS = {"Certification", "References", "Trained"}

# Tests that what was written with a former name is refused.
REFUSED = {
    "tests/cli/test_main.py": {'preset", "reference'},
    "tests/runs/test_directory.py": {"num_references"},
}

PHRASE = re.compile("|".join(PHRASES))
CODE_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


def code_lines(text: str, suffix: str) -> list[tuple[int, str]]:
    """Line numbers and names of what is code: tokens of Python, code spans, and blocks of Python in Markdown."""
    lines = list(enumerate(text.splitlines(), 1))
    code = [(number, span) for number, line in lines for span in CODE_SPAN.findall(line)]
    if suffix == ".py":
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        code += [(token.start[0], token.string) for token in tokens if token.type == tokenize.NAME]
    if suffix == ".md":
        inside = False
        for number, line in lines:
            if line.startswith("```"):
                inside = line.startswith("```python")
            elif inside:
                code.append((number, line))
    return code


def retired(text: str, suffix: str) -> list[tuple[int, str]]:
    """Line numbers and names, of all names in the text that have been replaced."""
    found = [(number, match) for number, line in enumerate(text.splitlines(), 1) for match in PHRASE.findall(line)]
    for number, code in code_lines(text, suffix):
        found += [(number, word) for word in re.findall(r"\w+", code) if word in WORDS]
    return sorted(set(found))


def test_no_text_uses_a_name_that_has_been_replaced():
    found = [
        f"{file.relative_to(ROOT)}:{number}: {name}"
        for file in TEXTS
        for number, name in retired(file.read_text(), file.suffix)
        if name not in REFUSED.get(file.relative_to(ROOT).as_posix(), ())
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("place", ["ancer_jax", "docs", "benchmarks", "notebooks", "tests", "README.md"])
def test_every_place_is_searched(place):
    assert [file for file in TEXTS if file.relative_to(ROOT).parts[0] == place]


@pytest.mark.parametrize(
    ("suffix", "text", "name"),
    [
        (".py", "from ancer_jax import GaussianL2", "GaussianL2"),
        (".md", "Gaussian noise, `aj.UniformL1()`, is", "UniformL1"),
        (".ipynb", '"aj.parallel.device_mesh()\\n",', "aj.parallel"),
        (".py", "from ancer_jax import memory, parallel", "from ancer_jax import memory, parallel"),
        (".py", "law = noise_law('l2')", "noise_law("),
        (".md", "ancer-jax certify --leakage-references 9", "--leakage-references"),
        (".md", "with `--preset reference`", "--preset reference"),
        (".py", 'Config(ascent="reference")', 'ascent="reference'),
        (".py", 'main(["--preset", "reference"])', 'preset", "reference'),
        (".py", "config = IsotropicConfig.reference(steps=3)", ".reference("),
        (".py", "x: References = y", "References"),
        (".py", '"""A `Certification` of one input."""', "Certification"),
        (".md", "```python\nTrained(1)\n```", "Trained"),
    ],
)
def test_the_search_finds_a_retired_name(suffix, text, name):
    assert [found for _, found in retired("\n" + text, suffix)] == [name]
    assert 2 <= retired("\n" + text, suffix)[0][0] <= 3


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".py", '"""One line.\n\nReferences: Cohen et al. 2019.\n"""'),
        (".py", "law = config.noise_law\nx = reference.linear([1.0])  # Trained with noise"),
        (".md", "# Certification\n\nTrained networks, in the reference implementation."),
        (".md", "```text\nCertification of 3 images\n```"),
        (".py", "import ancer_jax.search.leakage\nfrom ancer_jax.runs import config"),
    ],
)
def test_the_search_leaves_english_alone(suffix, text):
    assert retired(text, suffix) == []
