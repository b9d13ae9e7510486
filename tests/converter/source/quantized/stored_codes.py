"""Random matrices in the codes of every kind of quantized checkpoint, with what another implementation decodes them to.

Each function gives the tensors beside a name, the `quantization_config`, and the matrix: compressed-tensors' and
transformers' own code decodes what they know; of the others the published layout is spelled out in a few lines.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Coded:
    """tensors: by their ends, beside the module's name; stated: the quantization_config; values: float32."""

    tensors: Tensors
    stated: dict[str, Any]
    values: np.ndarray


def _floats8(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Every finite code, at random places."""
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    codes[(codes & 0x7F) >= (0x7F if dtype is torch.float8_e4m3fn else 0x7C)] = 0x38
    return codes.view(dtype)


def _scales8(*shape: int) -> torch.Tensor:
    """Positive codes."""
    codes = _floats8(*shape).view(torch.uint8) & 0x7F
    return codes.clamp(1).view(torch.float8_e4m3fn)


def _positive(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.001


def _integers(low: int, high: int, *shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def fp8_blocks(n: int, k: int, block: tuple[int, int] = (128, 128), scale_dtype: torch.dtype = torch.float32) -> Coded:
    weight = _floats8(n, k)
    scale = _positive(-(-n // block[0]), -(-k // block[1])).to(scale_dtype)
    spread = scale.float().repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    return Coded({"weight": weight, "weight_scale_inv": scale}, stated, (weight.float() * spread).numpy())


def fp8_per_tensor(n: int, k: int) -> Coded:
    """As Mistral's releases have it, with a scale of the inputs."""
    weight, scale = _floats8(n, k), torch.tensor(0.0123, dtype=torch.bfloat16)
    tensors = {"weight": weight, "weight_scale_inv": scale, "activation_scale": torch.tensor(0.5)}
    stated = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    return Coded(tensors, stated, (weight.float() * scale.float()).numpy())


def fp8_modelopt(n: int, k: int) -> Coded:
    weight, scale = _floats8(n, k), torch.tensor(0.0123)
    tensors = {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.5), "k_scale": torch.tensor(1.0)}
    stated = {"quant_method": "modelopt", "quant_algo": "FP8"}
    return Coded(tensors, stated, (weight.float() * scale).numpy())


def fp8_e5m2(n: int, k: int) -> Coded:
    weight, scale = _floats8(n, k, dtype=torch.float8_e5m2), _positive(n, 1)
    return Coded(
        {"weight": weight, "weight_scale": scale}, {"quant_method": "fbgemm_fp8"}, (weight.float() * scale).numpy()
    )


def _compressed(scheme: dict[str, Any], format_name: str, tensors: Tensors) -> Coded:
    weights = QuantizationArgs(**scheme)
    decoded = BaseCompressor.get_value_from_registry(format_name).decompress(
        dict(tensors), QuantizationScheme(targets=["Linear"], weights=weights)
    )["weight"]
    stated = {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
        "ignore": ["lm_head"],
    }
    return Coded(tensors, stated, decoded.float().numpy())


def fp8_channel(n: int, k: int) -> Coded:
    scheme = {"num_bits": 8, "type": "float", "strategy": "channel"}
    return _compressed(scheme, "float-quantized", {"weight": _floats8(n, k), "weight_scale": _positive(n, 1)})


def fp8_compressed_blocks(n: int, k: int) -> Coded:
    scheme = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    scale = _positive(-(-n // 128), -(-k // 128))
    return _compressed(scheme, "float-quantized", {"weight": _floats8(n, k), "weight_scale": scale})


def int8_channel(n: int, k: int) -> Coded:
    codes = _integers(-128, 128, n, k).to(torch.int8)
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel"}
    return _compressed(scheme, "int-quantized", {"weight": codes, "weight_scale": _positive(n, 1)})


def int8_asymmetric(n: int, k: int) -> Coded:
    codes, zeros = _integers(-128, 128, n, k).to(torch.int8), _integers(-100, 100, n, 1, seed=3).to(torch.int8)
    scheme = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}
    tensors = {"weight": codes, "weight_scale": _positive(n, 1), "weight_zero_point": zeros}
    return _compressed(scheme, "int-quantized", tensors)


def _packed(n: int, k: int, bits: int, group: int | None, symmetric: bool) -> Coded:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << bits - 1
    codes = _integers(-half, half, n, k).to(torch.int8)
    tensors = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": _positive(n, 1 if group is None else k // group),
        "weight_shape": torch.tensor([n, k]),
    }
    scheme = {"num_bits": bits, "type": "int", "strategy": "group" if group else "channel", "symmetric": symmetric}
    if group is not None:
        scheme["group_size"] = group
    if not symmetric:
        zeros = _integers(-half, half, *tensors["weight_scale"].shape, seed=4).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
    return _compressed(scheme, "pack-quantized", tensors)


def int4_groups(n: int, k: int) -> Coded:
    return _packed(n, k, 4, 32, symmetric=True)


def int4_groups_asymmetric(n: int, k: int) -> Coded:
    return _packed(n, k, 4, 32, symmetric=False)


def int8_packed_channel(n: int, k: int) -> Coded:
    return _packed(n, k, 8, None, symmetric=True)


def int3_groups(n: int, k: int) -> Coded:
    return _packed(n, k, 3, 32, symmetric=False)


def int4_activation_order(n: int, k: int) -> Coded:
    """The columns of a group lie anywhere (weight_g_idx)."""
    coded = _packed(n, k, 4, 32, symmetric=True)
    order = torch.randperm(k, generator=torch.Generator().manual_seed(5))
    groups = (torch.arange(k) // 32)[order].to(torch.int32)
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    codes = unpack_from_int32(coded.tensors["weight_packed"], 4, torch.Size([n, k]))
    values = codes.float() * coded.tensors["weight_scale"][:, groups]
    return Coded({**coded.tensors, "weight_g_idx": groups}, coded.stated, values.numpy())


def nvfp4(n: int, k: int) -> Coded:
    packed = _integers(0, 256, n, k // 2).to(torch.uint8)
    scales = _scales8(n, k // 16)
    tensors = {"weight_packed": packed, "weight_scale": scales, "weight_global_scale": torch.tensor([1234.5])}
    scheme = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    coded = _compressed(scheme, "nvfp4-pack-quantized", tensors)
    return Coded(coded.tensors, coded.stated, (_fp4(packed, scales.float(), 16) / np.float32(1234.5)))


def _fp4(packed: torch.Tensor, scales: torch.Tensor, size: int) -> np.ndarray:
    """compressed-tensors' own levels, times scales in float32; its dequantization computes in bfloat16."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    n, half = packed.shape
    levels = unpack_fp4_from_uint8(packed, n, 2 * half).float()
    return (levels * scales.repeat_interleave(size, 1)).numpy()


def nvfp4_modelopt(n: int, k: int) -> Coded:
    packed, scales, second = _integers(0, 256, n, k // 2).to(torch.uint8), _scales8(n, k // 16), 0.00321
    tensors = {
        "weight": packed,
        "weight_scale": scales,
        "weight_scale_2": torch.tensor(second),
        "input_scale": torch.tensor(0.1),
    }
    stated = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    return Coded(tensors, stated, _fp4(packed, scales.float(), 16) * np.float32(second))


def mxfp4(n: int, k: int) -> Coded:
    packed, exponents = _integers(0, 256, n, k // 2).to(torch.uint8), _integers(100, 140, n, k // 32).to(torch.uint8)
    scheme = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    return _compressed(scheme, "mxfp4-pack-quantized", {"weight_packed": packed, "weight_scale": exponents})


def gptq(n: int, k: int, bits: int = 4, group: int = 32, order: bool = False, newer: bool = False) -> Coded:
    """Codes from the lowest bits of 32-bit words on, down the columns of [k, n]; zero points along the rows, one less
    than they are in the first version."""
    codes = _integers(0, 1 << bits, k, n).numpy()
    zeros = _integers(1, 1 << bits, k // group, n, seed=6).numpy()
    scales = _positive(k // group, n).half()
    groups = np.arange(k) // group
    if order:
        groups = np.random.default_rng(7).permutation(groups)
    values = (codes - zeros[groups]) * scales.float().numpy()[groups]
    tensors = {
        "qweight": _words(codes.T, bits).T.contiguous(),
        "qzeros": _words(zeros - (0 if newer else 1), bits),
        "scales": scales,
        "g_idx": torch.from_numpy(groups.astype(np.int32)),
    }
    stated = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": False}
    stated["checkpoint_format"] = "gptq_v2" if newer else "gptq"
    return Coded(tensors, stated, values.T.astype(np.float32))


def _words(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Rows of codes as rows of little-endian words, as an arbitrarily long number each."""
    rows = [sum(int(code) << bits * i for i, code in enumerate(row)) for row in codes]
    n_bytes = codes.shape[1] * bits // 8
    packed = b"".join(row.to_bytes(n_bytes, "little") for row in rows)
    return torch.from_numpy(np.frombuffer(packed, "<i4").reshape(len(codes), -1).copy())


def awq(n: int, k: int, group: int = 32) -> Coded:
    """Eight columns of [k, n] in a word, column 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on."""
    codes, zeros = _integers(0, 16, k, n).numpy(), _integers(0, 16, k // group, n, seed=6).numpy()
    scales = _positive(k // group, n).half()
    values = (codes - zeros.repeat(group, 0)) * scales.float().numpy().repeat(group, 0)

    def words(matrix: np.ndarray) -> torch.Tensor:
        packed = np.zeros((len(matrix), n // 8), np.uint32)
        for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            packed |= matrix[:, column::8].astype(np.uint32) << 4 * nibble
        return torch.from_numpy(packed.view(np.int32))

    tensors = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}
    stated = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Coded(tensors, stated, values.T.astype(np.float32))


def bitnet(n: int, k: int, linear_class: str = "autobitlinear") -> Coded:
    from transformers.integrations.bitnet import pack_weights

    levels = _integers(-1, 2, n, k).float()
    scale = torch.tensor([1.21875], dtype=torch.bfloat16)
    values = levels * scale.float() if linear_class == "autobitlinear" else levels / scale.float()
    stated = {"quant_method": "bitnet", "linear_class": linear_class, "quantization_mode": "offline"}
    return Coded({"weight": pack_weights(levels.clone()), "weight_scale": scale}, stated, values.numpy())


def nf4(n: int, k: int, nested: bool = True) -> Coded:
    """The layout that bitsandbytes documents: the first of two codes in the high nibble, a scale for 64 weights."""
    import json

    table = torch.linspace(-1, 1, 16)
    codes = _integers(0, 16, n * k).numpy()
    packed = torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8)[:, None])
    n_scales = -(-n * k // 64)
    said: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [n, k]}
    tensors = {"weight": packed, "weight.quant_map": table}
    if nested:
        coarse, inner = _positive(-(-n_scales // 256)), torch.linspace(-1, 1, 256)
        stored = _integers(0, 256, n_scales, seed=8)
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.04}
        scales = inner[stored] * coarse.repeat_interleave(256)[:n_scales] + 0.04
        tensors |= {
            "weight.absmax": stored.to(torch.uint8),
            "weight.nested_absmax": coarse,
            "weight.nested_quant_map": inner,
        }
    else:
        scales = _positive(n_scales)
        tensors["weight.absmax"] = scales
    state = torch.from_numpy(np.frombuffer(json.dumps(said).encode(), np.uint8).copy())
    tensors["weight.quant_state.bitsandbytes__nf4"] = state
    values = table[codes] * scales.repeat_interleave(64)[: n * k]
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return Coded(tensors, stated, values.reshape(n, k).numpy())


def bnb_int8(n: int, k: int) -> Coded:
    codes, largest = _integers(-127, 128, n, k).to(torch.int8), _positive(n)
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    values = codes.float() * largest[:, None] / 127
    return Coded(tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True}, values.numpy())


KINDS: dict[str, Callable[[int, int], Coded]] = {
    "FP8 in blocks of 128x128": fp8_blocks,
    "FP8 per tensor": fp8_per_tensor,
    "FP8 per tensor of ModelOpt": fp8_modelopt,
    "FP8 per channel": fp8_channel,
    "FP8 in blocks of compressed-tensors": fp8_compressed_blocks,
    "FP8 (E5M2) per channel": fp8_e5m2,
    "INT8 per channel": int8_channel,
    "INT8 per channel, asymmetric": int8_asymmetric,
    "INT4 in groups": int4_groups,
    "INT4 in groups, asymmetric": int4_groups_asymmetric,
    "INT4 in activation order": int4_activation_order,
    "INT3 in groups": int3_groups,
    "INT8 packed per channel": int8_packed_channel,
    "NVFP4": nvfp4,
    "NVFP4 of ModelOpt": nvfp4_modelopt,
    "MXFP4": mxfp4,
    "GPTQ": gptq,
    "GPTQ in activation order": lambda n, k: gptq(n, k, order=True),
    "GPTQ of the second version": lambda n, k: gptq(n, k, newer=True),
    "GPTQ of 8 bits": lambda n, k: gptq(n, k, bits=8),
    "GPTQ of 3 bits": lambda n, k: gptq(n, k, bits=3),
    "GPTQ of 2 bits": lambda n, k: gptq(n, k, bits=2),
    "AWQ": awq,
    "bitnet": bitnet,
    "bitnet of BitLinear": lambda n, k: bitnet(n, k, "bitlinear"),
    "NF4 nested": nf4,
    "NF4": lambda n, k: nf4(n, k, nested=False),
    "INT8 of bitsandbytes": bnb_int8,
}
