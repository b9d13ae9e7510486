"""The parts of a state are found again, whatever their sizes have in common."""

import pytest
import torch

from bitwright.calibration.stream.anatomy.state import HIDDEN, pack, shared_name


@pytest.mark.parametrize("n_samples", [1, 2, 3, 16])
def test_keys_and_values_of_as_many_heads_as_samples_are_no_stacked_states(n_samples: int):
    """A layout that one micro-batch has shown serves those of any other number of samples."""
    n_heads, n_positions = 2, 16

    def parts(count: int) -> dict[str, torch.Tensor]:
        keys = torch.randn(count, n_heads, n_positions, 8)
        return {HIDDEN: torch.randn(4, count, n_positions, 6), shared_name("full", 0): keys}

    _, layout = pack(parts(n_samples), n_samples, n_positions)
    others = parts(5)
    states, same = pack(others, 5, n_positions)
    assert same == layout
    for name, part in layout.unpack(states).items():
        torch.testing.assert_close(part, others[name])
