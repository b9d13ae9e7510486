"""The file of activation statistics.

safetensors  metadata "bitwright.activations": JSON with "version", "tensors" and the identity of the statistics
             "FIELD/TENSOR"   every field of MatrixInputs of every GGUF tensor, in its own dtype and shape
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from calibration.activations import ActivationStatistics, MatrixInputs
from calibration.histogram import N_BINS, N_MAGNITUDES
from formats.errors import ConvertError
from formats.whole_file import whole_file

_KEY = "bitwright.activations"
_VERSION = 1
_DTYPES: dict[str, type] = {
    "minima": np.float32,
    "maxima": np.float32,
    "squares": np.float64,
    "counts": np.int64,
    "totals": np.float64,
    "values": np.int64,
    "peaks": np.int64,
    "ranges": np.float64,
}
assert list(_DTYPES) == [field.name for field in fields(MatrixInputs)]
_IDENTITY: dict[str, tuple[type, ...]] = {
    "model": (str, type(None)),
    "revision": (str, type(None)),
    "corpus": (str,),
    "corpus_sha256": (str,),
    "samples": (int,),
    "sequence_length": (int,),
    "transform": (str,),
    "decay": (float, int),
}


def save_activations(path: Path, statistics: ActivationStatistics) -> None:
    """Write the file; it appears whole or not at all. The same statistics give the same bytes."""
    arrays: dict[str, np.ndarray] = {
        f"{key}/{name}": np.ascontiguousarray(getattr(inputs, key), dtype)
        for name, inputs in sorted(statistics.inputs.items())
        for key, dtype in _DTYPES.items()
    }
    header = {
        "version": _VERSION,
        "tensors": sorted(statistics.inputs),
        **{key: getattr(statistics, key) for key in _IDENTITY},
    }
    data = save(arrays, {_KEY: json.dumps(header, sort_keys=True)})
    with whole_file(path, "file of activation statistics") as file:
        file.write(data)


def is_activations(path: Path) -> bool:
    """Whether the file holds activation statistics, be it of this version or another."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="numpy") as file:
            return _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load_activations(path: Path) -> ActivationStatistics:
    """Read what save_activations wrote.

    Raises ConvertError for a file that is missing, truncated, of another version, of another kind, or holds impossible
    values.
    """
    where = str(path)
    try:
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ConvertError(
                    "this safetensors file holds no activation statistics",
                    where,
                    "give the file that `convert imatrix --activations` wrote",
                )
            header = _parse(where, text)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ConvertError(
            "there is no such file", where, "check the path of the file of activation statistics"
        ) from None
    except (SafetensorError, OSError) as error:
        raise _damaged(where, str(error)) from None
    names = header.get("tensors")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _damaged(where, "its tensors are no list of names")
    inputs = {name: _inputs(where, name, arrays) for name in names}
    if arrays:
        raise _damaged(where, f"its values of {min(arrays)!r} belong to no tensor")
    return ActivationStatistics(inputs, **{key: header[key] for key in _IDENTITY}, where=where)


def _inputs(where: str, name: str, arrays: dict[str, np.ndarray]) -> MatrixInputs:
    found = {}
    for key, dtype in _DTYPES.items():
        values = arrays.pop(f"{key}/{name}", None)
        if values is None or values.dtype != dtype or values.ndim != (1 if key in ("counts", "totals") else 2):
            raise _damaged(where, f"it lacks {np.dtype(dtype).name} values of {key} of {name!r}")
        found[key] = values
    n_matrices = len(found["counts"])
    bins = {"values": N_BINS, "peaks": N_MAGNITUDES + 1}
    if any(found[key].shape != (n_matrices, n_bins) for key, n_bins in bins.items()):
        raise _damaged(where, f"the histograms of {name!r} have another number of bins")
    return MatrixInputs(**found)


def _parse(where: str, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"its description is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise _damaged(where, "its description is no JSON object")
    if header.get("version") != _VERSION:
        raise ConvertError(
            f"the statistics are of version {header.get('version')!r}, this release reads version {_VERSION}",
            where,
            "compute them again: convert imatrix --activations MODEL",
        )
    for key, allowed in _IDENTITY.items():
        if key not in header or type(header[key]) not in allowed:
            raise _damaged(where, f"{key} is {header.get(key)!r}")
    return header


def _damaged(where: str, problem: str) -> ConvertError:
    return ConvertError(
        f"the file of activation statistics is damaged: {problem}",
        where,
        "compute it again: convert imatrix --activations MODEL",
    )
