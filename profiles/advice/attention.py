"""Attention kernels: what each version of FlashAttention moves and reaches, and where it runs.

A prompt, by the IO model of FlashAttention (arXiv 2205.14135): the standard kernel writes the scores, reads them for
the softmax, writes the shares, and reads them for the sum: four passes over heads x S x S. A tiled kernel reads the
queries and writes the outputs once, and reads keys and values once for every tile of queries that fits on the chip.
A step of decoding reads the cache, whatever the kernel: operations a byte are 2 x heads / kv_heads over the bytes of a
number. Blocks that are left out change the function of the model, and free nothing of the cache: no version does so
unless it is asked to.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.formats.errors import ConvertError
from bitwright.profiles.advice.cache import AttentionLayer, CacheFormat
from bitwright.profiles.advice.hardware import Architecture, Attention

_HALF = 2  # bytes of a number in 16 bits


@dataclass(frozen=True)
class Kernel:
    """peak_share: of the dense 16-bit rate that a causal prompt of 4096 tokens reaches, heads of 128. on_chip: bytes
    that hold a tile. architectures: where it runs, by the beginning of their names. source: of peak_share."""

    peak_share: float
    on_chip: int
    architectures: tuple[str, ...]
    source: str


_EVERYWHERE = ("",)
KERNELS: Mapping[Attention, Kernel] = {
    "standard": Kernel(0.15, 0, _EVERYWHERE, "half of FlashAttention's; not measured here"),
    "fa1": Kernel(0.3, 100 * 1024, _EVERYWHERE, "25 to 40 % of an A100's rate (arXiv 2307.08691, abstract)"),
    "fa2": Kernel(
        0.5, 100 * 1024, ("sm8", "sm9", "sm10", "sm11", "sm12", "gfx"), "A100 162 of 312, L40S 178 of 362 TFLOP/s"
    ),
    "fa3": Kernel(0.56, 200 * 1024, ("sm9",), "H100 554 of 989 TFLOP/s in vLLM 0.24; FP8 products there, too"),
    "fa4": Kernel(0.58, 200 * 1024, ("sm10",), "B200 1172 at 2048, 1431 at 4096 tokens, of 2250 TFLOP/s"),
}
"""Measured forward rates, from the kernel tables of aiconfigurator-core 0.12.0 unless the source says otherwise."""


def choose_kernel(asked: str, architecture: Architecture) -> Attention:
    """The version to count with: the one asked for, or for "auto" the best of the architecture. Raises ConvertError for
    one that does not run there."""
    if asked == "auto":
        return architecture.attention
    name: Attention = next(each for each in KERNELS if each == asked)
    if not architecture.name.startswith(KERNELS[name].architectures):
        where = (
            "Hopper" if name == "fa3" else "Blackwell of the data centre (tensor memory)" if name == "fa4" else "GPUs"
        )
        raise ConvertError(
            f"FlashAttention {name[2:]} is for {where}, and {architecture.name} is none",
            f"--attention {asked}",
            f"leave it out: the best there is {architecture.attention}",
        )
    return name


def prompt_bytes(layer: AttentionLayer, tokens: int, kernel: Attention) -> float:
    """Bytes that a layer's attention moves for a prompt, in 16 bits."""
    ends = _HALF * tokens * (2 * layer.heads * layer.key + layer.kv_heads * (layer.key + layer.value))
    if kernel == "standard":
        return ends + 4 * _HALF * layer.heads * tokens * layer.seen(tokens)
    tile = max(1, KERNELS[kernel].on_chip // (4 * _HALF * layer.key))  # queries, keys, values and outputs of a tile
    passes = -(-tokens // tile)
    return ends + (passes - 1) * _HALF * layer.seen(tokens) * layer.kv_heads * (layer.key + layer.value)


def decode_intensity(layer: AttentionLayer, kv: CacheFormat) -> float:
    """Operations a byte of a step's attention: of products with keys and values, over the cache that is read."""
    operations = 2 * layer.heads * (layer.key + layer.value)
    return operations / layer.row_bytes(kv)
