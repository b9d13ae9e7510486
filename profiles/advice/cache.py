"""The cache of keys and values: what attention keeps of a text, in bytes, whatever a model's layers are like."""

from collections.abc import Mapping
from dataclasses import dataclass

from bitwright.formats.errors import ConvertError, nearest


@dataclass(frozen=True)
class CacheFormat:
    """How keys and values are stored: a block of so many numbers in so many bytes."""

    name: str
    block: int
    n_bytes: int

    @property
    def bits(self) -> float:
        return self.n_bytes * 8 / self.block

    def row_bytes(self, n_values: int) -> int:
        """Bytes of a row of n_values numbers, in whole blocks."""
        return -(-n_values // self.block) * self.n_bytes


CACHE_FORMATS: Mapping[str, CacheFormat] = {
    each.name: each
    for each in (
        CacheFormat("F32", 1, 4),
        CacheFormat("F16", 1, 2),
        CacheFormat("BF16", 1, 2),
        CacheFormat("Q8_0", 32, 34),  # ggml's block_q8_0: a float16 scale and 32 levels
        CacheFormat("Q4_0", 32, 18),
        CacheFormat("FP8", 1, 1),  # one scale a layer, for keys and for values
        CacheFormat("NVFP4", 16, 9),  # an FP8 scale and 16 values
    )
}


def cache_format(name: str, where: str = "--kv") -> CacheFormat:
    """Raises ConvertError for a name that is none."""
    if name not in CACHE_FORMATS:
        raise ConvertError(f"unknown format of keys and values {name!r}", where, nearest(name, list(CACHE_FORMATS)))
    return CACHE_FORMATS[name]


@dataclass(frozen=True)
class AttentionLayer:
    """A layer's attention. heads: of queries; kv_heads: of keys and values. key, value: numbers in a head. window: how
    many tokens it sees, 0 for all. latent: keys are kept, and values are a part of them (MLA). shared: it attends to
    the keys and values of an earlier layer, and keeps none."""

    heads: int
    kv_heads: int
    key: int
    value: int
    window: int = 0
    latent: bool = False
    shared: bool = False

    def row_bytes(self, kv: CacheFormat) -> int:
        """Bytes of a token's keys and values."""
        values = 0 if self.latent else kv.row_bytes(self.kv_heads * self.value)
        return kv.row_bytes(self.kv_heads * self.key) + values

    def seen(self, context: int) -> int:
        """The tokens that the last one of a text attends to."""
        return min(context, self.window) if self.window else context


@dataclass(frozen=True)
class Cells:
    """How a runtime takes memory for tokens: in pages of so many; a sliding window keeps `ahead` tokens beside it."""

    page: int
    ahead: int

    def of(self, context: int, window: int) -> int:
        whole = self._paged(context)
        return min(whole, self._paged(min(window + self.ahead, whole))) if window else whole

    def _paged(self, tokens: int) -> int:
        return -(-tokens // self.page) * self.page


LLAMA_CPP_CELLS = Cells(256, 512)
"""n_ctx is rounded up to 256; a window's cache holds a micro-batch (-ub 512) more than the window."""
VLLM_CELLS = Cells(16, 0)
"""Blocks of 16 tokens; blocks that have left a window are given back."""


@dataclass(frozen=True)
class Cache:
    """What a model keeps of each text. layers: those with attention. state_bytes: of convolutions and recurrences, in
    float32, whatever the length of the text."""

    layers: tuple[AttentionLayer, ...]
    state_bytes: int = 0

    def token_bytes(self, kv: CacheFormat) -> int:
        """Bytes that a further token takes, once every window is full."""
        return sum(layer.row_bytes(kv) for layer in self._keeping if not layer.window)

    def allocated(self, context: int, sequences: int, kv: CacheFormat, cells: Cells = LLAMA_CPP_CELLS) -> int:
        """Bytes that a runtime takes for so many texts of so many tokens."""
        rows = sum(layer.row_bytes(kv) * cells.of(context, layer.window) for layer in self._keeping)
        return sequences * (rows + self.state_bytes)

    def read(self, context: int, kv: CacheFormat) -> int:
        """Bytes that a step reads of one text: keys and values of what it attends to, and states, which it writes back,
        too."""
        rows = sum(layer.row_bytes(kv) * layer.seen(context) for layer in self.layers)
        return rows + 2 * self.state_bytes

    def longest(self, n_bytes: int, sequences: int, kv: CacheFormat, cells: Cells, limit: int) -> int:
        """The longest context, at most `limit`, whose cache takes at most n_bytes; 0 where none does."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.allocated(middle, sequences, kv, cells) <= n_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    @property
    def _keeping(self) -> tuple[AttentionLayer, ...]:
        return tuple(layer for layer in self.layers if not layer.shared)
