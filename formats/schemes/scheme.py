"""How the linear layers of a compressed-tensors directory are quantized, in the words of its configuration.

A scheme says how weights are stored and what the runtime does with activations; a codec turns a matrix into the tensors
that stand beside a module's name ("weight_packed", "weight_scale", ...) and back.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from bitwright.formats.choices import Effort
from bitwright.formats.parts import BlockRows, ScalarBlocks

Tensors = dict[str, np.ndarray]
TensorShapes = dict[str, tuple[str, tuple[int, ...]]]
"""By suffix: safetensors' name of the dtype, and the shape."""


@dataclass(frozen=True)
class WeightScheme:
    """`weights` of a configuration group.

    strategy: what shares a scale: a tensor, a row ("channel"), group_size columns of a row ("group"), the same below a
        scale of the tensor ("tensor_group"), or block_structure (rows, columns).
    scale_dtype: as in the configuration ("torch.uint8"); None where scales have the model's dtype, stored as BF16.
    """

    num_bits: int
    type: Literal["int", "float"]
    strategy: Literal["tensor", "channel", "group", "tensor_group", "block"]
    group_size: int | None = None
    block_structure: tuple[int, int] | None = None
    symmetric: bool = True
    scale_dtype: str | None = None


@dataclass(frozen=True)
class ActivationScheme:
    """`input_activations` of a configuration group.

    dynamic: True: the runtime measures every scale; False: one scale was measured in calibration and is stored;
        "local": the scale of the tensor is stored, those of the groups are measured.
    """

    num_bits: int
    type: Literal["int", "float"]
    strategy: Literal["tensor", "token", "group", "tensor_group"]
    dynamic: bool | Literal["local"] = True
    symmetric: bool = True
    group_size: int | None = None
    scale_dtype: str | None = None


class Codec(Protocol):
    """What becomes of a matrix float32 [n_rows, n_columns] under one scheme."""

    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes: ...

    def encode(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None,
        effort: Effort,
        global_scale: float | None,
        n_threads: int,
    ) -> Tensors: ...

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray: ...


class TunableRows(NamedTuple):
    """A matrix as rows of blocks, for what moves their scales and levels.

    data: uint8 [n_rows, row_bytes]. factor: by what a weight is multiplied in blocks. nearest_units: of units, float32,
    the nearest that can be stored; None where they stay as they are. places: int16 [n_rows, n_blocks, 2], among the
    levels of the blocks the first and the last that a block can store; None for all.
    """

    blocks: ScalarBlocks
    data: np.ndarray
    factor: np.float32
    nearest_units: Callable[[np.ndarray], np.ndarray] | None
    places: np.ndarray | None = None


class BlockCodec(Codec, Protocol):
    """A codec whose matrices can be seen as rows of blocks, for what chooses codes anew (feedback/choose.py), and for
    what moves scales, too."""

    def block_rows(self, n_columns: int) -> BlockRows: ...

    def to_blocks(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        """uint8 [n_rows, row_bytes]."""
        ...

    def from_blocks(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        """The inverse; tensors: what `data` was made of, from which comes what no block holds."""
        ...

    def block_factor(self, tensors: Tensors) -> np.float32:
        """By what a weight is multiplied in blocks."""
        ...

    def tunable(self, tensors: Tensors, shape: tuple[int, int]) -> TunableRows: ...

    def tuned(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        """The inverse; tensors: as of from_blocks."""
        ...


class SharingCodec(Codec, Protocol):
    """A codec with a scale of the whole matrix."""

    def shared_scale(
        self,
        read: Callable[[], Iterable[np.ndarray]],
        importance: np.ndarray | None,
        effort: Effort,
        n_threads: int,
    ) -> float: ...
