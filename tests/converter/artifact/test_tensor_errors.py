"""The errors that verification measures, and how many super weights come out right: the same of either artifact."""

from dataclasses import replace

import numpy as np
import pytest

from bitwright.calibration.control import silent
from bitwright.calibration.statistics.super_weights import SuperWeight, SuperWeightReport
from bitwright.converter.artifact.super_weights import DecodedWeight, coverage
from bitwright.converter.artifact.tensor_errors import DecodedTensor, Part, TensorError, measure_errors
from bitwright.formats.errors import ConvertError

SOURCE = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
IMPORTANCE = np.array([1.0, 3.0], np.float32)


def tensor(*parts: Part, name: str = "t") -> DecodedTensor:
    return DecodedTensor(name, "Q4_0", SOURCE.size, parts)


def test_errors_are_relative_to_the_squares_of_the_source():
    decoded = SOURCE + np.array([[1, 0], [0, 1]], np.float32)
    plain, weighted = Part(decoded, SOURCE), Part(decoded, SOURCE, IMPORTANCE)
    by_rows = [Part(decoded[i : i + 1], SOURCE[i : i + 1], IMPORTANCE) for i in range(2)]
    told: list[tuple[int, int]] = []
    errors = measure_errors(
        [tensor(plain), tensor(weighted), tensor(*by_rows)],
        "m.gguf",
        lambda stage, done, total, unit: told.append((done, total)),
    )
    assert errors[0] == TensorError("t", "Q4_0", 2 / 30, 2 / 30)
    assert errors[1] == errors[2] == TensorError("t", "Q4_0", 2 / 30, 4 / 70)
    assert told == [(16, 48), (32, 48), (48, 48)]


def test_zeros_are_as_far_as_anything_may_be():
    zeros = np.zeros_like(SOURCE)
    assert measure_errors([tensor(Part(zeros, SOURCE))], "m", silent)[0].weighted_error == 1
    assert measure_errors([tensor(Part(zeros, zeros))], "m", silent)[0].relative_error == 0
    for decoded, what in ((-SOURCE, "further from the source than zeros"), (SOURCE * np.nan, "not finite")):
        with pytest.raises(ConvertError, match=what) as raised:
            measure_errors([tensor(Part(SOURCE, SOURCE)), tensor(Part(decoded, SOURCE), name="bad")], "m", silent)
        assert "the tensor bad" in raised.value.what and raised.value.where == "m"


def test_super_weights_count_as_kept_within_the_tolerance():
    weight = SuperWeight(0, "blk.0.ffn_down.weight", 0, 1, 2, -4.0, 1.0, 1.0, 9.0, 9.0, 1.0, "spikes")
    weights, criteria = (weight, replace(weight, row=7)), ("spikes",)
    report = SuperWeightReport(weights, (), (), 0, (), criteria, 10.0, 0.01, 1, 1, 8, None, "some", "0" * 64, 1, 8)

    def decode(weight: SuperWeight) -> DecodedWeight:
        value = {1: -4.1, 7: -5.0}[weight.row]
        return DecodedWeight(weight.tensor, weight.matrix, weight.row, weight.column, weight.value, value)

    data = coverage(report, decode, tolerance=0.05)
    assert data is not None and (data["confirmed"], data["within"], data["tolerance"]) == (2, 1, 0.05)
    assert [row["within"] for row in data["weights"]] == [True, False]
    assert data["weights"][0]["relative_error"] == pytest.approx(0.025)
    assert coverage(None, lambda _: pytest.fail("there is nothing to decode"), 0.05) is None
