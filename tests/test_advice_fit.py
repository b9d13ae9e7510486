"""The constants of `bitwright advise` are what its measurements give, and no measurement is beyond what is possible."""

import csv
from pathlib import Path

import pytest

from bitwright.profiles.advice.efficiency import measured_groups
from scripts.advice.fit import OUT, single, table
from scripts.advice.points import DATA, kernel_points, measured_points, models, rows_of


def test_the_constants_are_those_that_the_measurements_give():
    assert OUT.read_text() == table()


def test_no_speed_of_one_text_is_above_the_ceiling():
    points = single(measured_points())
    assert len(points) == 266
    assert [point for point in [*points, *kernel_points()] if point.tokens_per_s > point.ceiling] == []


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
