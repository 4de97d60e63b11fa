"""The HTML report: what it says, that it needs nothing else, and how a browser shows it."""

import contextlib
import html.parser
import re
import shutil

import numpy as np
import pytest

from ancer_jax import CertifyConfig, LeakageConfig, Region, RunConfig, certify_dataset, memory, report
from ancer_jax.data import Dataset
from ancer_jax.optimize import AnisotropicConfig, IsotropicConfig
from ancer_jax.report.compute import passes
from ancer_jax.runs import read_run
from tests.test_pipeline import CLASSIFIER, DATASET

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {
    "certify": CertifyConfig(n0=10, n=300),
    "isotropic": IsotropicConfig(steps=4, num_samples=8),
    "anisotropic": AnisotropicConfig(steps=4, num_samples=8),
    "leakage": LeakageConfig(3, 4),
    "guard_samples": 20,
}
CONFIGS = {
    "fixed": RunConfig(theta=0.3, **SMALL),
    "shared": RunConfig(method="shared", **SMALL),
    "isotropic": RunConfig(method="isotropic", theta=0.3, **SMALL),
    "ancer <b>": RunConfig(method="ancer", theta=0.3, **SMALL),
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """What is in a page: tags with their attributes, and text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def shrink(path):
    """Put a run through its memory again, as if its regions had had to give way."""
    run = read_run(path)
    _, ids, inside = run.read_memory()
    columns = run.columns("gap", "theta", "predictions")
    regions = Region(DATASET.images, columns["theta"], columns["gap"] / 2, 2)
    state, _ = memory.insert_batch(memory.empty(2), regions, columns["predictions"])
    run.write_memory(state, ids, inside)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name, config in CONFIGS.items():
        theta_map = np.full((3, 3, 1), 0.3) if config.method == "shared" else None
        certify_dataset(CLASSIFIER, DATASET, config, out=folder / name, theta_map=theta_map)
    shrink(folder / "isotropic")
    (folder / "cohen.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n3\t0\t0\t0.5\t1\t0:00:02\n")
    results = [report.load_results(folder / name) for name in [*CONFIGS, "cohen.tsv"]]
    more = [("A table of mine", [{"run": "one & two", "value": "1"}])]
    report.write_page(results, folder / "report.html", radii=[0.0, 0.125], datasets=[DATASET], more=more)
    return folder, results


def test_the_page_needs_no_other_file_and_runs_no_script(page):
    text = (page[0] / "report.html").read_text("utf-8")
    tags = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags.tags}
    sources = [attributes["src"] for attributes in tags.all("img")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?://|url\(|@import", re.sub(r'data:image/[^"]*', "", text))
    assert all(attributes["href"].startswith("#") for attributes in tags.all("a"))
    assert all(attributes.get("alt") for attributes in tags.all("img"))
    assert all(any(a.get("id") == anchor["href"][1:] for a in tags.all("section")) for anchor in tags.all("a"))


def test_the_page_says_what_the_tables_say(page):
    folder, results = page
    text = Page((folder / "report.html").read_text("utf-8")).text
    for title, rows in report.summary(results, [0.0, 0.125]):
        assert title in text
        for row in rows:
            assert all(value in text for value in (*row, *row.values()))
    for words in ("A table of mine", "one & two", "ancer <b>", "These runs are not of the same images"):
        assert words in text
    assert "theta_map" in text and "made with jax" in text and "isotropic.steps" in text


def test_names_of_runs_are_escaped(page):
    assert "<b>" not in (page[0] / "report.html").read_text("utf-8").replace("ancer &lt;b&gt;", "")


def test_every_run_shows_its_largest_and_smallest_regions(page):
    folder, results = page
    text = (folder / "report.html").read_text("utf-8")
    for results_, part in zip(results[:-1], text.split("<details")[1:5], strict=True):
        largest, smallest = (
            re.findall(r"<strong>#(\d+)", part.split(title)[1].split("<h3>")[0])
            for title in ("Largest regions", "Smallest regions")
        )
        size, ids = results_["radius_proxy"], results_["idx"].astype(int)
        order = ids[np.argsort(size, kind="stable")][(size == 0).sum() :]
        assert [int(i) for i in smallest] == list(order) and [int(i) for i in largest] == list(order[::-1])
        maps = part.count('alt="theta of image')
        assert (maps > 0) == (results_.name in ("shared", "ancer <b>"))
        assert part.count('alt="image #') >= maps


def test_images_of_other_data_are_not_shown(page, tmp_path):
    _, results = page
    other = Dataset("other", DATASET.ids, 1 - DATASET.images, DATASET.labels, 2)
    report.write_page(results, tmp_path / "a.html", radii=[0.0], datasets=[other])
    text = (tmp_path / "a.html").read_text("utf-8")
    assert 'alt="image #' not in text and "The images of points are not shown" in text


def test_a_table_alone_has_a_page(page, tmp_path):
    report.write_page(page[1][-1:], tmp_path / "a.html", radii=[0.0])
    text = Page((tmp_path / "a.html").read_text("utf-8")).text
    assert "Certificates of 1 run" in text and "cohen" in text
    assert "Settings and versions" not in text and "p_lower. Near" not in text


def test_what_the_memory_changed_is_shown(page):
    folder, results = page
    changed = [r for r in results if "changed" in r.columns and (r["changed"] == 1).any()]
    text = (folder / "report.html").read_text("utf-8")
    assert text.count("Changed by the memory") == len(changed) == 1
    for r in changed:
        (part,) = [p for p in text.split("<details")[1:] if f"<summary>{r.name.replace('<b>', '&lt;b&gt;')}" in p]
        listed = part.split("Changed by the memory")[1].split("<h3>")[0]
        assert {int(i) for i in re.findall(r"<strong>#(\d+)", listed)} == set(r["idx"][r["changed"] == 1].astype(int))
        assert listed.count("before memory: proxy radius") == (r["changed"] == 1).sum() > 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=lambda config: config.method)
@pytest.mark.parametrize("limit", [None, 0.5])
def test_passes_are_those_that_the_network_sees(config, limit):
    """Counted by hand: draws of the certificate, of every step, of the guarded choices, of leakage."""
    if config.data_dependent and limit is not None:
        config = RunConfig(method=config.method, theta=0.3, leakage_limit=limit, **SMALL)
    forward, backward = 310, 0
    if config.data_dependent:
        forward, backward = forward + 4 * 8 + 3 * 4, 4 * 8
        forward += 20 + 12 if limit else 0
    if config.method == "ancer":
        forward, backward = forward + 4 * 8 + 2 * 20 + (12 if limit else 0), backward + 4 * 8
    assert passes(config.settings()) == (forward, backward)


def test_passes_of_a_leakage_penalty_are_counted():
    search = IsotropicConfig(steps=4, num_samples=8, leakage_weight=1.0, leakage_batch=5)
    config = RunConfig(method="isotropic", **SMALL | {"isotropic": search})
    assert passes(config.settings()) == (310 + 4 * 13 + 12, 4 * 13)


@contextlib.contextmanager
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])


def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(page):
    """Nothing is asked of a network, nothing is cut off, every picture is drawn, and there are no complaints."""
    asked, complaints = [], []
    with browser() as chromium:
        for width, height in ((390, 844), (1280, 900)):
            view = chromium.new_page(viewport={"width": width, "height": height})
            view.on("request", lambda request: asked.append(request.url))
            view.on("console", lambda message: complaints.append(message.text))
            view.on("pageerror", lambda error: complaints.append(str(error)))
            view.goto((page[0] / "report.html").as_uri())
            view.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert view.evaluate("document.documentElement.scrollWidth") <= width
            pictures = view.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.width])")
            assert len(pictures) > 20 and all(done and natural and shown for done, natural, shown in pictures)
            cut = "e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.wide')"
            assert view.evaluate(f"[...document.querySelectorAll('main *')].filter({cut}).length") == 0
            assert view.locator("h2").all_inner_texts()[:3] == ["Summary", "Curves", "Methods at equal compute"]
            shot = view.screenshot(full_page=True)
            assert shot[:4] == b"\x89PNG" and len(shot) > 50_000
        chromium.close()
    assert all(url.startswith(("file:", "data:")) for url in asked) and not complaints


def test_curves_can_be_told_apart_without_colour(page):
    from ancer_jax.report.plots import _line_styles

    styles = [(str(style["linestyle"]), style["linewidth"]) for style in _line_styles(page[1])]
    assert len(set(styles)) == len(styles)
