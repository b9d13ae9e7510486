"""Every scheme of a compressed-tensors directory that the encoder can write; the order is the order of listings."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import cast

import numpy as np

from bitwright.formats.bfloat16 import EPSILON_BITS, bfloat16, bfloat16_bits
from bitwright.formats.choices import Effort, FeedbackLevel
from bitwright.formats.encoding import check_importance, check_rows
from bitwright.formats.errors import ConvertError, nearest
from bitwright.formats.feedback.choose import feed_back
from bitwright.formats.feedback.moment_factor import Factor
from bitwright.formats.files.stored_tensor import NUMPY_DTYPES
from bitwright.formats.kernels.fp8_scales import GREATEST
from bitwright.formats.schemes.fp4_codec import Mxfp4Codec, Nvfp4Codec
from bitwright.formats.schemes.fp8_codec import Fp8Codec
from bitwright.formats.schemes.int_codec import IntegerCodec
from bitwright.formats.schemes.row_chunks import for_row_chunks
from bitwright.formats.schemes.scheme import (
    ActivationScheme,
    BlockCodec,
    Codec,
    SharingCodec,
    Tensors,
    TensorShapes,
    TunableRows,
    WeightScheme,
)

# The greatest scale times the greatest value.
_NVFP4_LIMIT = float(GREATEST) * 6


@dataclass(frozen=True)
class Scheme:
    """A linear layer's quantization: how its weights are stored, and what the runtime does with its input.

    format: compressed-tensors' name of the storage; activations: None where the input stays as it is.
    """

    name: str
    format: str
    weights: WeightScheme
    activations: ActivationScheme | None
    codec: Codec

    def tensors(self, n_rows: int, n_columns: int) -> TensorShapes:
        """What is stored of a matrix, by suffix: safetensors' dtype and the shape; the input's scale is among them."""
        return self.codec.tensors(n_rows, n_columns) | self._input_tensors()

    def n_bytes(self, n_rows: int, n_columns: int) -> int:
        tensors = self.tensors(n_rows, n_columns).values()
        return sum(prod(shape) * NUMPY_DTYPES[dtype].itemsize for dtype, shape in tensors)

    def bits_per_weight(self, n_rows: int, n_columns: int) -> float:
        return self.n_bytes(n_rows, n_columns) * 8 / (n_rows * n_columns)

    @property
    def column_multiple(self) -> int:
        """Of what the number of columns has to be a multiple."""
        return self.weights.group_size or (self.weights.block_structure or (1, 1))[1]

    def fits(self, n_rows: int, n_columns: int) -> bool:
        return n_rows > 0 and n_columns > 0 and n_columns % self.column_multiple == 0

    def check_shape(self, n_rows: int, n_columns: int, where: str) -> None:
        """Raises ConvertError for a matrix that the scheme cannot hold, with the schemes alike that can."""
        if self.fits(n_rows, n_columns):
            return
        kind = (self.weights.num_bits, self.weights.type)
        alike = (s for s in SCHEMES.values() if (s.weights.num_bits, s.weights.type) == kind)
        fitting = [scheme.name for scheme in alike if scheme.fits(n_rows, n_columns)]
        raise ConvertError(
            f"{self.name} needs a multiple of {self.column_multiple} columns, and the matrix is {n_rows} x {n_columns}",
            where,
            f"give it {' or '.join(fitting)}" if fitting else "leave it unquantized",
        )

    def encode(
        self,
        rows: np.ndarray,
        importance: np.ndarray | None = None,
        *,
        effort: Effort = "best",
        global_scale: float | None = None,
        n_threads: int = 1,
    ) -> Tensors:
        """The tensors of a whole matrix but the input's; of BF16 and F8_E4M3 the bits.

        rows: float32 [n_rows, n_columns], C-contiguous; importance: float32 [n_columns] or None.
        global_scale: of matrices that share one (shared_scale); by default the matrix's own.
        The bytes do not depend on n_threads.
        Raises ConvertError for a weight that is not finite or an importance that is negative or not finite, ValueError
        for a wrong dtype or shape.
        """
        check_rows(rows, 1)
        if importance is not None:
            check_importance(importance, rows.shape[1])
        self.check_shape(rows.shape[0], rows.shape[1], self.name)
        return self.codec.encode(rows, importance, effort, global_scale, n_threads)

    @property
    def takes_feedback(self) -> bool:
        """Whether codes can be chosen anew under the second moments of the inputs."""
        return self.weights.type == "int" or self.weights.num_bits == 4

    def feed_back(
        self,
        tensors: Tensors,
        rows: np.ndarray,
        factor: Factor,
        level: FeedbackLevel = "best",
        *,
        effort: Effort = "best",
        n_threads: int = 1,
    ) -> Tensors:
        """tensors, what `encode` has made of the rows with factor.importance, with the codes of a row chosen together
        (feedback/choose.py); only where takes_feedback. factor: of unit 1. The bytes do not depend on n_threads."""
        assert self.takes_feedback
        n_rows, n_columns = rows.shape
        codec = cast(BlockCodec, self.codec)
        blocks, multiplier = codec.block_rows(n_columns), codec.block_factor(tensors)
        data = codec.to_blocks(tensors, (n_rows, n_columns))
        fed = np.empty_like(data)

        def work(chunk: slice) -> None:
            fed[chunk] = feed_back(blocks, rows[chunk] * multiplier, data[chunk], factor, level, effort)

        for_row_chunks(n_rows, n_columns, n_threads, work)
        return codec.from_blocks(fed, tensors)

    @property
    def is_tunable(self) -> bool:
        """Whether scales and levels can be moved by gradients, and gain by it: levels of 8 bits lie too near to one
        another."""
        return self.takes_feedback and self.weights.num_bits < 8

    def tunable(self, tensors: Tensors, shape: tuple[int, int]) -> TunableRows:
        """A matrix of this shape as rows of blocks whose scales and levels can be moved; only where is_tunable."""
        assert self.is_tunable
        return cast(BlockCodec, self.codec).tunable(tensors, shape)

    def tuned(self, data: np.ndarray, tensors: Tensors) -> Tensors:
        """What is stored of a matrix whose `tunable` rows have become these, uint8 [n_rows, row_bytes]; tensors: what
        was stored of it before."""
        return cast(BlockCodec, self.codec).tuned(data, tensors)

    def decode(self, tensors: Tensors, shape: tuple[int, int]) -> np.ndarray:
        """The weights that a runtime computes with, float32 [n_rows, n_columns], before it rounds them to its dtype."""
        return self.codec.decode(tensors, shape)

    @property
    def has_global_scale(self) -> bool:
        """Whether a whole matrix has a scale, which matrices have to share that a runtime multiplies as one."""
        return self.weights.strategy in ("tensor", "tensor_group")

    def shared_scale(
        self,
        read: Callable[[], Iterable[np.ndarray]],
        importance: np.ndarray | None = None,
        *,
        effort: Effort = "best",
        n_threads: int = 1,
    ) -> float:
        """The global_scale for encode that suits several matrices together; only where has_global_scale.

        read: gives the rows of one matrix after another, anew with each call; importance: of the columns of all.
        Of NVFP4 it is what weight_global_scale holds, a divisor; of FP8 per tensor it is weight_scale itself.
        Raises ConvertError for a weight that is not finite.
        """
        assert self.has_global_scale

        def checked() -> Iterator[np.ndarray]:
            for rows in read():
                check_rows(rows, 1)
                yield rows

        return cast(SharingCodec, self.codec).shared_scale(checked, importance, effort, n_threads)

    def encode_input(self, low: float, high: float) -> Tensors:
        """The stored scale of an input whose values lie in low .. high, or are cut off there; empty where none is."""
        tensors = self._input_tensors()
        if not tensors:
            return {}
        low, high = min(low, 0.0), max(high, 0.0)
        largest = max(high, -low)
        if "input_global_scale" in tensors:
            divisor = _NVFP4_LIMIT / largest if largest > 0 else 1.0
            return {"input_global_scale": np.array([divisor], np.float32)}
        assert self.activations is not None
        if not self.activations.symmetric:
            scale = _positive_bfloat16((high - low) / 255)
            zero_point = np.clip(np.rint(-128 - low / bfloat16(scale)), -128, 127).astype(np.int8)
            return {"input_scale": scale, "input_zero_point": zero_point}
        return {
            "input_scale": _positive_bfloat16(largest / (127.5 if self.activations.type == "int" else float(GREATEST)))
        }

    def _input_tensors(self) -> TensorShapes:
        if self.activations is None or self.activations.dynamic is True:
            return {}
        if self.activations.dynamic == "local":
            return {"input_global_scale": ("F32", (1,))}
        zero_point: TensorShapes = {} if self.activations.symmetric else {"input_zero_point": ("I8", (1,))}
        return {"input_scale": ("BF16", (1,))} | zero_point


def _positive_bfloat16(value: float) -> np.ndarray:
    """Bits uint16 [1]; of a zero, epsilon's."""
    return bfloat16_bits(np.array([value], np.float32)) if value > 0 else EPSILON_BITS.reshape(1)


_PER_TOKEN = ActivationScheme(8, "int", "token")
_CHANNEL_INT8 = WeightScheme(8, "int", "channel")


def _int8(name: str, activations: ActivationScheme) -> Scheme:
    return Scheme(name, "int-quantized", _CHANNEL_INT8, activations, IntegerCodec(_CHANNEL_INT8, packed=False))


def _packed(name: str, weights: WeightScheme) -> Scheme:
    return Scheme(name, "pack-quantized", weights, None, IntegerCodec(weights, packed=True))


def _int4(group_size: int, symmetric: bool) -> Scheme:
    name = "W4A16" + ("" if symmetric else "_ASYM") + ("" if group_size == 128 else f"_G{group_size}")
    return _packed(name, WeightScheme(4, "int", "group", group_size, symmetric=symmetric))


def _fp8(name: str, weights: WeightScheme, activations: ActivationScheme) -> Scheme:
    return Scheme(name, "float-quantized", weights, activations, Fp8Codec(weights))


def _nvfp4(name: str, activations: ActivationScheme | None) -> Scheme:
    weights = WeightScheme(4, "float", "tensor_group", 16, scale_dtype="torch.float8_e4m3fn")
    return Scheme(name, "nvfp4-pack-quantized", weights, activations, Nvfp4Codec())


def _mxfp4(name: str, activations: ActivationScheme | None) -> Scheme:
    weights = WeightScheme(4, "float", "group", 32, scale_dtype="torch.uint8")
    return Scheme(name, "mxfp4-pack-quantized", weights, activations, Mxfp4Codec())


_ALL = (
    _int8("W8A8", _PER_TOKEN),
    _int8("W8A8_STATIC", ActivationScheme(8, "int", "tensor", dynamic=False)),
    _int8("W8A8_STATIC_ASYM", ActivationScheme(8, "int", "tensor", dynamic=False, symmetric=False)),
    _packed("W8A16", WeightScheme(8, "int", "group", 128)),
    _packed("W8A16_CHANNEL", _CHANNEL_INT8),
    *(_int4(group_size, symmetric) for symmetric in (True, False) for group_size in (128, 64, 32)),
    _fp8("FP8", WeightScheme(8, "float", "channel"), ActivationScheme(8, "float", "token")),
    _fp8("FP8_STATIC", WeightScheme(8, "float", "tensor"), ActivationScheme(8, "float", "tensor", dynamic=False)),
    _fp8(
        "FP8_BLOCK",
        WeightScheme(8, "float", "block", block_structure=(128, 128)),
        ActivationScheme(8, "float", "group", group_size=128),
    ),
    _nvfp4(
        "NVFP4",
        ActivationScheme(4, "float", "tensor_group", "local", group_size=16, scale_dtype="torch.float8_e4m3fn"),
    ),
    _nvfp4("NVFP4A16", None),
    _mxfp4("MXFP4", ActivationScheme(4, "float", "group", group_size=32, scale_dtype="torch.uint8")),
    _mxfp4("MXFP4A16", None),
)

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}


def get_scheme(name: str, where: str = "scheme name") -> Scheme:
    """The scheme of that name, in any letter case; an unknown one is an error with the nearest match."""
    try:
        return SCHEMES[name.upper().replace("-", "_")]
    except KeyError:
        raise ConvertError(f"unknown scheme {name!r}", where, nearest(name, list(SCHEMES))) from None
