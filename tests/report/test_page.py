"""The HTML report: what it says, that it needs nothing else, and how a browser shows it."""

import base64
import contextlib
import dataclasses
import html
import html.parser
import re
import shutil

import numpy as np
import pytest

from ancer_jax import RunConfig, certify_dataset, from_function, report
from ancer_jax.data import Dataset
from ancer_jax.memory import Memory
from ancer_jax.regions import Region
from ancer_jax.runs import read_run
from ancer_jax.runs.table import digests_of
from tests.memories import certificate
from tests.report.test_cost import SMALL
from tests.toy import CLASSIFIER, DATASET

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIGS = {
    "fixed": RunConfig(theta=0.3, **SMALL),
    "universal": RunConfig(method="universal", **SMALL),
    "isotropic": RunConfig(method="isotropic", theta=0.3, **SMALL),
    "ancer <b>": RunConfig(method="ancer", theta=0.3, guard="off", **SMALL),
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


def meddle(path):
    """Put a run through its memory again, as if its regions had had to give way, and the last its class, too."""
    run = read_run(path)
    _, ids, inside = run.read_memory()
    columns = run.columns("gap", "theta", "predictions")
    digests = digests_of(columns).tolist()
    predictions = np.where(np.arange(5) < 4, columns["predictions"], 1 - columns["predictions"])
    regions = Region(DATASET.images, columns["theta"], columns["gap"] / 2, 2)
    memory, _ = Memory.empty(2).insert_batch(certificate(regions, predictions))
    run.write_memory(memory, ids, np.where(np.arange(5) < 4, inside, ids[0]), digests)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    for name, config in CONFIGS.items():
        theta_map = np.full((3, 3, 1), 0.3) if config.method == "universal" else None
        config = dataclasses.replace(config, memory=config.method == "isotropic")
        certify_dataset(CLASSIFIER, DATASET, config, out=folder / name, theta_map=theta_map)
    meddle(folder / "isotropic")
    assert "not reconciled" not in report.summary_table([report.load_results(folder / "isotropic")], [0.0])
    (folder / "cohen.tsv").write_text("idx\tlabel\tpredict\tradius\tcorrect\ttime\n3\t0\t0\t0.5\t1\t0:00:02\n")
    results = [report.load_results(folder / name) for name in [*CONFIGS, "cohen.tsv"]]
    more = [("A table of mine", [{"run": "one & two", "value": "1"}])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ancer_jax.report.page._CARDS", 2)
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
    text = (folder / "report.html").read_text("utf-8")
    for title, rows in report.summary(results, [0.0, 0.125]):
        heading = html.escape(title).replace("&#x27;", "&#39;")
        table = text.split(f"<h3>{heading}</h3>")[1].split("</table>")[0]
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in table.split("<tr>")[1:]]
        found = [[html.unescape(cell).strip() for cell in line] for line in cells]
        assert found == [[*rows[0]], *([*row.values()] for row in rows)]
    text = Page(text).text
    for words in (
        "points; l2; n = 300; alpha = 0.001",
        "A table of mine",
        "one & two",
        "ancer <b>",
        "These runs are not of the same images",
    ):
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
        assert [int(i) for i in smallest] == list(order[:2]) and [int(i) for i in largest] == list(order[::-1][:2])
        first = part.split("First images")[1]
        assert re.findall(r"<strong>#(\d+)", first) == ["3", "5"]
        maps = part.count('alt="theta of image')
        assert (maps > 0) == (results_.name == "ancer <b>")
        assert ("The theta map of" in part) == (results_.name == "universal")
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
        lost = (r.before["radius_proxy"] - r["radius_proxy"])[r["changed"] == 1]
        most = r["idx"][r["changed"] == 1][np.argsort(-lost, kind="stable")][:2].astype(int)
        assert len(lost) > 2 and [int(i) for i in re.findall(r"<strong>#(\d+)", listed)] == list(most)
        assert listed.count("before memory: proxy radius") == 2


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
            assert shot[:4] == b"\x89PNG"
        chromium.close()
    assert all(url.startswith(("file:", "data:")) for url in asked) and not complaints


def test_what_is_not_reconciled_is_marked_wherever_it_is_shown(page):
    """The run "ancer <b>" has not gone through a memory."""
    text = (page[0] / "report.html").read_text("utf-8")
    assert "ancer &lt;b&gt;*" in text and not re.search(r"ancer &lt;b&gt;(?!\*)", text)
    (part,) = [p for p in text.split("<details")[1:] if "<summary>ancer" in p]
    assert report.NOT_RECONCILED in part
    drawn = [base64.b64decode(data).decode() for data in re.findall(r'data:image/svg\+xml;base64,([^"]*)', text)]
    assert len(drawn) == 5
    for svg in drawn:
        assert "ancer &lt;b&gt;*" in svg and report.NOT_RECONCILED in svg


def test_a_class_that_the_memory_gave_has_no_bound_of_its_own(page):
    report.write_page(page[1], page[0] / "all.html", radii=[0.0])
    text = (page[0] / "all.html").read_text("utf-8")
    (part,) = [p for p in text.split("<details")[1:] if "<summary>isotropic" in p]
    assert "All images, largest proxy radius first" in part and "Smallest regions" not in part
    card = part.split("<strong>#21</strong>")[1].split("</div>")[0]
    own = int(page[1][2].before["predict"][4])
    assert f"answers {1 - own}" in card and f"of {own}, its own answer" in card
    assert f", answer {own}" in card and "inside the region of #3" in card


@pytest.mark.parametrize("name", ["a$\\foo$x", "_hidden", "<&>"])
def test_runs_may_have_strange_names(page, tmp_path, name):
    report.write_page([dataclasses.replace(page[1][0], name=name)], tmp_path / "a.html", radii=[0.0])
    assert html.escape(name) in (tmp_path / "a.html").read_text("utf-8")


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_number_of_channels_are_shown(tmp_path, channels):
    images = np.linspace(0, 1, 18 * channels, dtype=np.float32).reshape(2, 3, 3, channels)
    dataset = Dataset("some", np.arange(2), images, np.zeros(2, np.int32), 2)
    classifier = from_function(lambda variables, x: x.mean((1, 2))[:, [0, -1]], {}, num_classes=2)
    certify_dataset(classifier, dataset, CONFIGS["fixed"], out=tmp_path / "run")
    report.write_page([report.load_results(tmp_path / "run")], tmp_path / "a.html", radii=[0.0], datasets=[dataset])
    assert (tmp_path / "a.html").read_text("utf-8").count('alt="image ') == 2


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="results must hold at least one run"):
        report.write_page([], tmp_path / "a.html", radii=[0.0])
