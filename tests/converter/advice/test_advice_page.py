"""The page of `bitwright advise --plot`, in a real browser."""

import pytest

from bitwright.converter.advice.page import advice_page
from bitwright.converter.advice.request import request_of
from bitwright.converter.advice.stage import advise
from tests import tiny_models
from tests.browser import Browser
from tests.converter.commands import convert

# What of a figure reaches beyond it.
OVERHANG = """[...document.querySelectorAll("svg.figure")].flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text, rect, circle, polyline")].filter(each => {
        const own = each.getBoundingClientRect();
        return own.right > box.right + 1 || own.left < box.left - 1 || own.bottom > box.bottom + 1;
    }).map(each => each.textContent);
})"""

CUT_TABLES = """[...document.querySelectorAll(".scroll")].filter(table => table.scrollWidth > table.clientWidth)
    .map(table => table.getAttribute("aria-label"))"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    request = request_of(tiny_models.checkpoint("llama-256"), hardware="RTX 4090")
    path = tmp_path_factory.mktemp("page") / "advice.html"
    path.write_text(advice_page(request, advise(request)))
    return path


def test_it_shows_time_speed_and_roof(page):
    text = page.read_text()
    assert text.count("<svg") == 3 and "on the roofline" in text and "over the context" in text
    assert "bitwright --profile" in text and "<script" not in text
    for group in ("attention weights", "MLP weights", "keys and values", "overhead"):
        assert group in text


def test_it_fits_every_screen_and_loads_nothing(page):
    with Browser() as browser:
        for width in (1280, 390):
            for dark in (False, True):
                shown = browser.open(page, width, dark)
                assert shown.console == [] and [url for url in shown.requests if not url.startswith("file:")] == []
                assert shown.evaluate("document.documentElement.scrollWidth") <= width
                assert shown.evaluate(OVERHANG) == []
                assert shown.evaluate(CUT_TABLES) == []


def test_the_command_writes_it(page, tmp_path):
    result = convert(
        "advise", tiny_models.checkpoint("llama-256"), "--hardware", "M2 Max", "--plot", tmp_path / "a.html"
    )
    assert result.exit_code == 0 and "M2 Max" in (tmp_path / "a.html").read_text()
    missing = tmp_path / "nowhere" / "a.html"
    result = convert("advise", tiny_models.checkpoint("llama-256"), "--hardware", "M2 Max", "--plot", missing)
    assert result.exit_code == 1 and str(missing) in result.stderr
