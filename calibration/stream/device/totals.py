"""Statistics that grow by micro-batches, where these are computed: on a GPU nothing of them waits for the host.

On a CPU sums are float64. A GPU may have no float64 (Metal), or little of it: there a sum is two float32 numbers, the
rounded sum and what rounding has left out, which together are as exact. `settle` brings all of a layer over at once.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch

from bitwright.calibration.stream.device.transfer import to_host

Key = TypeVar("Key")


class Pair:
    """A sum on a GPU. high, low: float32 of any shape, whose exact sum is meant."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        self.high, self.low = torch.zeros(shape, device=device), torch.zeros(shape, device=device)

    def add(self, values: torch.Tensor, place: Any = ...) -> None:
        """values: float32, of the shape of that place. What the addition rounds off is found exactly (Knuth's TwoSum)
        and kept."""
        high, low = self.high[place], self.low[place]
        total = high + values
        of_values = total - high
        low += (high - (total - of_values)) + (values - of_values)
        high.copy_(total)

    def merge(self, other: "Pair") -> None:
        self.add(other.high)
        self.low += other.low

    def move_to(self, device: torch.device) -> None:
        self.high, self.low = self.high.to(device), self.low.to(device)


class Totals(Generic[Key]):
    """Sums by name. host: of what has been settled or was never elsewhere; dtype: of these."""

    def __init__(self, dtype: type = np.float64) -> None:
        self.host: dict[Key, np.ndarray] = {}
        self.dtype = dtype
        self._pairs: dict[Key, Pair] = {}

    def add(self, key: Key, shape: tuple[int, ...], place: Any, values: torch.Tensor | float) -> None:
        """Values to that place of an array of this shape; a tensor is float32 or of integers."""
        if isinstance(values, torch.Tensor) and values.device.type != "cpu":
            if key not in self._pairs:
                self._pairs[key] = Pair(shape, values.device)
            self._pairs[key].add(values, place)
            return
        if key not in self.host:
            self.host[key] = np.zeros(shape, self.dtype)
        self.host[key][place] += values.numpy() if isinstance(values, torch.Tensor) else values

    def merge(self, other: Self) -> None:
        """Those of the next micro-batch, which are not used again."""
        for key, values in other.host.items():
            self._add_host(key, values)
        for key, pair in other._pairs.items():
            if key in self._pairs:
                self._pairs[key].merge(pair)
            else:
                self._pairs[key] = pair

    def move_to(self, device: torch.device) -> None:
        """What is on another GPU goes to this one."""
        for pair in self._pairs.values():
            pair.move_to(device)

    def settle(self) -> dict[Key, np.ndarray]:
        """Bring over what is on a GPU; returns that."""
        return settle_all([self])[0]

    def take_over(self, parts: Iterator[np.ndarray]) -> dict[Key, np.ndarray]:
        """parts: of every pair in order, high and low, as they were brought over."""
        brought = {key: next(parts).astype(np.float64) + next(parts) for key in self._pairs}
        self._pairs.clear()
        for key, values in brought.items():
            self._add_host(key, values)
        return brought

    def pairs(self) -> list[torch.Tensor]:
        """What is on a GPU."""
        return [part for pair in self._pairs.values() for part in (pair.high, pair.low)]

    def _add_host(self, key: Key, values: np.ndarray) -> None:
        if key in self.host:
            self.host[key] += values
        else:
            self.host[key] = values


def settle_all(totals: Sequence[Totals[Key]]) -> list[dict[Key, np.ndarray]]:
    """Bring over what several have on a GPU, in one copy; returns that of each."""
    parts = iter(to_host([part for each in totals for part in each.pairs()]))
    return [each.take_over(parts) for each in totals]


class Maxima(Generic[Key]):
    """Largest values by name, float32, none below 0; as Totals in everything else."""

    def __init__(self) -> None:
        self.host: dict[Key, np.ndarray] = {}
        self._there: dict[Key, torch.Tensor] = {}

    def add(self, key: Key, shape: tuple[int, ...], place: Any, values: torch.Tensor) -> None:
        if values.device.type != "cpu":
            if key not in self._there:
                self._there[key] = torch.zeros(shape, device=values.device)
            into = self._there[key][place]
            into.copy_(torch.maximum(into, values))
            return
        if key not in self.host:
            self.host[key] = np.zeros(shape, np.float32)
        self.host[key][place] = np.maximum(self.host[key][place], values.numpy())

    def merge(self, other: Self) -> None:
        for key, values in other.host.items():
            self._raise_host(key, values)
        for key, there in other._there.items():
            self._there[key] = torch.maximum(self._there[key], there) if key in self._there else there

    def move_to(self, device: torch.device) -> None:
        """As that of Totals."""
        self._there = {key: there.to(device) for key, there in self._there.items()}

    def settle(self) -> dict[Key, np.ndarray]:
        keys = list(self._there)
        brought = dict(zip(keys, to_host(list(self._there.values())), strict=True))
        self._there.clear()
        for key, values in brought.items():
            self._raise_host(key, values)
        return brought

    def _raise_host(self, key: Key, values: np.ndarray) -> None:
        self.host[key] = np.maximum(self.host[key], values) if key in self.host else values
