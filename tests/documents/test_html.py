import base64
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from bitalloc.documents import Bullets, Document, Grid, Picture, Section, html
from bitalloc.errors import BitallocError
from tests.browser import LOOK, complaints, opened, requests

TEMPLATE = (Path(__file__).parents[2] / "workflow/report/page.html").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("page")
    for name, width in (("wide", 400), ("narrow", 80)):
        imsave(place / f"{name}.png", np.random.default_rng(0).random((60, width, 3)))
    return place


def document(folder):
    grid = Grid(
        ("plan", "PPL"), [("a_b", "1.0"), None, ("<script>alert(1)</script>", "2.0")], "Of `a_b` & others.", "fit GO"
    )
    return Document("tiny <b>", [
        Section("What was reached", [grid, "A sentence."]),
        Section("Figures", [Picture(folder / f"{name}.png", f'"{name}"', "pilot WARN") for name in ("wide", "narrow")]),
        Section("Rows", [Grid(("x",), [("1",)] * 3, "All rows.", folded=True), Bullets(["GO  sweep"])]),
    ])  # fmt: skip


def test_everything_is_inside_and_escaped(folder):
    page = html.render(document(folder), TEMPLATE)
    assert "<script" not in page and "&lt;script&gt;" in page and "tiny &lt;b&gt;" in page
    assert base64.b64encode((folder / "wide.png").read_bytes()).decode() in page
    assert "default-src 'none'; img-src data:" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page) and "@import" not in page and "url(" not in page
    assert "Of <code>a_b</code> &amp; others." in page and "Gates: pilot WARN." in page
    assert "All rows. (3 rows)" in page and page.count("<figcaption>") == 3


def test_a_figure_that_is_no_png_is_one_line(folder, tmp_path):
    with pytest.raises(BitallocError, match="cannot read the figure"):
        html.render(Document("x", [Section("y", [Picture(tmp_path / "none.png")])]), TEMPLATE)
    (tmp_path / "cut.png").write_bytes(b"\x89P")
    with pytest.raises(BitallocError, match="is no PNG"):
        html.render(Document("x", [Section("y", [Picture(tmp_path / "cut.png")])]), TEMPLATE)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_every_figure_and_asks_for_nothing(folder, tmp_path, width):
    page = tmp_path / "report.html"
    page.write_text(html.render(document(folder), TEMPLATE))
    with opened(page, tmp_path / "profile", width=width) as (evaluate, events):
        seen = evaluate(LOOK)
        assert seen["widths"] == [400, 80] and all(seen["visible"]) and seen["overflow"] <= 0
        assert complaints(events) == [] and requests(events) == {page.resolve().as_uri()}
        # and the policy would refuse a request, which the console then says
        assert evaluate("fetch('https://example.com/').then(() => 'sent', () => 'refused')") == "refused"
        assert any("Content Security Policy" in str(each) for each in complaints(events))


def test_the_browser_tells_a_broken_figure_and_a_request(folder, tmp_path):
    page = html.render(document(folder), TEMPLATE).replace(
        "data:image/png;base64,iVBOR", "data:image/png;base64,AAAA", 1
    )
    (tmp_path / "broken.html").write_text(page.replace('href="data:,"', 'href="icon.png"'))
    with opened(tmp_path / "broken.html", tmp_path / "profile") as (evaluate, events):
        assert evaluate(LOOK)["widths"] == [0, 80]
        assert complaints(events)
