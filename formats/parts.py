"""Blocks taken apart into the numbers that they store, and put together again.

What searches a whole row at once, such as feedback/choose.py, lets a format's own encoder choose first, takes its
blocks apart, changes the numbers and closes the blocks again. So it needs no format's bit layout, and two descriptions
serve all formats: a scale times a level, or a scale times a point of a codebook.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

ONE_VALUE = np.ones(1, np.float32)
NO_MINIMUM = np.zeros(1, np.float32)


class ScalarParts(NamedTuple):
    """A weight is units[0] * table[scales[0]] * level - units[1] * minima_table[scales[1]].

    units: float32 [n_blocks, 2], values of float16: d, and dmin (0 in formats without a minimum).
    scales: int16 [n_blocks, 2, n_sub], places of a sub-block's scale and minimum in the format's tables.
    levels: int8 [n_blocks, block_size].
    """

    units: np.ndarray
    scales: np.ndarray
    levels: np.ndarray


@dataclass(frozen=True, eq=False)
class ScalarBlocks:
    """A format whose weights are scaled levels.

    block_size, type_size: weights and bytes of a block.
    unpack: blocks, uint8 [n_blocks, type_size], to parts; pack: its inverse.
    levels: int8 [n], every level there is, ascending; n_sub: sub-blocks of a block.
    scale_table, minimum_table: float32, ascending, the values of a sub-block's stored scale and minimum; of length 1
    where nothing is stored. fixed_unit: d is always 1, and no part of the block.
    """

    block_size: int
    type_size: int
    unpack: Callable[[np.ndarray], ScalarParts]
    pack: Callable[[ScalarParts], np.ndarray]
    levels: np.ndarray
    n_sub: int = 1
    scale_table: np.ndarray = field(default_factory=lambda: ONE_VALUE)
    minimum_table: np.ndarray = field(default_factory=lambda: NO_MINIMUM)
    fixed_unit: bool = False

    def open(self, data: np.ndarray) -> ScalarParts:
        """The parts of rows of blocks, uint8 [n_rows, row_bytes]."""
        return self.unpack(data.reshape(-1, self.type_size))

    def decode(self, data: np.ndarray) -> np.ndarray:
        """The weights of rows of blocks: uint8 [n_rows, row_bytes] to float32 [n_rows, n_columns]."""
        units, scales, levels = self.open(data)
        steps = units[:, :1] * self.scale_table[scales[:, 0]]
        weights: np.ndarray = steps[:, :, None] * levels.reshape(*steps.shape, -1)
        if self.minimum_table is not NO_MINIMUM:
            weights -= (units[:, 1:] * self.minimum_table[scales[:, 1]])[:, :, None]
        return weights.reshape(len(data), -1)


class Layout(NamedTuple):
    """What tells the formats whose weights are points of a codebook apart.

    signs: SIGNED, FREE or PARITY; n_variants: 1 or 2; span: groups that share a variant.
    n_sub: sub-blocks of a super-block; top_code: highest code of their scales.
    unit: a scale is d * unit * (2 code + 1).
    """

    signs: int
    n_variants: int
    span: int
    n_sub: int
    top_code: np.float32
    unit: np.float32


class PointParts(NamedTuple):
    """d: float32 [n_blocks], values of float16; scales: uint8 [n_blocks, n_sub]; indices: uint16 [n_blocks, n_groups];
    signs: uint8 [n_blocks, n_groups], a bit a weight, lowest first, set where it is negative, or the variant of the
    group where the points are signed.
    """

    d: np.ndarray
    scales: np.ndarray
    indices: np.ndarray
    signs: np.ndarray


@dataclass(frozen=True, eq=False)
class BlockRows:
    """Rows of blocks that no file holds as such: those of a matrix whose scales are stored apart from its codes."""

    name: str
    blocks: ScalarBlocks

    @property
    def block_size(self) -> int:
        return self.blocks.block_size


@dataclass(frozen=True, eq=False)
class PointBlocks:
    """A format whose groups of weights are scaled points of the codebook of that name; the rest as of ScalarBlocks."""

    block_size: int
    type_size: int
    unpack: Callable[[np.ndarray], PointParts]
    pack: Callable[[PointParts], np.ndarray]
    codebook: str
    layout: Layout

    def open(self, data: np.ndarray) -> PointParts:
        """The parts of rows of blocks, uint8 [n_rows, row_bytes]."""
        return self.unpack(data.reshape(-1, self.type_size))


class Blocked(Protocol):
    """What has rows of blocks: a BlockFormat, or BlockRows."""

    @property
    def name(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def blocks(self) -> ScalarBlocks | PointBlocks | None: ...


def integers(first: int, last: int) -> np.ndarray:
    """first .. last as levels, int8."""
    return np.arange(first, last + 1, dtype=np.int8)


def single_scale(d: np.ndarray, levels: np.ndarray, minimum: np.ndarray | None = None) -> ScalarParts:
    """Parts of blocks with one scale, float32 [n_blocks, 1], and perhaps one added minimum of that shape."""
    dmin = np.zeros_like(d) if minimum is None else -minimum
    scales = np.zeros((len(d), 2, 1), np.int16)
    return ScalarParts(np.concatenate([d, dmin], axis=1, dtype=np.float32), scales, levels)


def scaled_sub_blocks(d: np.ndarray | float, scales: np.ndarray, levels: np.ndarray) -> ScalarParts:
    """Parts of blocks without a minimum. d: float32 [n_blocks], or one number; scales: [n_blocks, n_sub], places in the
    format's table; levels: [n_blocks, block_size]."""
    n_blocks, n_sub = scales.shape
    units, places = np.zeros((n_blocks, 2), np.float32), np.zeros((n_blocks, 2, n_sub), np.int16)
    units[:, 0], places[:, 0] = d, scales
    return ScalarParts(units, places, levels)
