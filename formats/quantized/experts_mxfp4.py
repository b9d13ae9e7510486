"""The experts of gpt-oss in MXFP4: matrices whose values transformers takes with the inputs first.

    blocks  U8  [n_experts, n_outputs, n_inputs / 32, 16]   inputs 2 l and 2 l + 1 in the low and the high nibble of l
    scales  U8  [n_experts, n_outputs, n_inputs / 32]       E8M0

become [n_experts, n_inputs, n_outputs] (convert_moe_packed_tensors of transformers' integrations/mxfp4.py). Only the
blocks in which the inputs lie that are asked for are read.
"""

from dataclasses import dataclass, replace

import numpy as np

from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.formats.quantized.decoded_tensor import unusable
from bitwright.formats.quantized.levels import e8m0_table, fp4_values

_BLOCK_SIZE = 32


@dataclass(frozen=True)
class ExpertsMxfp4:
    blocks: StoredTensor
    scales: StoredTensor

    @property
    def kind(self) -> str:
        return "MXFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        n_experts, n_outputs, n_blocks = self.scales.shape
        return n_experts, n_blocks * _BLOCK_SIZE, n_outputs

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return self.blocks, self.scales

    @property
    def inputs_first(self) -> bool:
        return True

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        n_inputs = self.shape[1]
        parts = []
        for expert in range(start // n_inputs, -(-stop // n_inputs)):
            first, last = max(start - expert * n_inputs, 0), min(stop - expert * n_inputs, n_inputs)
            begin, end = first // _BLOCK_SIZE, -(-last // _BLOCK_SIZE)
            packed = self._flat().read_columns(name, expert, 16 * begin, 16 * end)
            scales = self.scales.read_columns(name, expert, begin, end)
            values = self._decoded(name, packed, scales)
            parts.append(values[:, first - begin * _BLOCK_SIZE : last - begin * _BLOCK_SIZE].T)
        return np.concatenate(parts)

    def columns(self, name: str, matrix: int, start: int, stop: int) -> np.ndarray:
        first = matrix * self.shape[2]
        packed = self._flat().read_rows(name, first + start, first + stop)
        return self._decoded(name, packed, self.scales.read_rows(name, first + start, first + stop))

    def _flat(self) -> StoredTensor:
        """The blocks with their bytes in a row: [n_experts, n_outputs, n_inputs / 2]."""
        n_experts, n_outputs, n_blocks = self.scales.shape
        return replace(self.blocks, shape=(n_experts, n_outputs, 16 * n_blocks))

    def _decoded(self, name: str, packed: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """uint8 [n, 16 n_blocks] and [n, n_blocks] to float32 [n, 32 n_blocks]."""
        steps = e8m0_table()[scales]
        if np.isnan(steps).any():
            raise unusable(f"a scale of {name!r} is 255, which stands for no number", name, self.scales)
        values: np.ndarray = fp4_values(packed).reshape(*scales.shape, _BLOCK_SIZE) * steps[..., None]
        return values.reshape(len(packed), -1)
