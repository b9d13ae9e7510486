"""Products with quantized weights as llama.cpp computes them on a CPU, so that what is left between its logits and ours
is float32.

llama.cpp rounds the inputs of such a product to 8 bits (Q8_0, Q8_1, Q8_K) or to 16. Two computations that differ in the
last bit of an input round it differently now and then, by 1/127 of the largest input of its block; some products later
that is one per cent. So the inputs that llama.cpp has are watched, and ours are shifted by what rounding does to those:
every error but that of the rounding's own place stays ours.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitwright.converter.gguf.verify import DecodedArtifact
from bitwright.converter.judge.llama_cpp import LlamaCpp, shared_object
from bitwright.converter.model.stored_rows import restore
from bitwright.formats.files.gguf import EncodedTensor

_F32, _F16, _Q8_0, _Q8_1, _Q8_K, _BF16 = 0, 1, 8, 9, 15, 30
# Blocks of rounded inputs: ggml's block_q8_0, block_q8_1 (s: d times the sum of the codes) and block_q8_K.
_BLOCKS = {
    _Q8_0: np.dtype([("d", "<f2"), ("qs", "i1", 32)]),
    _Q8_1: np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)]),
    _Q8_K: np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)]),
}


class _Tensor(ctypes.Structure):
    """ggml_tensor."""


_Tensor._fields_ = (
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
)
_EvalCallback = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.POINTER(_Tensor), ctypes.c_bool, ctypes.c_void_p)


class _CpuTraits(ctypes.Structure):
    """ggml_type_traits_cpu."""

    _fields_ = (
        ("from_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


@cache
def _ggml() -> ctypes.CDLL:
    lib = shared_object()
    lib.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTraits)
    lib.ggml_op_name.restype = lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_get_name.argtypes = [ctypes.POINTER(_Tensor)]
    return lib


class WatchedLlamaCpp(LlamaCpp):
    """inputs: of every product with a stored matrix, by the matrix's name, as llama.cpp orders them: float32
    [n, n_columns]; of experts the inputs of all of them."""

    def __init__(self, path: Path, **options: Any):
        self.inputs: dict[str, np.ndarray] = {}
        self._callback = _EvalCallback(self._watch)
        super().__init__(path, **options)

    def _new_context(self, n_threads: int) -> int:
        lib, callback = self._lib, ctypes.cast(self._callback, ctypes.c_void_p).value

        class Watching:
            def __getattr__(self, name: str) -> Any:
                return getattr(lib, name)

            def llama_init_from_model(self, model: int, params: Any) -> int:
                params.cb_eval = callback
                return lib.llama_init_from_model(model, params)

        self._lib = Watching()  # type: ignore[assignment]
        return super()._new_context(n_threads)

    def _watch(self, pointer: Any, ask: bool, _: object) -> bool:
        """Called before a tensor is computed, to ask whether it is of interest, and when it is there."""
        product = pointer.contents
        if not _ggml().ggml_op_name(product.op).startswith(b"MUL_MAT"):
            return False
        matrix, inputs = product.src[0].contents, product.src[1].contents
        assert _ggml().ggml_get_name(product.src[0]) == matrix.name, "this build of ggml has another ggml_tensor"
        name = matrix.name.decode()
        if not name.endswith(".weight"):
            return False
        if not ask:
            shape = tuple(inputs.ne)[::-1]
            assert inputs.type == _F32 and inputs.nb[1] == 4 * inputs.ne[0], "inputs in one piece"
            values = np.ctypeslib.as_array(ctypes.cast(inputs.data, ctypes.POINTER(ctypes.c_float)), shape)
            self.inputs[name] = values.reshape(-1, shape[-1]).copy()
        return True


class RuntimeProducts:
    """The arithmetic of llama.cpp, see bitwright.calibration.stream.arithmetic.Arithmetic.

    inputs: as llama.cpp had them. distances: by the checkpoint's name of a matrix, how far our inputs were from those,
    relative to their size.
    """

    def __init__(self, artifact: DecodedArtifact, inputs: dict[str, np.ndarray]):
        self.artifact, self.inputs = artifact, inputs
        self.distances: dict[str, float] = {}

    def product(
        self, names: Sequence[str], inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ours = inputs.reshape(-1, inputs.shape[-1]).numpy()
        parts, first = [], 0
        for name in names:
            ((spec, _),) = self.artifact.tensors[name]
            n_rows = spec.n_rows // spec.n_matrices
            theirs = _nearest(ours, self.inputs[spec.name])
            self.distances[name] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
            rounded, missing = _rounded(theirs, self.artifact.stored[spec.name])
            shifted = torch.from_numpy((ours + (rounded - theirs)).astype(np.float32))
            product = shifted @ weight[first : first + n_rows].T
            if missing is not None:
                product += torch.from_numpy(missing) @ torch.from_numpy(self._minimums(name)).T
            parts.append(product)
            first += n_rows
        outputs = torch.cat(parts, dim=1)
        if bias is not None:
            outputs = outputs + bias
        return outputs.reshape(*inputs.shape[:-1], -1)

    def _minimums(self, name: str) -> np.ndarray:
        """Of the blocks of a matrix in Q4_1 or Q5_1, which have it after the scale: float32 [n_rows, n_blocks]."""
        ((spec, matrix),) = self.artifact.tensors[name]
        n_rows = spec.n_rows // spec.n_matrices
        stored = self.artifact.stored[spec.name]
        blocks = stored.read(matrix * n_rows, (matrix + 1) * n_rows).reshape(n_rows, spec.n_columns // 32, -1)
        minimums = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0].astype(np.float32)
        return restore(replace(spec, shape=minimums.shape, sources=(name,)), minimums)[name]

    def cached(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values


def _nearest(rows: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Of every row the one that is nearest: experts are given their inputs in an order of their own."""
    distances = np.square(rows[:, None] - among[None]).sum(axis=2)
    return among[distances.argmin(axis=1)]


def _rounded(inputs: np.ndarray, stored: EncodedTensor) -> tuple[np.ndarray, np.ndarray | None]:
    """The inputs as they are multiplied with such a matrix, float64. And of one with minimums, which are multiplied
    with the sum of a block's inputs in float16, what is missing at these sums: float32 [n, n_blocks]."""
    input_type = _ggml().ggml_get_type_traits_cpu(int(stored.ggml_type)).contents.vec_dot_type
    if input_type in _ROUNDED:
        return _ROUNDED[input_type](inputs).astype(np.float64), None
    blocks = np.zeros((len(inputs), inputs.shape[1] // _BLOCKS[input_type]["qs"].shape[0]), _BLOCKS[input_type])
    from_float = _ggml().ggml_get_type_traits_cpu(input_type).contents.from_float
    from_float(np.ascontiguousarray(inputs).ctypes.data, blocks.ctypes.data, inputs.size)
    steps = blocks["d"].astype(np.float64)
    rounded = (steps[..., None] * blocks["qs"]).reshape(inputs.shape)
    if input_type != _Q8_1:
        return rounded, None
    missing = blocks["s"] - steps * blocks["qs"].sum(axis=2, dtype=np.int64)
    return rounded, missing.astype(np.float32)


_ROUNDED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    _F32: lambda rows: rows,
    _F16: lambda rows: rows.astype(np.float16),
    _BF16: lambda rows: torch.from_numpy(rows).bfloat16().float().numpy(),
}
