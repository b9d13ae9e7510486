"""What `auto` compares: outputs with the inputs rounded by row, or all under one stored scale."""

import numpy as np
import pytest
import torch

from bitwright.calibration.statistics.smoothing import Products, choose_alpha, output_error, rounded_as_one


def products(seed: int) -> list[Products]:
    """Inputs of which one token is 60 times as large as the others in a few channels."""
    random = np.random.default_rng(seed)
    rows = (random.normal(size=(96, 64)) * np.exp(random.normal(size=64))).astype(np.float32)
    rows[0, :4] *= 60
    weights = (random.normal(size=(48, 64)) * np.exp(0.5 * random.normal(size=64))).astype(np.float32)
    return [Products(rows, (weights,), np.abs(rows).max(0), np.abs(weights).max(0))]


@pytest.mark.parametrize("seed", range(5))
def test_auto_suits_the_scales_that_the_inputs_get(seed):
    given = products(seed)
    static, errors = choose_alpha(given, static=True)
    by_row, _ = choose_alpha(given)
    found = output_error(given, static, static=True)
    assert found == min(errors.values())
    assert found <= min(output_error(given, 0.5, static=True), output_error(given, by_row, static=True))
    assert output_error(given, by_row) <= output_error(given, static)


def test_the_two_measures_choose_differently_where_one_token_is_an_outlier():
    chosen = [(choose_alpha(products(seed))[0], choose_alpha(products(seed), static=True)[0]) for seed in range(5)]
    assert any(by_row != static for by_row, static in chosen)


def test_one_scale_has_256_steps_and_cuts_off_what_costs_less_than_it_spares():
    rows = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    rounded = rounded_as_one(rows, 1000.0)
    assert len(rounded.unique()) <= 256
    assert (rounded - rows).square().mean() < 1e-3 * rows.square().mean()
    assert not rounded_as_one(torch.zeros(4, 4), 0.0).any()
