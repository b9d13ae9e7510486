"""How many samples go through a layer at once, and which."""

from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch

from bitwright.calibration.stream.device.memory import MicroBatch

# At most so many tokens: on a CPU few, so that a layer's activations stay in the cache; on a GPU many, and some
# micro-batches in flight, so that it computes while hidden states are read, hashed and written.
_TOKENS = {"cpu": 512, "cuda": 8192, "mps": 2048}
_IN_FLIGHT = {"cuda": 4, "mps": 1}
# Of so many samples, which ones are held out of what is summed.
_HELD_OUT_OF, _HELD_OUT = 32, (1, 3)


@runtime_checkable
class OrderedObserver(Protocol):
    """An observer whose statistics depend on which samples are taken together, such as smoothed ranges: on every device
    it is shown those micro-batches that a CPU takes."""

    one_group_at_once: bool


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


def spans_of_samples(n_samples: int, batch: int, held_out_apart: bool, first: int = 0) -> list[tuple[int, int]]:
    """(first sample, the one after the last) of micro-batches of `batch` samples or fewer, from the first sample on.

    held_out_apart: none has samples that are held out beside others.
    """
    cuts = [first, n_samples]
    if held_out_apart:
        changes = (s for s in range(first + 1, n_samples) if is_held_out(s) != is_held_out(s - 1))
        cuts = sorted({first, n_samples, *changes})
    return [(start, min(start + batch, last)) for begin, last in pairwise(cuts) for start in range(begin, last, batch)]
