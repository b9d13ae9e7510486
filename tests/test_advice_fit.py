"""The constants of `bitwright advise` are what its measurements give, and no measurement is beyond what is possible."""

import csv
from pathlib import Path

import pytest

from bitwright.profiles.advice.efficiency import measured_groups
from scripts.advice.fit import OUT, single, table
from scripts.advice.points import DATA, kernel_points, measured_points, models, rows_of


def test_the_constants_are_those_that_the_measurements_give():
    assert OUT.read_text() == table()


def test_no_speed_is_above_the_ceiling():
    points = single(measured_points())
    assert len(points) == 266
    decoding = [point for point in measured_points() if point.kind == "tg"]
    assert sum(point.batch > 1 for point in decoding) == 16
    assert [point for point in [*decoding, *kernel_points()] if point.tokens_per_s > point.ceiling] == []


def test_tokens_of_one_text_read_its_cache_once():
    (checked,) = [point for point in measured_points() if point.test.endswith("ub2")]
    (alone,) = [p for p in measured_points() if (p.hardware, p.quant, p.test) == ("RTX 4090", "Q4_0", "tg@d32768")]
    # The cache is half of what is read: a second text would read it once more, a second token does not.
    assert checked.n_bytes < 1.01 * alone.n_bytes and checked.batch == 2


def test_dimensions_make_the_models_that_are_named():
    with Path(DATA / "measured.csv").open(newline="") as file:
        billions = {row["model"]: float(row["params_b"]) for row in csv.DictReader(file)}
    assert set(billions) == set(models())
    for name, stated in billions.items():
        counted = sum(row.n_weights for row in rows_of(models()[name], 1e9, "F16")) / 1e9
        assert counted == pytest.approx(stated, rel=0.01), name


def test_every_group_that_is_predicted_was_measured():
    assert {"cuda-gddr", "cuda-hbm", "metal", "rocm", "cpu", "vllm-hbm-bf16", "vllm-gddr-bf16"} <= set(
        measured_groups()
    )
    for group in measured_groups().values():
        assert 0.5 <= group.bandwidth_share < 1 and group.low < 1 < group.high
