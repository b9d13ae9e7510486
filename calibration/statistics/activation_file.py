"""The file of activation statistics.

safetensors  metadata "bitwright.activations": JSON with "version", "tensors" and the identity of the statistics
             "FIELD/TENSOR"   every field of MatrixInputs of every GGUF tensor, in its own dtype and shape
             "cached keys/LAYER", "cached values/LAYER"   float32 [n_heads, head_size], see CachedPeaks
"""

from dataclasses import fields
from pathlib import Path

import numpy as np

from bitwright.calibration.statistics.activations import ActivationStatistics, CachedPeaks, MatrixInputs
from bitwright.calibration.statistics.histogram import N_BINS, N_MAGNITUDES
from bitwright.formats.files.disk import rename
from bitwright.formats.files.record import RecordKind
from bitwright.formats.files.whole import Place

_KIND = RecordKind("bitwright.activations", 2, "file of activation statistics", "bitwright imatrix --activations MODEL")
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
_CACHED = ("keys", "values")
assert list(_CACHED) == [field.name for field in fields(CachedPeaks)]
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


def save_activations(path: Path, statistics: ActivationStatistics, place: Place = rename) -> None:
    """Write the file; it appears whole or not at all. The same statistics give the same bytes."""
    arrays: dict[str, np.ndarray] = {
        f"{key}/{name}": np.ascontiguousarray(getattr(inputs, key), dtype)
        for name, inputs in sorted(statistics.inputs.items())
        for key, dtype in _DTYPES.items()
    }
    for layer, cached in sorted(statistics.caches.items()):
        for key in _CACHED:
            arrays[f"cached {key}/{layer}"] = np.ascontiguousarray(getattr(cached, key), np.float32)
    identity = {key: getattr(statistics, key) for key in _IDENTITY}
    _KIND.save(path, {"tensors": sorted(statistics.inputs), **identity}, arrays, place)


def is_activations(path: Path) -> bool:
    """Whether the file holds activation statistics, be it of this version or another."""
    return _KIND.is_in(path)


def load_activations(path: Path) -> ActivationStatistics:
    """Read what save_activations wrote.

    Raises ConvertError for a file that is missing, truncated, of another version, of another kind, or holds impossible
    values.
    """
    where = str(path)
    header, arrays = _KIND.load(path)
    identity = _KIND.fields(where, header, _IDENTITY)
    names = header.get("tensors")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _KIND.damaged(where, "its tensors are no list of names")
    inputs = {name: _inputs(where, name, arrays) for name in names}
    caches = _caches(where, arrays)
    if arrays:
        raise _KIND.damaged(where, f"its values of {min(arrays)!r} belong to no tensor")
    return ActivationStatistics(inputs, **identity, caches=caches, where=where)


def _inputs(where: str, name: str, arrays: dict[str, np.ndarray]) -> MatrixInputs:
    fields_of_tensor = {}
    for key, dtype in _DTYPES.items():
        values = arrays.pop(f"{key}/{name}", None)
        if values is None or values.dtype != dtype or values.ndim != (1 if key in ("counts", "totals") else 2):
            raise _KIND.damaged(where, f"it lacks {np.dtype(dtype).name} values of {key} of {name!r}")
        fields_of_tensor[key] = values
    n_matrices = len(fields_of_tensor["counts"])
    bins = {"values": N_BINS, "peaks": N_MAGNITUDES + 1}
    if any(fields_of_tensor[key].shape != (n_matrices, n_bins) for key, n_bins in bins.items()):
        raise _KIND.damaged(where, f"the histograms of {name!r} have another number of bins")
    return MatrixInputs(**fields_of_tensor)


def _caches(where: str, arrays: dict[str, np.ndarray]) -> dict[int, CachedPeaks]:
    places = [key.removeprefix("cached keys/") for key in arrays if key.startswith("cached keys/")]
    caches = {}
    for layer in sorted(int(place) for place in places if place.isascii() and place.isdigit()):
        peaks = {}
        for key in _CACHED:
            values = arrays.pop(f"cached {key}/{layer}", None)
            if values is None or values.dtype != np.float32 or values.ndim != 2:
                raise _KIND.damaged(where, f"it lacks float32 magnitudes of the {key} of layer {layer}")
            peaks[key] = values
        caches[layer] = CachedPeaks(**peaks)
    return caches
