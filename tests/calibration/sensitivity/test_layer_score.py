"""The blend of magnitudes by hand-made factors."""

import numpy as np
import pytest

from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.calibration.sensitivity.layer_score import ScoreWeights, layer_scores
from bitwright.formats.errors import ConvertError

LAYERS = {"blk.0.a": 0, "blk.0.b": 0, "blk.1.a": 1, "blk.2.a": 2}


def factors(gradients, variances, magnitudes) -> FisherFactors:
    """Of matrices with 2 rows and 2 columns, blk.0.b with three times as many rows; and of an embedding."""
    names = [*LAYERS, "token_embd.weight"]
    rows = {name: np.ones((1, 6 if name == "blk.0.b" else 2)) for name in names}
    columns = {name: np.ones((1, 2)) for name in names}
    scalars = [dict(zip(names, values, strict=True)) for values in (gradients, variances, magnitudes)]
    return FisherFactors(rows, columns, *scalars, None, None, "text", "0" * 64, 1, 2, "sampled")


HAND_MADE = factors([2.0, 6.0, 10.0, 5.0, 99.0], [4.0, 8.0, 0.0, 14.0, 99.0], [1.0, 1.0, 2.0, 4.0, 99.0])


def test_magnitudes_are_shares_of_the_largest_layers_and_blended():
    scores = layer_scores(HAND_MADE, LAYERS)
    gradient = np.array([((4 + 3 * 36) / 4) ** 0.5, 10, 5]) / 10
    variance = np.array([7, 0, 14]) / 14
    magnitude = np.array([1, 2, 4]) / 4
    assert list(scores) == [0, 1, 2]
    np.testing.assert_allclose(list(scores.values()), 0.5 * gradient + 0.3 * variance + 0.2 * magnitude)


@pytest.mark.parametrize(("weights", "best"), [((1, 0, 0), 1), ((0, 2, 0), 2), ((0, 0, 0.1), 2)])
def test_weights_are_proportions(weights, best):
    scores = layer_scores(HAND_MADE, LAYERS, ScoreWeights(*weights))
    assert max(scores, key=lambda layer: scores[layer]) == best
    assert scores[best] == pytest.approx(1)


def test_magnitude_that_is_zero_in_every_layer_counts_for_nothing():
    scores = layer_scores(factors([0.0] * 5, [0.0] * 5, [1.0] * 5), LAYERS)
    assert set(scores.values()) == {0.2}


def test_layers_without_factors_have_no_score():
    assert layer_scores(HAND_MADE, {"blk.7.a": 7}) == {}


@pytest.mark.parametrize("weights", [(-0.1, 1, 1), (0, 0, 0), (np.nan, 1, 1), (np.inf, 1, 1)])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(ConvertError, match="no shares of a score"):
        ScoreWeights(*weights)
