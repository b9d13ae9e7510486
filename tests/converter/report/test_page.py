"""The report's page and the pictures in a real browser: nothing to complain of, everything in sight, in any colours."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bitwright.converter.cli import main
from bitwright.converter.report.data import Report
from bitwright.converter.report.page import figures_page, ladder_page, report_page
from bitwright.converter.report.pictures import importance_figures
from bitwright.converter.report.svg import svg_file
from tests.browser import Browser, Page
from tests.converter.artifact.test_target import some_sensitivity
from tests.converter.report.test_pictures import dense, mixture

WIDTHS = (390, 1280)  # a telephone, a computer
# What a model's name, a text or an error may contain.
HOSTILE = "<script>document.title='x'</script><img src=x onerror=alert(1)>\"'&"

# Problems of the page as the browser lays it out, in words.
LAYOUT = """(() => {
  const found = [];
  const root = document.documentElement;
  if (root.scrollWidth > window.innerWidth) found.push(`the page is ${root.scrollWidth} wide`);
  for (const table of document.querySelectorAll('.scroll'))
    if (table.scrollWidth > table.clientWidth) found.push(`${table.getAttribute('aria-label')}: cut`);
  const figures = [...document.querySelectorAll('svg.figure')];
  for (const figure of figures) {
    const frame = figure.getBoundingClientRect(), name = figure.getAttribute('aria-label') || '';
    if (frame.width < 200 || frame.height < 40) found.push(`${name}: ${frame.width} x ${frame.height}`);
    if (frame.left < 0 || frame.right > window.innerWidth + 0.5) found.push(`${name}: beyond the edge`);
    for (const text of figure.querySelectorAll('text')) {
      const box = text.getBoundingClientRect();
      if (box.left < frame.left - 0.5 || box.right > frame.right + 0.5 || box.bottom > frame.bottom + 1)
        found.push(`${name}: "${text.textContent}" is cut`);
      const scale = frame.width / (figure.viewBox.baseVal.width || frame.width);
      if (parseFloat(getComputedStyle(text).fontSize) * scale < 9) found.push(`${name}: text too small`);
    }
  }
  return found;
})()"""
# The least contrast of any text with what is behind it, as WCAG defines it, and that text.
CONTRAST = """(() => {
  const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = numbers(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return numbers(getComputedStyle(document.querySelector('svg > rect') || document.body).fill);
  };
  let least = [99, ''];
  const kinds = 'p, h1, h2, h3, h4, dt, dd, small, td, th, pre, summary, text, span';
  for (const element of document.querySelectorAll(kinds)) {
    if (!element.textContent.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const ink = numbers(element instanceof SVGElement ? style.fill : style.color);
    const [a, b] = [luminance(ink), luminance(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < least[0]) least = [ratio, element.textContent.slice(0, 40)];
  }
  return least;
})()"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def work_dir(tiny, tmp_path_factory) -> Path:
    """The work directory of a conversion with everything in its report."""
    directory = tmp_path_factory.mktemp("page")
    text = directory / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    arguments = ["--calibration", text, "--samples", "128", "--sequence-length", "16", "--profile", "mlp-low-precision"]
    arguments += ["--sensitivity", some_sensitivity(tiny("llama-256"), directory / "sensitivity.safetensors")]
    arguments += ["--output", directory / "m.gguf", tiny("llama-256")]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    assert str(directory / "m.bitwright" / "report.html") in done.stdout
    return directory / "m.bitwright"


def check(page: Page, path: Path) -> None:
    assert page.console == []
    assert page.requests == [path.absolute().as_uri()]
    assert page.evaluate(LAYOUT) == []
    ratio, text = page.evaluate(CONTRAST)
    assert ratio >= 4.5, f"contrast {ratio:.2f} of {text!r}"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_conversions_page(browser, work_dir, width, dark):
    path = work_dir / "report.html"
    page = browser.open(path, width, dark)
    check(page, path)
    report = json.loads((work_dir / "report.json").read_text())
    assert report["page"] == str(path)
    titles = page.evaluate("[...document.querySelectorAll('svg.figure')].map(f => f.getAttribute('aria-label'))")
    assert len(titles) == 10 and sum("expected to cost" in title for title in titles) == 2
    shown = page.evaluate("document.body.innerText")
    for text in (report["model"], f"{report['quality']['perplexity']:.2f}", report["artifact"]["files"][0]["sha256"]):
        assert text in shown
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == dark
    # Folded tables open to a width of their own, not the page's.
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    check(page, path)
    assert page.evaluate("document.querySelectorAll('details tr').length") > len(report["errors"])


@pytest.mark.parametrize("dark", [False, True])
def test_a_damaged_models_page_with_hostile_text(browser, work_dir, tmp_path, dark):
    """Everything that comes from a model or a user is text, whatever it says."""
    report = json.loads((work_dir / "report.json").read_text())
    tensors = json.loads((work_dir / "plan.json").read_text())["tensors"]
    coherence = report["coherence"]
    report |= {"model": HOSTILE, "revision": HOSTILE, "verdict": "damaged", "better": HOSTILE * 3}
    report["profile"] = HOSTILE.replace("/", "")  # which is the name of a file
    report["tasks"] = {"tasks": [HOSTILE], "limit": 3, "results": {HOSTILE: {"acc": 0.25}}}
    coherence |= {"runtime_note": {"failed": HOSTILE}, "verdict": "failed"}
    report["agreement"] |= {"verdict": "disagrees", "reasons": [HOSTILE * 3], "runtime": HOSTILE}
    for row in coherence["prompts"]:
        row |= {"text": HOSTILE * 4, "agreed_text": HOSTILE, "source_text": "x" * 300, "prompt": HOSTILE}
        row["problems"] = [{"kind": "loop", "detail": HOSTILE}]
    tensors[0] = tensors[0] | {"reason": HOSTILE * 5}
    path = tmp_path / "report.html"
    path.write_text(report_page(Report.from_dict(report), tensors))
    page = browser.open(path, WIDTHS[0], dark)
    check(page, path)
    assert page.evaluate("[document.scripts.length, document.images.length]") == [0, 0]
    assert page.evaluate("document.querySelector('h1').innerText") == HOSTILE
    assert "no longer writes text" in page.evaluate("document.querySelector('.banner.damaged').innerText")


def test_a_page_of_what_was_not_measured(browser, work_dir, tmp_path):
    report = json.loads((work_dir / "report.json").read_text())
    report |= {
        "quality": None,
        "coherence": None,
        "agreement": None,
        "verdict": None,
        "calibration": None,
        "better": None,
    }
    tensors = json.loads((work_dir / "plan.json").read_text())["tensors"]
    for row in tensors:
        if row["tensor"].startswith("blk."):  # as of formats that a sensitivity table lacks
            row["predicted_loss"] = None
    assert any(row["predicted_loss"] for row in tensors)
    path = tmp_path / "report.html"
    path.write_text(report_page(Report.from_dict(report), tensors))
    page = browser.open(path, WIDTHS[1], dark=False)
    check(page, path)
    assert "Verdict: not measured" in page.evaluate("document.body.innerText")


def test_the_size_is_shown_beside_what_people_know_and_what_is_used_most(work_dir):
    report = Report.from_dict(json.loads((work_dir / "report.json").read_text()))
    tensors = json.loads((work_dir / "plan.json").read_text())["tensors"]
    rare = [row | {"format": "Q5_1"} if "_up" in row["tensor"] or "_gate" in row["tensor"] else row for row in tensors]
    for rows, most_used in ((tensors, False), (rare, True)):
        page = report_page(report, rows)
        assert (">Q5_1</text>" in page or ">Q5_1*</text>" in page) == most_used
        assert all(f">{mix}</text>" in page for mix in ("Q4_K_M", "IQ4_XS", "Q3_K_M")) and ">this artifact<" in page


@pytest.mark.parametrize("dark", [False, True])
def test_a_ladders_page(browser, work_dir, tmp_path, dark):
    report = Report.from_dict(json.loads((work_dir / "report.json").read_text()))
    path = tmp_path / "ladder.html"
    path.write_text(ladder_page([report, replace(report, profile="mlp-low-precision", quality=None)]))
    for width in WIDTHS:
        page = browser.open(path, width, dark)
        check(page, path)
    for text in ("same top token", f"{report.quality.mean_kld:.4f}", report.verdict):
        assert text in page.evaluate("document.body.innerText")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("suffix", [".svg", ".html"])
def test_pictures(browser, tmp_path, suffix, width, dark):
    random = np.random.default_rng(0)
    uncovered = {int(layer): [int(random.integers(6))] for layer in range(5)}
    figures = importance_figures(dense()) + importance_figures(mixture(uncovered))
    path = tmp_path / f"picture{suffix}"
    path.write_text(svg_file(figures) if suffix == ".svg" else figures_page("imatrix.gguf", figures))
    page = browser.open(path, width, dark)
    assert page.console == [] and page.requests == [path.absolute().as_uri()]
    if suffix == ".html":
        check(page, path)
    assert page.evaluate("document.querySelectorAll('.missing').length") == 5
    background = "document.querySelector('svg > rect')" if suffix == ".svg" else "document.body"
    style = f"getComputedStyle({background}).{'fill' if suffix == '.svg' else 'backgroundColor'}"
    colour = page.evaluate(style)
    assert (sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) < 200) == dark
