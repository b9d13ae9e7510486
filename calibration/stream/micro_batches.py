"""How many samples go through a layer at once, and which."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

# At most so many tokens: on a CPU few, so that a layer's activations stay in the cache; on a GPU many.
_TOKENS = {"cpu": 512, "cuda": 16384, "mps": 2048}
# Of a GPU's free memory, what a micro-batch may take. The rest is for the next layer's weights, which load meanwhile,
# and for what the allocator wastes.
_SHARE_OF_FREE = 0.5
N_GROUPS = 16
"""Groups of consecutive samples whose sums are added up in their order."""
# Of so many samples, which ones are held out of what is summed.
_HELD_OUT_OF, _HELD_OUT = 32, (1, 3)


def is_held_out(sample: int) -> bool:
    """Two of 32 samples, the second and the third, by their place in the text alone."""
    return _HELD_OUT[0] <= sample % _HELD_OUT_OF < _HELD_OUT[1]


@dataclass(frozen=True)
class Excerpt:
    """Consecutive samples of a text: `n_samples` of its `n_text`, from the number `first` on.

    A sum over a text is the sum over its N_GROUPS groups of consecutive samples, added up in their order; so it is the
    same, to the bit, whichever machines have summed which groups.
    """

    first: int
    n_samples: int
    n_text: int

    @classmethod
    def whole(cls, n_text: int) -> "Excerpt":
        return cls(0, n_text, n_text)

    @classmethod
    def of_groups(cls, groups: range, n_text: int) -> "Excerpt":
        first, last = (n_text * group // N_GROUPS for group in (groups.start, groups.stop))
        return cls(first, last - first, n_text)

    @cached_property
    def _starts(self) -> list[int]:
        return [self.n_text * group // N_GROUPS for group in range(N_GROUPS)]

    def group_of(self, sample: int) -> int:
        """The group of a sample, which goes by its number in the text."""
        return bisect_right(self._starts, sample) - 1

    def cuts(self) -> list[int]:
        """Where a micro-batch ends, whatever its size: at the end of a group, and between samples of which one is held
        out and the other is not. Counted from the first sample of the excerpt."""
        numbers = range(self.first + 1, self.first + self.n_samples)
        inner = (n for n in numbers if n in self._starts or is_held_out(n) != is_held_out(n - 1))
        return sorted({0, self.n_samples, *(n - self.first for n in inner)})


def spans_of_samples(n_samples: int, batch: int, excerpt: Excerpt | None = None) -> list[tuple[int, int]]:
    """(first sample, the one after the last) of micro-batches of `batch` samples or fewer.

    excerpt: what the samples are of a text whose sums are made of groups; None for samples of no matter which.
    """
    cuts = [0, n_samples] if excerpt is None else excerpt.cuts()
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
