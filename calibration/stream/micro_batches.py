"""How many samples go through a layer at once, and which."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch

from bitwright.calibration.stream.device.memory import MicroBatch

# At most so many tokens: on a CPU few, so that a layer's activations stay in the cache; on a GPU many, and some
# micro-batches in flight, so that it computes while hidden states are read, hashed and written.
_TOKENS = {"cpu": 512, "cuda": 8192, "mps": 2048}
_IN_FLIGHT = {"cuda": 4, "mps": 1}
N_GROUPS = 16
"""Groups of consecutive samples whose sums are added up in their order."""
# Of so many samples, which ones are held out of what is summed.
_HELD_OUT_OF, _HELD_OUT = 32, (1, 3)


@runtime_checkable
class OrderedObserver(Protocol):
    """An observer whose statistics depend on which samples are taken together, such as smoothed ranges: on every device
    it is shown those micro-batches that a CPU takes."""

    one_group_at_once: bool


def groups_of_part(index: int, count: int) -> range:
    """Of part `index` of `count`, counted from 1."""
    return range(N_GROUPS * (index - 1) // count, N_GROUPS * index // count)


def is_held_out(sample: int) -> bool:
    """Two of 32 samples, the second and the third, by their place in the text alone."""
    return _HELD_OUT[0] <= sample % _HELD_OUT_OF < _HELD_OUT[1]


def samples_of_a_group(sequence_length: int) -> int:
    """Samples that a CPU takes at once. Whatever is chosen by place among them is the same on every device."""
    return max(1, _TOKENS["cpu"] // sequence_length)


def largest_micro_batch(device: torch.device, sequence_length: int, observer: object = None) -> MicroBatch:
    """The micro-batch where memory does not limit it."""
    group = samples_of_a_group(sequence_length)
    if device.type == "cpu" or isinstance(observer, OrderedObserver):
        return MicroBatch(group, group)
    samples = max(1, _TOKENS[device.type] // sequence_length)
    return MicroBatch(max(group, samples - samples % group), group)


def micro_batches_at_once(device: torch.device, threads: int) -> int:
    """threads: of the CPU."""
    return threads if device.type == "cpu" else _IN_FLIGHT[device.type]


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

    @property
    def groups(self) -> range:
        """The groups that it is made of."""
        starts = [*self._starts, self.n_text]
        return range(bisect_left(starts, self.first), bisect_left(starts, self.first + self.n_samples))

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


def spans_of_samples(
    n_samples: int, batch: int, excerpt: Excerpt | None = None, first: int = 0
) -> list[tuple[int, int]]:
    """(first sample, the one after the last) of micro-batches of `batch` samples or fewer, from the first sample on.

    excerpt: what the samples are of a text whose sums are made of groups; None for samples of no matter which.
    """
    cuts = [] if excerpt is None else excerpt.cuts()
    cuts = [first, *(cut for cut in cuts if first < cut < n_samples), n_samples]
    return [(start, min(start + batch, last)) for begin, last in pairwise(cuts) for start in range(begin, last, batch)]
