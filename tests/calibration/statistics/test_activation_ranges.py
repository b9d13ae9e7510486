"""Ranges of static scales: what they cut off, and that `mse` finds the least error that rounding the values themselves
shows."""

import numpy as np
import pytest
import torch

from bitwright.calibration.passes.activation_observer import InputObserver
from bitwright.calibration.statistics.activation_ranges import range_error, static_range
from bitwright.calibration.statistics.activations import MatrixInputs


def seen(values: np.ndarray, n_matrices: int = 1) -> MatrixInputs:
    """values: [n_batches, n_rows, n_columns], all of matrix 0."""
    observer = InputObserver(decay=0.5)
    for batch in values.astype(np.float32):
        part = observer.fresh(0)
        part.observe("m", 0, n_matrices, torch.from_numpy(batch), None)
        observer.merge(part)
    observer.to_arrays()  # the layer is done
    inputs = {field: of["m"] for field, of in observer.inputs.items()}
    unseen = inputs["counts"] == 0
    inputs["minima"][unseen] = inputs["maxima"][unseen] = inputs["ranges"][unseen] = 0
    return MatrixInputs(**inputs)


def heavy(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_t(3, (4, 100, 64)) + 0.3


def test_absmax_and_percentile_are_those_of_the_values():
    values = heavy().astype(np.float32)
    inputs = seen(values)
    assert static_range(inputs, method="absmax") == (-np.abs(values).max(), np.abs(values).max())
    assert static_range(inputs, method="absmax", symmetric=False) == (values.min(), values.max())
    low, high = static_range(inputs, method="percentile")
    assert high == -low == pytest.approx(np.quantile(np.abs(values), 0.999), rel=0.035)
    low, high = static_range(inputs, method="percentile", symmetric=False, percentile=98)
    assert (low, high) == (
        pytest.approx(np.quantile(values, 0.01), rel=0.05),
        pytest.approx(np.quantile(values, 0.99), rel=0.05),
    )


def test_averaged_range_is_smoothed_over_batches():
    values = heavy()
    ends = np.array([[batch.min(), batch.max()] for batch in values])
    smoothed = ends[0]
    for end in ends[1:]:
        smoothed = (smoothed + end) / 2
    found = static_range(seen(values), method="average", symmetric=False)
    np.testing.assert_allclose(found, smoothed, rtol=1e-6)


def int8_error(values, low, high) -> float:
    """Of really rounding them: symmetric, 255 steps."""
    step = (high - low) / 255
    return float(np.square(np.clip(np.rint(values / step), -127, 127) * step - values).mean())


def fp8_error(values, low, high) -> float:
    scaled = torch.from_numpy((values * 448 / high).clip(-448, 448)).float()
    rounded = scaled.to(torch.float8_e4m3fn).double().numpy() * high / 448
    return float(np.square(rounded - values).mean())


@pytest.mark.parametrize(("grid", "real"), [("int8", int8_error), ("fp8", fp8_error)])
def test_mse_finds_about_the_least_real_error(grid, real):
    values = heavy(3)
    inputs = seen(values)
    low, high = static_range(inputs, method="mse", grid=grid)
    found = real(values, low, high)
    assert range_error(inputs.values[0], low, high, grid) == pytest.approx(found, rel=0.1)
    tried = [real(values, -end, end) for end in np.abs(values).max() * np.exp2(-np.arange(0, 8, 0.05))]
    assert found <= 1.03 * min(tried)
    assert found <= min(real(values, *static_range(inputs, method=m)) for m in ("absmax", "percentile"))


def test_an_expert_without_tokens_has_the_range_of_all():
    inputs = seen(heavy(), n_matrices=3)
    for method in ("absmax", "percentile", "mse"):
        assert static_range(inputs, 2, method) == static_range(inputs, 0, method)


def test_an_expert_that_only_the_first_look_reached_has_the_range_of_all():
    """Of a smoothed model's experts a second look, at fewer tokens, may lack one."""
    inputs = seen(heavy(), n_matrices=2)
    inputs.counts[1], inputs.minima[1], inputs.maxima[1] = 5, -0.1, 0.1
    for method in ("average", "percentile", "mse"):
        assert static_range(inputs, 1, method) == static_range(inputs.together(), 0, method) != (0, 0)


def test_inputs_that_are_always_zero_have_no_range():
    inputs = seen(np.zeros((2, 10, 8)))
    for method in ("absmax", "percentile", "mse"):
        assert static_range(inputs, 0, method) == (0, 0)
