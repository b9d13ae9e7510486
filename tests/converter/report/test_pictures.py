"""Pictures of importance, sensitivity and artifacts: every value has its cell, and what is wrong is marked."""

import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from bitwright.calibration.statistics.imatrix_file import save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeight
from bitwright.converter.cli import main
from bitwright.converter.report.pictures import (
    by_layer_and_role,
    cell_of,
    coverage_figure,
    importance_figures,
    sensitivity_figures,
)
from bitwright.converter.report.svg import Figure, Grid, Scale, bars, columns_chart, heat_map, short, svg_file
from bitwright.profiles.vocabulary import Role

N_LAYERS, N_EXPERTS = 5, 6
MATRICES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def dense() -> ImportanceMatrix:
    random = np.random.default_rng(0)
    names = [f"blk.{layer}.{name}.weight" for layer in range(N_LAYERS) for name in MATRICES] + ["output.weight"]
    return ImportanceMatrix(
        {name: random.random((1, 8)) * 9 for name in names}, {name: np.array([9]) for name in names}
    )


def mixture(uncovered: dict[int, list[int]]) -> ImportanceMatrix:
    sums, counts = {}, {}
    for layer in range(N_LAYERS):
        reached = np.arange(N_EXPERTS) + 3
        reached[uncovered.get(layer, [])] = 0
        for name in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            key = f"blk.{layer}.{name}.weight"
            counts[key], sums[key] = reached, np.where(reached[:, None] > 0, np.ones((N_EXPERTS, 4)), 0.0)
    return ImportanceMatrix(sums, counts)


def super_weight(row: int, value: float, loss: float) -> SuperWeight:
    ratios = {"row_ratio": 90.0, "column_ratio": 80.0, "share": 0.9, "found_by": "spikes"}
    return SuperWeight(3, "blk.3.ffn_down.weight", 0, row, 7, value, loss, loss, **ratios)


def parse(figure: Figure) -> ElementTree.Element:
    """The figure as XML, which a browser would be more lenient about."""
    return ElementTree.fromstring(figure.svg())


def classes(figure: Figure, name: str) -> list[ElementTree.Element]:
    return [element for element in parse(figure).iter() if element.get("class") == name]


def texts(figure: Figure) -> str:
    return " ".join(element.text or "" for element in parse(figure).iter())


def test_every_matrix_has_a_cell_that_tells_its_value():
    matrix = dense()
    figure = importance_figures(matrix)[0]
    told = [t.text or "" for cell in classes(figure, "cell") if (t := cell.find("title")) is not None]
    for name in matrix.sums:
        if name != "output.weight":
            assert f"{name}: {short(float(matrix.columns(name).mean()))}" in told
    assert len(told) == N_LAYERS * len(MATRICES)
    assert "Outside of the layers: output.weight" in texts(figure)
    for word in ("attention", "MLP", "gate", "down"):
        assert word in texts(figure)


def test_the_more_important_is_the_stronger():
    cells = [cell_of(f"blk.{i}.ffn_up.weight", 10.0**i) for i in range(4)]
    figure = by_layer_and_role("t", "d", [cell for cell in cells if cell])
    opacities = [float(c.get("fill-opacity") or 0) for c in classes(figure, "cell") if c.find("title") is not None]
    assert opacities == sorted(opacities) and opacities[0] > 0 and opacities[-1] == 1
    steps = np.diff(opacities)
    assert steps == pytest.approx(steps[0], abs=0.011)


def test_super_weights_are_ringed_and_named():
    found = [super_weight(5, -4.5, 0.75), super_weight(6, 2.0, 0.1)]
    figure = importance_figures(dense(), found)[0]
    (ring,) = classes(figure, "mark")  # both in one cell
    cell = next(c for c in classes(figure, "cell") if (t := c.find("title")) is not None and "blk.3.ffn_down" in t.text)
    for axis, size, center in (("x", "width", "cx"), ("y", "height", "cy")):
        low, extent = float(cell.get(axis)), float(cell.get(size))
        assert low <= float(ring.get(center)) <= low + extent
    assert "blk.3.ffn_down.weight [5, 7] = -4.5; loss when removed +0.75" in texts(figure)
    assert "[6, 7] = 2" in texts(figure)


def test_uncovered_experts_are_filled_and_counted():
    figure = coverage_figure(mixture({1: [0, 4], 3: [2]}))
    told = [cell.find("title").text for cell in classes(figure, "missing")]
    assert told == [f"layer {a}, expert {b}: 0 tokens" for a, b in ((1, 0), (1, 4), (3, 2))]
    assert "Reached by no token: 3 of 30 (layer/expert: 1/0, 1/4, 3/2)." in texts(figure)
    covered = coverage_figure(mixture({}))
    assert not classes(covered, "missing") and "Every one of 30 experts was reached" in texts(covered)
    assert coverage_figure(dense()) is None


def test_sensitivity_is_drawn_for_a_format_that_all_can_have():
    losses = {
        f"blk.{layer}.{name}.weight": {"Q2_K": 0.1 * (layer + 1), "Q4_K": 0.01 * (layer + 1), "Q8_0": 1e-5}
        for layer in range(N_LAYERS)
        for name in MATRICES
    }
    del losses["blk.0.attn_q.weight"]["Q2_K"]
    by_role, by_layer = sensitivity_figures(losses)
    assert "Q4_K" in by_role.title
    columns = [column.find("title").text for column in classes(by_layer, "column")]
    assert columns == [f"layer {i}: {short(7 * 0.01 * (i + 1))}" for i in range(N_LAYERS)]


@pytest.mark.parametrize("n_layers", [1, 30, 126])
@pytest.mark.parametrize("n_columns", [1, 7, 256])
def test_heat_maps_of_any_size_stay_inside_of_their_figure(n_layers, n_columns):
    rows = [(str(i), [float(i + j) for j in range(n_columns)]) for i in range(n_layers)]
    grid = Grid([str(j) for j in range(n_columns)], rows)
    figure = heat_map("t", "d", grid, Scale.of([0.0, 9.0]), notes=["word " * 60])
    assert len(classes(figure, "cell")) >= n_layers * n_columns
    for element in parse(figure).iter():
        if element.tag.endswith("rect"):
            assert float(element.get("x")) + float(element.get("width")) <= 380
        if element.tag.endswith(("rect", "text")):
            assert 0 <= float(element.get("y")) <= figure.height


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [5.0], [1e-9, 3.0], [math.pi] * 80])
def test_charts_of_any_values(values):
    for logarithmic in (False, True):
        figure = columns_chart("t", "d", values, text=short, logarithmic=logarithmic)
        heights = [float(column.get("height")) for column in classes(figure, "column")]
        assert len(heights) == len(values) and all(0 <= h <= 110.1 for h in heights)
    figure = bars("t", "d", [(f"row {i}", value, short(value)) for i, value in enumerate(values)], highlighted=0)
    assert len(classes(figure, "column")) == 1


def test_names_cannot_break_out_of_the_figure():
    figure = bars("<script>", 'a"b', [("</svg><b>", 1.0, "&")])
    assert "<script>" not in figure.svg() and "</svg><b>" not in figure.svg()
    assert parse(figure).get("aria-label") == '<script>. a"b'


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1, "1"),
        (12.34, "12.3"),
        (0.012345, "0.0123"),
        (123456, "1.2e5"),
        (99999, "99999"),
        (3.2e-7, "3.2e-7"),
        (100.4, "100"),
        (-4.5, "-4.5"),
    ],
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_inspect_plots_what_there_is(tiny, tmp_path):
    def inspect(*arguments: object):
        return CliRunner().invoke(main, ["inspect", *map(str, arguments)])

    save_imatrix(tmp_path / "i.gguf", mixture({2: [1]}))
    done = inspect(tmp_path / "i.gguf", "--plot", tmp_path / "i.svg")
    assert done.exit_code == 0 and done.stdout.strip() == str(tmp_path / "i.svg"), done.stderr
    root = ElementTree.parse(tmp_path / "i.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in (tmp_path / "i.svg").read_text()

    arguments = ["--profile", "uniform-8bit", "--judge", "off", "--output", tmp_path / "m.gguf", tiny("llama-256")]
    assert CliRunner().invoke(main, [str(a) for a in arguments]).exit_code == 0
    done = inspect(tmp_path / "m.gguf", "--plot", tmp_path / "m.html")
    assert done.exit_code == 0, done.stderr
    page = (tmp_path / "m.html").read_text()
    assert "blk.0.attn_q.weight: Q8_0, 8.5 bits" in page and page.startswith("<!doctype html>")

    refused = inspect(tmp_path / "i.gguf", "--plot", tmp_path / "i.png")
    assert refused.exit_code == 1 and ".svg or .html" in refused.stderr
    nothing = ImportanceMatrix({"odd": np.ones((1, 4))}, {"odd": np.array([1])})
    save_imatrix(tmp_path / "n.gguf", nothing)
    refused = inspect(tmp_path / "n.gguf", "--plot", tmp_path / "n.svg")
    assert refused.exit_code == 1 and "nothing to draw" in refused.stderr


def test_every_architectures_matrices_have_a_place():
    for name, role in (("attn_qkv", Role.ATTENTION_QKV), ("ffn_down_exps", Role.EXPERT_DOWN), ("output", Role.OUTPUT)):
        prefix = "" if name == "output" else "blk.12."
        cell = cell_of(f"{prefix}{name}.weight", 1.0)
        assert cell is not None and cell.role is role and cell.layer == (None if name == "output" else 12)
    assert cell_of("blk.0.unheard_of.weight", 1.0) is None


def test_a_picture_file_is_whole_xml():
    text = svg_file([bars("a", "b", [("c", 1.0, "d")]), columns_chart("e", "f", [1.0, 2.0], text=short)])
    assert len(ElementTree.fromstring(text)) == 5  # title, style, background, two figures
    json.dumps(text)
