"""How many samples go through a layer at once, and which."""

from collections.abc import Callable
from itertools import pairwise

import torch

# At most so many tokens: on a CPU few, so that a layer's activations stay in the cache; on a GPU many.
_TOKENS = {"cpu": 512, "cuda": 16384, "mps": 2048}
# Of a GPU's free memory, what a micro-batch may take. The rest is for the next layer's weights, which load meanwhile,
# and for what the allocator wastes.
_SHARE_OF_FREE = 0.5
# Of so many samples, which ones are held out of what is summed.
_HELD_OUT_OF, _HELD_OUT = 32, (1, 3)


def is_held_out(sample: int) -> bool:
    """Two of 32 samples, the second and the third, by their place in the text alone."""
    return _HELD_OUT[0] <= sample % _HELD_OUT_OF < _HELD_OUT[1]


def spans_of_samples(n_samples: int, batch: int, held_out_apart: bool) -> list[tuple[int, int]]:
    """(first sample, the one after the last) of micro-batches of `batch` samples or fewer.

    held_out_apart: none has samples that are held out beside others.
    """
    cuts = [0, n_samples]
    if held_out_apart:
        cuts = sorted({0, n_samples, *(s for s in range(1, n_samples) if is_held_out(s) != is_held_out(s - 1))})
    return [(start, min(start + batch, last)) for first, last in pairwise(cuts) for start in range(first, last, batch)]


def most_samples(device: torch.device, sequence_length: int) -> int:
    """Samples of a micro-batch where memory does not limit them."""
    return max(1, _TOKENS[device.type] // sequence_length)


def fitting_samples(device: torch.device, most: int, run_one: Callable[[], object]) -> int:
    """Samples of a micro-batch: `most`, on a GPU no more than its free memory holds.

    run_one: takes one sample through the layer; what that takes is measured. Elsewhere it is not called, and what a
    layer computes depends on nothing but its input.
    """
    if device.type != "cuda" or most == 1:
        return most
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_one()
    one = torch.cuda.max_memory_allocated(device) - before
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + unused
    return max(1, min(most, int(_SHARE_OF_FREE * free) // max(one, 1)))
