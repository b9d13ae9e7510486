"""Matrices that the source stores in the planned scheme already: their codes and scales are taken over as they are."""

from math import prod

import numpy as np

from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.bfloat16 import bfloat16, bfloat16_bits
from bitwright.formats.files.stored_tensor import StoredTensor, to_float32
from bitwright.formats.quantized.decoded_tensor import DecodedTensor
from bitwright.formats.quantized.grids import BlockGrid, PackedDown
from bitwright.formats.quantized.levels import Nibbles, Packed, Plain
from bitwright.formats.quantized.scaled import Nvfp4, ScaledLevels
from bitwright.formats.schemes.fp4_codec import ZERO_BLOCK_CODE
from bitwright.formats.schemes.registry import Scheme
from bitwright.formats.schemes.scheme import Tensors
from bitwright.profiles.planning.plan_modules import PlannedModule

# NVFP4's two scales are multiplied in another order than the source's are, whose last bit may then be another.
_LAST_BIT = 2.0**-22


def repacked(checkpoint: Checkpoint, planned: PlannedModule, scheme: Scheme, rows: np.ndarray) -> Tensors | None:
    """What is stored of the matrix in this scheme, without anything of its inputs, when it decodes to these rows,
    float32 [n_rows, n_columns]; None where the source has another scheme, or scales that it cannot hold."""
    name = planned.tensor.name
    tensor = checkpoint.tensors[name]
    if not isinstance(tensor, DecodedTensor) or tensor.shape != tensor.decoder.shape or len(tensor.shape) != 2:
        return None
    if scheme.has_global_scale and len({_whole_scale(checkpoint, other) for other in planned.shares_scale_with}) > 1:
        return None
    decoder = tensor.decoder
    found = _nvfp4(name, decoder) if isinstance(decoder, Nvfp4) else None
    if isinstance(decoder, ScaledLevels):
        found = _scaled(name, decoder)
    shapes = scheme.codec.tensors(*tensor.shape)
    if found is None or {suffix: values.size for suffix, values in found.items()} != {
        suffix: prod(shape) for suffix, (_, shape) in shapes.items()
    }:
        return None
    found = {suffix: values.reshape(shapes[suffix][1]) for suffix, values in found.items()}
    tolerance = _LAST_BIT if isinstance(decoder, Nvfp4) else 0.0
    decoded = scheme.decode(found, tensor.shape)
    return found if (np.abs(decoded - rows) <= tolerance * np.abs(rows)).all() else None


def _whole_scale(checkpoint: Checkpoint, name: str) -> float | None:
    """The scale of a whole matrix; None where it has none."""
    tensor = checkpoint.tensors[name]
    decoder = tensor.decoder if isinstance(tensor, DecodedTensor) else None
    if isinstance(decoder, Nvfp4):
        return decoder.divisor(name)
    if isinstance(decoder, ScaledLevels) and prod(decoder.scales.tensor.shape) == 1:
        return float(decoder.scales.rows(name, 0, 1)[0, 0])
    return None


def _nvfp4(name: str, decoder: Nvfp4) -> Tensors | None:
    found = _scaled(name, decoder.blocks)
    if found is None:
        return None
    zero = found["weight_scale"] == 0
    found["weight_packed"].reshape(*zero.shape, -1)[zero] = 0
    found["weight_scale"][zero] = ZERO_BLOCK_CODE
    return found | {"weight_global_scale": np.array([decoder.divisor(name)], np.float32)}


def _scaled(name: str, decoder: ScaledLevels) -> Tensors | None:
    """By suffix, as compressed-tensors calls them; of BF16 and F8_E4M3 the bits."""
    levels, scales, zeros = decoder.levels, decoder.scales, decoder.zeros
    if not isinstance(scales, BlockGrid) or decoder.groups is not None:
        return None
    codes = levels.tensor.read(name).reshape(levels.tensor.shape)
    if isinstance(levels, Nibbles):
        return {"weight_packed": codes, "weight_scale": scales.tensor.read(name).reshape(len(codes), -1)}
    bits = _bfloat16_bits(name, scales.tensor)
    if bits is None:
        return None
    found = {"weight_scale": bits}
    if isinstance(levels, Plain) and zeros is None and levels.tensor.dtype in ("F8_E4M3", "I8"):
        return found | {"weight": codes}
    if not isinstance(levels, Packed):
        return None
    if isinstance(zeros, PackedDown):
        found["weight_zero_point"] = zeros.tensor.read(name).reshape(zeros.tensor.shape)
    return found | {"weight_packed": codes, "weight_shape": np.array(levels.shape, np.int64)}


def _bfloat16_bits(name: str, scales: StoredTensor) -> np.ndarray | None:
    """Scales as bfloat16, uint16 [n]; None where that would round them."""
    if scales.dtype not in ("BF16", "F16", "F32"):
        return None
    values = to_float32(scales.read(name), scales.dtype)
    bits = bfloat16_bits(values)
    return bits if np.array_equal(bfloat16(bits), values) else None
