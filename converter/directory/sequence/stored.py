"""What is stored of the modules of a layer, taken from their data: the inverse of encode.ModuleEncoder.data."""

from math import prod

import numpy as np

from bitwright.formats.files.stored_tensor import NUMPY_DTYPES, to_float32
from bitwright.formats.schemes.registry import Scheme
from bitwright.formats.schemes.scheme import Tensors
from bitwright.profiles.planning.plan_modules import PlannedModule


def tensors_of(planned: PlannedModule, scheme: Scheme, data: np.ndarray) -> Tensors:
    """By suffix what is stored of a matrix. data: uint8 [n_bytes]."""
    tensors, start = Tensors(), 0
    for suffix, (dtype, shape) in scheme.tensors(*planned.tensor.shape).items():
        stop = start + prod(shape) * NUMPY_DTYPES[dtype].itemsize
        tensors[suffix] = data[start:stop].view(NUMPY_DTYPES[dtype]).reshape(shape)
        start = stop
    return tensors


def kept_values(planned: PlannedModule, data: np.ndarray) -> np.ndarray:
    """A tensor that is kept, as it reads: float32 of its shape."""
    dtype, shape = NUMPY_DTYPES[planned.format], planned.tensor.shape
    return to_float32(data[: prod(shape) * dtype.itemsize].view(dtype), planned.format).reshape(shape)
