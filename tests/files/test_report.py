"""The HTML report: self-contained, safe against hostile text, pictures intact."""

import base64
import html.parser
import io
import re
import xml.etree.ElementTree

import numpy as np
import pytest
from PIL import Image

from unclip import errors
from unclip.files.report import Report, Row

HOSTILE = "<script>alert(1)</script><img src=x onerror=\"alert('2')\"> --> </svg> $x_1$ &amp;"


class Elements(html.parser.HTMLParser):
    """Collects tags with attributes and the text outside of <style>."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], "", None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._open = tag

    def handle_data(self, data):
        if self._open != "style":
            self.text += data

    def all(self, name):
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def small():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def hostile(small):
    report = Report(HOSTILE, HOSTILE).section(HOSTILE, HOSTILE).section("Two")
    report.tiles({HOSTILE: HOSTILE}).table([{HOSTILE: HOSTILE}], caption=HOSTILE)
    report.gallery([Row(HOSTILE, [small], [(HOSTILE, None)], HOSTILE)], [HOSTILE], caption=HOSTILE)
    report.curves({HOSTILE: [(0, 1), (1, 2)], "_b": [(0, 2), (1, 1)]}, HOSTILE, HOSTILE, HOSTILE)
    report.curves({"loss": [(0, 1.0), (1, 0.01)]}, "second plot", logy=True)
    report.settings({HOSTILE: {HOSTILE: HOSTILE}}, HOSTILE)
    return report.html()


def test_hostile_text_stays_text(hostile):
    page = Elements(hostile)
    assert not page.all("script")
    assert [image for image in page.all("img") if not image["src"].startswith("data:image/")] == []
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    # The text itself is shown, whole, everywhere it was given: title, h1, subtitle, …
    assert page.text.count(HOSTILE) >= 12


def test_the_page_loads_nothing(hostile):
    page = Elements(hostile)
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.split(maxsplit=1) for rule in policy["content"].split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "script-src" not in rules
    assert not page.all("link") and not page.all("iframe")
    for _, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith(("#", "data:image/")), attributes
    assert "url(" not in re.sub(r"url\(#", "", hostile)
    # XML namespaces are names, not addresses; nothing else looks like one.
    assert set(re.findall(r"https?://[^\"'< ]+", hostile)) <= {
        "http://www.w3.org/1999/xlink",
        "http://www.w3.org/2000/svg",
    }


def test_plots_are_valid_svg_without_clashing_ids(hostile):
    charts = re.findall(r"<svg.*?</svg>", hostile, re.DOTALL)
    assert len(charts) == 2
    seen = set()
    for chart in charts:
        tree = xml.etree.ElementTree.fromstring(chart)
        ids = {node.get("id") for node in tree.iter() if node.get("id")}
        assert not ids & seen
        seen |= ids
        used = set(re.findall(r"url\(#([^)]*)\)", chart)) | set(re.findall(r'href="#(.*?)"', chart))
        assert used <= ids
        assert "currentColor" in chart and "var(--line)" in chart
        words = ["".join(node.itertext()) for node in tree.iter() if node.tag.endswith("text")]
        assert words, "labels must stay text"
    assert "0.01" in words and not any("mathdefault" in word for word in words)


def test_axis_labels_are_literal(hostile):
    chart = xml.etree.ElementTree.fromstring(re.search(r"<svg.*?</svg>", hostile, re.DOTALL)[0])
    words = ["".join(node.itertext()) for node in chart.iter() if node.tag.endswith("text")]
    assert words.count(HOSTILE) == 3  # x label, y label, legend


def test_small_pictures_are_exact_and_pixelated(small):
    large = np.full((200, 200, 3), (10, 200, 90), np.uint8)
    row = {"caption": "a fox", "images": [small, large, None], "badges": [("hit", True)]}
    page = Elements(Report("t").gallery([row], ["base", "full", "none"]).html())
    first, second = page.all("img")
    decoded = Image.open(io.BytesIO(base64.b64decode(first["src"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(decoded), small)
    assert first["class"] == "small" and first["alt"] == "base: a fox"
    assert second["class"] == "" and second["src"].startswith("data:image/webp;base64,")
    decoded = Image.open(io.BytesIO(base64.b64decode(second["src"].partition(",")[2])))
    assert np.abs(np.asarray(decoded).astype(int) - large).max() <= 6
    assert any(span.get("class") == "badge good" for span in page.all("span"))


def test_table_marks_the_best_and_aligns_numbers():
    rows = [
        {"run": "a", "FID": 12.3456, "n": 10000},
        {"run": "b", "FID": 9.5, "n": None},
        {"run": "c", "FID": float("nan"), "n": 3},
    ]
    report = Report("t").table(rows, best={"FID": "min", "n": "max"})
    page = report.html()
    assert re.search(r'<td class="number best">9.5</td>', page)
    assert re.search(r'<td class="number best">10,000</td>', page)
    assert page.count(" best") == 2
    assert '<td class="number">12.35</td>' in page
    assert '<td class="number">–</td>' in page
    with pytest.raises(ValueError, match="2 cells"):
        report.table([[1, 2, 3]], ["a", "b"])


def test_settings_are_dotted():
    page = Elements(Report("t").settings({"decoder": {"steps": 50}, "seed": 7}).html())
    assert "decoder.steps" in page.text and "50" in page.text


def test_wrong_pictures_are_refused(small):
    with pytest.raises(ValueError, match="1 pictures for 2 columns"):
        Report("t").gallery([Row("a", [small])], ["a", "b"])
    with pytest.raises(ValueError, match="uint8"):
        Report("t").gallery([Row("a", [small / 255.0])], ["a"])


def test_write_is_atomic_and_says_why_not(tmp_path, small):
    report = Report("title \udcff").gallery([Row("é 🦊", [small])], ["x"])
    path = report.write(tmp_path / "new" / "report.html")
    assert "é 🦊" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.DataError, match="cannot write"):
        report.write(tmp_path / "file" / "report.html")
