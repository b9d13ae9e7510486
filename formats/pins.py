"""Pinned weights: single weights of a matrix that must come out within a stated error, whatever the codec.

A few weights of some models ("super weights") matter more than all their neighbours together. A pin says how far the
decoded value of such a weight may be from the true one. The codec itself knows nothing of pins: where its block misses
one, that block alone is encoded again under an importance of its own, in which the pinned column is raised step by
step, and the smallest raise that suffices is taken, because it costs the neighbours least. Such blocks are few, so
they get the effort `best` always. Blocks without pins, and blocks that meet theirs anyway, keep their bytes.

Weights of whole rows need no such help, and codecs take none. A codec encodes every row for itself, and a factor over
all of a row's squared errors moves no optimum. Only NVFP4's second-level scale sees several rows, and it is chosen by
the largest weight alone; with one, pins are for the rows divided by it, as the blocks are.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bitwright.formats.block_format import BlockFormat
from bitwright.formats.choices import Effort

RAISE = 4.0
MOST_RAISES = 14
"""RAISE**MOST_RAISES is 2.7e8: what is less important than the pin by more, encoders no longer see."""


@dataclass(frozen=True)
class Pin:
    """The weight at a row and column; tolerance: the largest error allowed, as a share of the weight's magnitude."""

    row: int
    column: int
    tolerance: float


@dataclass(frozen=True)
class PinOutcome:
    """What became of a pin: the weight's value and what the encoded block decodes to."""

    pin: Pin
    value: float
    decoded: float

    @property
    def relative_error(self) -> float:
        """Of a weight of zero, infinite unless it stays zero."""
        difference = abs(self.decoded - self.value)
        return difference / abs(self.value) if self.value else (np.inf if difference else 0.0)

    @property
    def within(self) -> bool:
        return self.relative_error <= self.pin.tolerance


def encode_pinned(
    block_format: BlockFormat,
    rows: np.ndarray,
    importance: np.ndarray | None,
    effort: Effort,
    pins: Sequence[Pin],
) -> tuple[np.ndarray, list[PinOutcome]]:
    """As block_format.encode, with these weights within their tolerances where the format's grid can do that.

    Returns the data, uint8 [n_rows, row_bytes], and the outcome of every pin in the order of the pins. Where no raise
    suffices, the block is the closest one found: the fewest pins missed, then the smallest error for its tolerance.
    Raises as block_format.encode does, and ValueError for a pin outside of the rows or without a positive tolerance.
    """
    _check(pins, rows)
    data = block_format.encode(rows, importance, effort)
    pins_of_block: dict[tuple[int, int], list[Pin]] = defaultdict(list)
    for pin in pins:
        pins_of_block[pin.row, pin.column // block_format.block_size].append(pin)
    outcomes: dict[Pin, PinOutcome] = {}
    for (row, block), members in pins_of_block.items():
        first = block * block_format.block_size
        columns = slice(first, first + block_format.block_size)
        place = slice(block * block_format.type_size, (block + 1) * block_format.type_size)
        weights = rows[row : row + 1, columns]
        encoded = data[row : row + 1, place]
        if any(not outcome.within for outcome in _outcomes(block_format, weights, encoded, members)):
            block_importance = np.ones(block_format.block_size) if importance is None else importance[columns]
            encoded = _raise_until_within(block_format, weights, block_importance, encoded, members)
            data[row, place] = encoded[0]
        outcomes |= zip(members, _outcomes(block_format, weights, encoded, members), strict=True)
    return data, [outcomes[pin] for pin in pins]


def _check(pins: Sequence[Pin], rows: np.ndarray) -> None:
    for pin in pins:
        if not (0 <= pin.row < rows.shape[0] and 0 <= pin.column < rows.shape[1]):
            raise ValueError(f"{pin} is outside of {rows.shape[0]} rows of {rows.shape[1]} columns")
        if not pin.tolerance > 0:
            raise ValueError(f"{pin} needs a positive tolerance: a grid has few points")


def _outcomes(
    block_format: BlockFormat, weights: np.ndarray, encoded: np.ndarray, pins: Sequence[Pin]
) -> list[PinOutcome]:
    decoded = block_format.decode(encoded)[0]
    places = [pin.column % block_format.block_size for pin in pins]
    return [PinOutcome(pin, float(weights[0, j]), float(decoded[j])) for pin, j in zip(pins, places, strict=True)]


def _raise_until_within(
    block_format: BlockFormat,
    weights: np.ndarray,
    importance: np.ndarray,
    encoded: np.ndarray,
    pins: Sequence[Pin],
) -> np.ndarray:
    """The block, uint8 [1, type_size], with the smallest raises that bring all its pins within, or the closest one.

    weights: float32 [1, block_size]; encoded: the block without raises, which misses a pin.
    """
    base, level = _relative(importance)
    n_raises = dict.fromkeys((pin.column % block_format.block_size for pin in pins), 0)
    outcomes = _outcomes(block_format, weights, encoded, pins)
    closest, least = encoded, _distance(outcomes)
    while True:
        missed = {o.pin.column % block_format.block_size for o in outcomes if not o.within}
        missed = {column for column in missed if n_raises[column] < MOST_RAISES}
        if not missed:
            return closest
        raised = base.copy()
        for column, n in n_raises.items():
            n_raises[column] = n + (column in missed)
            if n_raises[column]:
                raised[column] = max(base[column], level) * RAISE ** n_raises[column]
        encoded = block_format.encode(weights, raised.astype(np.float32), "best")
        outcomes = _outcomes(block_format, weights, encoded, pins)
        if _distance(outcomes) < least:
            closest, least = encoded, _distance(outcomes)


def _relative(importance: np.ndarray) -> tuple[np.ndarray, float]:
    """A block's importance, float64, its largest being 1 and ones where nothing is important, and its mean: what raises
    start from, so that they work on a column of no importance too."""
    largest = float(importance.max())
    relative = importance.astype(np.float64) / largest if largest > 0 else np.ones(importance.size)
    return relative, float(relative.mean())


def _distance(outcomes: Sequence[PinOutcome]) -> tuple[int, float]:
    return (
        sum(not outcome.within for outcome in outcomes),
        max(outcome.relative_error / outcome.pin.tolerance for outcome in outcomes),
    )
