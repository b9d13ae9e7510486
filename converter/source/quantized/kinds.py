"""The ways in which whole weights are stored in codes, each found by the names and dtypes of its tensors.

A function takes the Sides of a tensor and the `quantization_config`, and gives the decoder; the docstring says what is
stored. ModelOpt and compressed-tensors call scales alike, so that the method that a configuration names decides nothing
but what tensors cannot tell.
"""

import json
from collections.abc import Mapping
from typing import Any

from bitwright.converter.source.quantized.sides import Sides
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.formats.quantized.decoded_tensor import Decoder
from bitwright.formats.quantized.experts_mxfp4 import ExpertsMxfp4
from bitwright.formats.quantized.grids import BlockGrid, Grid, InterleavedZeros, PackedAcross, PackedDown, SidewaysGrid
from bitwright.formats.quantized.levels import ColumnPacked, Interleaved, Nibbles, Packed, Plain, Ternary
from bitwright.formats.quantized.scaled import Nvfp4, OneScale, ScaledLevels
from bitwright.formats.quantized.table_codes import NestedScales, RowIntegers, TableCodes
from bitwright.formats.schemes.packed_int import packed_width

Stated = Mapping[str, Any]

_DEFAULT_BLOCK = (128, 128)
_SCALE_DTYPES = ("F32", "BF16", "F16")


def float8(sides: Sides, weight: StoredTensor, stated: Stated) -> Decoder:
    """weight F8 [.., n, k]; weight_scale_inv or weight_scale, by which it is multiplied: of the tensor, rows, groups of
    columns, or blocks (`weight_block_size`, of compressed-tensors `block_structure`)."""
    scale = sides.need("_scale_inv", "_scale")
    blocks = [*_stated_blocks(stated), _DEFAULT_BLOCK]
    grid, width, said = sides.grid(_scales(sides, scale, ("U8", "F8_E8M0")), weight.shape, tuple(blocks))
    name = "FP8" if weight.dtype == "F8_E4M3" else "FP8 (E5M2)"
    return ScaledLevels(f"{name} {said}", Plain(weight), grid, width)


def integers8(sides: Sides, weight: StoredTensor, stated: Stated) -> Decoder | None:
    """weight I8 [n, k] with weight_scale and perhaps weight_zero_point (int-quantized of compressed-tensors); or with
    SCB [n] (bitsandbytes). None for integers beside which there are no scales."""
    module = Sides(sides.stored, sides.name.removesuffix("weight"), sides.codes)
    if (largest := module.take("SCB")) is not None:
        module.take("weight_format")
        sides.used |= module.used
        if len(weight.shape) != 2 or largest.shape != weight.shape[:1] or largest.dtype != "F32":
            raise sides.wrong_shape(largest, weight.shape)
        return RowIntegers(weight, largest)
    scale = sides.take("_scale")
    if scale is None:
        return None
    grid, width, said = sides.grid(_scales(sides, scale), weight.shape, ())
    zeros = None
    if (stored_zeros := sides.take("_zero_point")) is not None:
        if stored_zeros.shape != scale.shape:
            raise sides.wrong_shape(stored_zeros, weight.shape, "zero points")
        zeros = BlockGrid(stored_zeros, grid.height, grid.n_rows, grid.across)
    return ScaledLevels(f"INT8 {said}", Plain(weight), grid, width, zeros)


def packed(sides: Sides, weight: StoredTensor, stated: Stated) -> Decoder | None:
    """weight_packed: I32, integers of compressed-tensors, with weight_scale, weight_shape and perhaps
    weight_zero_point and weight_g_idx; or U8, FP4 with weight_scale, of NVFP4 with weight_global_scale, too."""
    if weight.dtype == "U8":
        return _float4(sides, weight, sides.take("_global_scale"), divides=True)
    if weight.dtype != "I32":
        return None
    scale = sides.need("_scale")
    n_columns, bits = _packed_columns(sides, weight, scale, stated)
    levels = Packed(weight, bits, n_columns)
    groups = sides.take("_g_idx")
    if groups is not None and (groups.dtype != "I32" or groups.shape != (n_columns,)):
        raise sides.wrong_shape(groups, levels.shape, "indices of groups")
    grid, width, said = sides.grid(_scales(sides, scale), levels.shape, ())
    zeros = None
    if (stored_zeros := sides.take("_zero_point")) is not None:
        shape = (packed_width(levels.shape[0], bits), grid.across)
        if stored_zeros.shape != shape or stored_zeros.dtype != "I32":
            raise sides.wrong_shape(stored_zeros, levels.shape, "zero points")
        zeros = PackedDown(stored_zeros, bits)
    return ScaledLevels(f"INT{bits} {said}", levels, grid, width, zeros, groups)


def bytes8(sides: Sides, weight: StoredTensor, stated: Stated) -> Decoder | None:
    """weight U8: FP4 of ModelOpt (weight_scale, of NVFP4 with weight_scale_2), ternary matrices of bitnet, or the codes
    of bitsandbytes. None for bytes beside which there are no scales."""
    if (absmax := sides.take(".absmax")) is not None:
        return _table_codes(sides, weight, absmax)
    scale = sides.stored.get(sides.name + "_scale")
    if scale is None:
        return None
    if scale.dtype in ("F8_E4M3", "U8", "F8_E8M0"):
        return _float4(sides, weight, sides.take("_scale_2"), divides=False)
    if len(weight.shape) != 2:
        raise sides.wrong_shape(weight, (), "packed ternary codes")
    levels = Ternary(weight)
    sides.used.add(sides.name + "_scale")
    if scale.shape not in ((), (1,)) or scale.dtype not in _SCALE_DTYPES:
        raise sides.wrong_shape(scale, levels.shape)
    # Of transformers' two classes AutoBitLinear multiplies by the scale, and BitLinear, the default, divides by it.
    divides = stated.get("linear_class", "bitlinear") != "autobitlinear"
    return OneScale("ternary codes of bitnet", levels, scale, divides)


def experts_mxfp4(sides: Sides, blocks: StoredTensor, stated: Stated) -> Decoder | None:
    """gpt-oss: NAME_blocks U8 [n_experts, n, k / 32, 16] and NAME_scales U8 [n_experts, n, k / 32]."""
    if len(blocks.shape) != 4 or blocks.dtype != "U8":
        return None
    scales = sides.need("_scales")
    if scales.dtype not in ("U8", "F8_E8M0") or (*scales.shape, 16) != blocks.shape:
        raise sides.wrong_shape(scales, blocks.shape)
    return ExpertsMxfp4(blocks, scales)


def gptq(sides: Sides, codes: StoredTensor, stated: Stated, offset: int) -> Decoder:
    """qweight I32 [k bits / 32, n], qzeros I32 [groups, n bits / 32], scales [groups, n], and perhaps g_idx I32 [k].
    offset: what is added to the stored zero points, 1 in the first version of the format."""
    module = Sides(sides.stored, sides.name.removesuffix("weight"), sides.codes)
    zeros, scales, groups = module.need("qzeros"), module.need("scales"), module.take("g_idx")
    sides.used |= module.used
    n_groups, n_rows = scales.shape if len(scales.shape) == 2 else (0, 0)
    bits = 32 * zeros.shape[-1] // max(n_rows, 1) if zeros.shape else 0
    if bits not in (2, 3, 4, 8) or codes.shape[1:] != (n_rows,) or zeros.shape != (n_groups, n_rows * bits // 32):
        raise sides.wrong_shape(zeros, codes.shape, "zero points and scales")
    levels = ColumnPacked(codes, bits)
    n_columns = levels.shape[1]
    size = stated.get("group_size")
    width = size if isinstance(size, int) and size > 0 and -(-n_columns // size) == n_groups else n_columns // n_groups
    if -(-n_columns // width) != n_groups:
        raise sides.wrong_shape(scales, levels.shape)
    if groups is not None and (groups.dtype != "I32" or groups.shape != (n_columns,)):
        raise sides.wrong_shape(groups, levels.shape, "indices of groups (g_idx)")
    grid = SidewaysGrid(_scales(sides, scales))
    kind = f"INT{bits} of GPTQ in groups of {width}"
    return ScaledLevels(kind, levels, grid, width, PackedAcross(zeros, bits, offset), groups)


def awq(sides: Sides, codes: StoredTensor, stated: Stated) -> Decoder:
    """qweight I32 [k, n / 8], qzeros I32 [groups, n / 8], scales [groups, n]."""
    module = Sides(sides.stored, sides.name.removesuffix("weight"), sides.codes)
    zeros, scales = module.need("qzeros"), module.need("scales")
    sides.used |= module.used
    levels = Interleaved(codes)
    n_rows, n_columns = levels.shape
    n_groups = scales.shape[0] if scales.shape else 0
    if scales.shape != (n_groups, n_rows) or n_groups == 0 or n_columns % n_groups:
        raise sides.wrong_shape(scales, levels.shape)
    if zeros.shape != (n_groups, n_rows // 8) or zeros.dtype != "I32":
        raise sides.wrong_shape(zeros, levels.shape, "zero points")
    width = n_columns // n_groups
    grid: Grid = SidewaysGrid(_scales(sides, scales))
    return ScaledLevels(f"INT4 of AWQ in groups of {width}", levels, grid, width, InterleavedZeros(zeros))


def _float4(sides: Sides, weight: StoredTensor, second: StoredTensor | None, divides: bool) -> Decoder:
    """FP4, two in a byte: in blocks of 16 with scales F8_E4M3 and a second one of the tensor, or in blocks of 32 with
    E8M0."""
    levels, scale = Nibbles(weight), sides.need("_scale")
    nv = scale.dtype == "F8_E4M3"
    width = 16 if nv else 32
    across = levels.shape[-1] // width
    if scale.dtype not in ("F8_E4M3", "U8", "F8_E8M0") or scale.shape != (*levels.shape[:-1], across):
        raise sides.wrong_shape(scale, levels.shape)
    n_rows = levels.shape[-2] if len(levels.shape) > 1 else 1
    blocks = ScaledLevels("NVFP4" if nv else "MXFP4", levels, BlockGrid(scale, 1, n_rows, across), width)
    if not nv:
        return blocks
    if second is None:
        second = sides.need("_global_scale" if divides else "_scale_2")
    if second.shape not in ((), (1,)) or second.dtype != "F32":
        raise sides.wrong_shape(second, levels.shape, "scale of the whole")
    return Nvfp4("NVFP4", blocks, second, divides)


def _table_codes(sides: Sides, weight: StoredTensor, absmax: StoredTensor) -> Decoder:
    """bitsandbytes in four bits: how is said by JSON in a tensor of bytes."""
    state = sides.need(".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
    table = sides.need(".quant_map")
    try:
        said = json.loads(sides.contents(state))
        shape, block_size, kind = tuple(map(int, said["shape"])), int(said["blocksize"]), str(said["quant_type"])
        nested = None
        if "nested_blocksize" in said:
            nested_table, nested_absmax = sides.need(".nested_quant_map"), sides.need(".nested_absmax")
            size, offset = int(said["nested_blocksize"]), float(said["nested_offset"])
            nested = NestedScales(nested_table, nested_absmax, size, offset)
    except (ValueError, KeyError, TypeError):
        raise ConvertError(
            f"what bitsandbytes says of {sides.name!r} cannot be read", f"{state.file}: {sides.name}", "fetch it again"
        ) from None
    decoder = TableCodes(f"{kind.upper()} of bitsandbytes", weight, table, absmax, shape, block_size, nested)
    n = shape[0] * shape[1] if len(shape) == 2 and min(shape) > 0 and block_size > 0 else 0
    n_scales = -(-n // max(block_size, 1))
    if n == 0 or weight.n_bytes != -(-n // 2) or absmax.shape != (n_scales,) or table.shape != (16,):
        raise sides.wrong_shape(absmax, shape)
    if absmax.dtype != ("F32" if nested is None else "U8") or table.dtype != "F32":
        raise sides.wrong_shape(absmax, shape)
    if nested is not None and (nested.table.shape != (256,) or nested.absmax.shape != (-(-n_scales // size),)):
        raise sides.wrong_shape(nested.absmax, shape)
    return decoder


def _packed_columns(sides: Sides, weight: StoredTensor, scale: StoredTensor, stated: Stated) -> tuple[int, int]:
    """Columns of a matrix that is packed along its rows, and bits of a code."""
    shape = sides.need("_shape")
    width = weight.shape[-1]
    weights = [each for each in _weights(stated) if isinstance(each.get("num_bits"), int)]
    stated_bits = list(dict.fromkeys(each["num_bits"] for each in weights if 1 <= each["num_bits"] <= 8))
    n_columns = None
    if shape.file.is_file() and shape.dtype in ("I64", "I32") and shape.shape == (len(weight.shape),):
        n_columns = int(shape.read(sides.name)[-1])
    for bits in stated_bits or [4, 8]:
        whole = width * 32 // bits
        n = whole if n_columns is None else n_columns
        if packed_width(n, bits) == width and n > 0:
            return n, bits
    raise sides.wrong_shape(weight, (*weight.shape[:-1], n_columns or 0), "packed codes")


def _scales(sides: Sides, scale: StoredTensor, others: tuple[str, ...] = ()) -> StoredTensor:
    if scale.dtype not in (*_SCALE_DTYPES, *others):
        raise ConvertError(
            f"the scales of {sides.name!r} are stored as {scale.dtype}, which is no dtype of scales here",
            f"{scale.file}: {sides.name}",
            "fetch the weights again; if they are so, convert another release of the model",
        )
    return scale


def _stated_blocks(stated: Stated) -> list[tuple[int, int]]:
    found = [stated.get("weight_block_size"), *(weights.get("block_structure") for weights in _weights(stated))]
    return [
        (block[0], block[1])
        for block in found
        if isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    ]


def _weights(stated: Stated) -> list[Mapping[str, Any]]:
    """`weights` of every group of a compressed-tensors configuration."""
    groups = stated.get("config_groups")
    values = groups.values() if isinstance(groups, dict) else ()
    return [group["weights"] for group in values if isinstance(group, dict) and isinstance(group.get("weights"), dict)]
