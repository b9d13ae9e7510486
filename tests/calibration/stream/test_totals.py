"""Sums on a GPU without float64, as exact as with it."""

import numpy as np
import torch

from bitwright.calibration.stream.device.totals import Pair
from bitwright.calibration.stream.device.transfer import to_host


def test_a_pair_of_float32_is_as_exact_as_float64():
    parts = np.exp(np.random.default_rng(0).normal(0, 4, (3000, 2, 5))).astype(np.float32)
    sums, exact = [Pair((2, 5), torch.device("cpu")) for _ in range(3)], parts.astype(np.float64).sum(0)
    for i, part in enumerate(parts):
        for row in (0, 1):
            sums[i % 3].add(torch.from_numpy(part[row]), row)
    sums[0].merge(sums[1])
    sums[0].merge(sums[2])
    high, low = to_host([sums[0].high, sums[0].low])
    np.testing.assert_allclose(high.astype(np.float64) + low, exact, rtol=1e-12)
    assert np.abs(parts.sum(0) - exact).max() > 1e-9 * exact.max()  # float32 alone would not do


def test_what_comes_over_together_is_what_was_there():
    tensors = [torch.arange(6.0).reshape(2, 3), torch.tensor([7, 8]), torch.empty(0, 4), torch.tensor(9.0)]
    for tensor, array in zip(tensors, to_host(tensors), strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype
    assert to_host([]) == []
