"""llama.cpp's two files of importance: GGUF, and the older .dat.

    GGUF   general.type "imatrix"; imatrix.datasets (strings), imatrix.chunk_count and imatrix.chunk_size (uint32);
           per weight, sorted by name, float32 tensors `NAME.in_sum2` [columns, matrices], the sums of squared inputs,
           and `NAME.counts` [1, matrices], the rows they were summed over.
           Ours, ignored by llama.cpp: bitwright.source.model, bitwright.source.revision, bitwright.corpus_sha256, and
           bitwright.super_weights, the JSON of a SuperWeightReport.
    .dat   int32 entries; per entry int32 length, name, int32 chunks, int32 values, float32[values] = mean * chunks,
           the matrices one after the other; at the end int32 chunks, int32 length, name of the text.
           Little endian throughout. It has no counts, so a tensor counts as many rows as chunks, and it does not say
           how many matrices a tensor has: ImportanceMatrix.shaped_as tells experts apart.

Layouts as of llama.cpp's tools/imatrix (July 2025 for GGUF).
"""

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import rename
from bitwright.formats.files.gguf import TensorEntry, lay_out, padded, read_gguf
from bitwright.formats.files.regular_file import open_regular
from bitwright.formats.files.whole import Place, whole_file

_TYPE, _DATASETS = "general.type", "imatrix.datasets"
_CHUNK_COUNT, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_IDENTITY = {
    "bitwright.source.model": "model",
    "bitwright.source.revision": "revision",
    "bitwright.corpus_sha256": "corpus_sha256",
}
_SUMS, _COUNTS = ".in_sum2", ".counts"
_SUPER_WEIGHTS = "bitwright.super_weights"
# What chunk_size says of a matrix whose chunks are not known in tokens: its counts are chunks then.
_CHUNKS_ARE_ROWS = 1
# More than any tensor has; an entry of a damaged file that claims more is refused before memory is asked for.
_MAX_NAME_BYTES = 1024


def load_imatrix(path: Path) -> ImportanceMatrix:
    """Read a GGUF or .dat importance matrix, told apart by its first bytes.

    Raises ConvertError for a file that is missing, truncated, neither of the two, or holds impossible values.
    """
    try:
        with open_regular(path, "check the path given to --imatrix") as file:
            magic = file.read(4)
        if magic == b"GGUF":
            return _load_gguf(path)
        if len(magic) < 4:
            raise _damaged(path, "it is empty")
        # Mapped, not read: a path given by mistake may name a file larger than memory.
        return _load_dat(path, np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise ConvertError(
            f"the importance matrix cannot be read ({error.strerror})", str(path), "check the path given to --imatrix"
        ) from error


def save_imatrix(path: Path, matrix: ImportanceMatrix, place: Place = rename) -> None:
    """Write a GGUF, or a .dat when the path ends so; the file appears whole or not at all.

    .dat: an expert without rows gets the columns that ImportanceMatrix.columns gives it, and all experts one count;
    super weights are left out.
    """
    with whole_file(path, "importance matrix", place=place) as file:
        file.writelines(_dat_parts(matrix) if path.suffix == ".dat" else _gguf_parts(path.name, matrix))


def _load_gguf(path: Path) -> ImportanceMatrix:
    reader = read_gguf(path)
    if reader.value(_TYPE, str) != "imatrix":
        raise ConvertError(
            "this GGUF file is no importance matrix",
            str(path),
            "give the file that `bitwright imatrix` or llama-imatrix wrote",
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sums, counts = {}, {}
    for name, tensor in tensors.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counted = tensors.get(weight + _COUNTS)
        if counted is None or {tensor.ggml_type, counted.ggml_type} != {GGMLQuantizationType.F32}:
            raise _damaged(path, f"{weight} lacks float32 sums and counts")
        sums[weight] = tensor.decode(0, tensor.n_rows).astype(np.float64)
        counts[weight] = _whole_counts(path, weight, counted.decode(0, counted.n_rows).astype(np.float64).reshape(-1))
    if not sums:
        raise _damaged(path, "it has no entries")
    datasets, size = reader.value(_DATASETS, list), reader.value(_CHUNK_SIZE, int)
    super_weights = reader.value(_SUPER_WEIGHTS, str)
    identity: dict[str, Any] = {field: reader.value(key, str) for key, field in _IDENTITY.items()}
    return ImportanceMatrix(
        sums,
        counts,
        corpus=", ".join(map(str, datasets or [])) or None,
        samples=reader.value(_CHUNK_COUNT, int) or None,
        sequence_length=size if size and size != _CHUNKS_ARE_ROWS else None,
        super_weights=SuperWeightReport.from_json(super_weights, str(path)) if super_weights is not None else None,
        where=str(path),
        **identity,
    )


def _whole_counts(path: Path, weight: str, counts: np.ndarray) -> np.ndarray:
    if not (np.isfinite(counts) & (counts >= 0) & (counts < 2**53)).all():
        raise _damaged(path, f"{weight} has impossible counts")
    return np.asarray(np.rint(counts), np.int64)


def _gguf_parts(file_name: str, matrix: ImportanceMatrix) -> Iterable[bytes]:
    metadata = {
        _TYPE: GGUFValue("imatrix", GGUFValueType.STRING),
        _DATASETS: GGUFValue([matrix.corpus or "unknown"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        _CHUNK_COUNT: GGUFValue(matrix.samples or 0, GGUFValueType.UINT32),
        _CHUNK_SIZE: GGUFValue(matrix.sequence_length or _CHUNKS_ARE_ROWS, GGUFValueType.UINT32),
    }
    for key, field in _IDENTITY.items():
        if (value := getattr(matrix, field)) is not None:
            metadata[key] = GGUFValue(value, GGUFValueType.STRING)
    if matrix.super_weights is not None:
        metadata[_SUPER_WEIGHTS] = GGUFValue(matrix.super_weights.to_json(), GGUFValueType.STRING)
    tensors = {}
    for weight in matrix.sums:
        tensors[weight + _SUMS] = matrix.sums[weight]
        tensors[weight + _COUNTS] = matrix.counts[weight].reshape(-1, 1)
    tensors = {name: np.ascontiguousarray(tensors[name], "<f4") for name in sorted(tensors)}
    entries = [TensorEntry(name, t.shape, GGMLQuantizationType.F32, t.nbytes) for name, t in tensors.items()]
    yield lay_out(file_name, metadata, entries)[0].header
    for tensor in tensors.values():
        yield tensor.tobytes() + bytes(padded(tensor.nbytes) - tensor.nbytes)


def _load_dat(path: Path, data: np.ndarray) -> ImportanceMatrix:
    position = 0

    def take(count: int, dtype: str = "<i4") -> np.ndarray:
        nonlocal position
        n_bytes = count * np.dtype(dtype).itemsize
        if count < 0 or position + n_bytes > len(data):
            raise _damaged(path, f"it ends at byte {len(data)}, amid what byte {position} announces")
        values = np.frombuffer(data, dtype, count, position)
        position += n_bytes
        return values

    def take_int() -> int:
        return int(take(1)[0])

    def take_name(length: int) -> str:
        if not 0 < length <= _MAX_NAME_BYTES:
            raise _damaged(path, f"at byte {position} it announces a name of {length} bytes")
        return take(length, "u1").tobytes().decode("utf-8", "replace")

    n_entries = take_int()
    if n_entries <= 0:
        raise _damaged(path, f"it announces {n_entries} entries")
    sums, counts = {}, {}
    for _ in range(n_entries):
        name, chunks, n_values = take_name(take_int()), take_int(), take_int()
        if name in sums:
            raise _damaged(path, f"{name} is there twice")
        if chunks <= 0 or n_values <= 0:
            raise _damaged(path, f"{name} has {n_values} values of {chunks} chunks")
        values = take(n_values, "<f4")
        if not np.isfinite(values).all():
            raise _damaged(path, f"{name} has values that are not finite")
        sums[name] = values.astype(np.float64).reshape(1, -1)
        counts[name] = np.array([chunks])
    samples = take_int() if position < len(data) else None
    corpus = take_name(take_int()) if position < len(data) else None
    return ImportanceMatrix(sums, counts, corpus=corpus, samples=samples, where=str(path))


def _dat_parts(matrix: ImportanceMatrix) -> Iterable[bytes]:
    yield struct.pack("<i", len(matrix.sums))
    for name in sorted(matrix.sums):
        means = matrix.columns(name)
        chunks = max(1, -(-int(matrix.counts[name].max()) // (matrix.sequence_length or _CHUNKS_ARE_ROWS)))
        yield _dat_name(name) + struct.pack("<ii", chunks, means.size)
        yield (means * np.float32(chunks)).astype("<f4").tobytes()
    yield struct.pack("<i", matrix.samples or 0) + _dat_name(matrix.corpus or "unknown")


def _dat_name(name: str) -> bytes:
    encoded = name.encode()
    return struct.pack("<i", len(encoded)) + encoded


def _damaged(path: Path, problem: str) -> ConvertError:
    return ConvertError(
        f"the importance matrix is damaged: {problem}", str(path), "copy or compute it again: bitwright imatrix MODEL"
    )


def is_imatrix(path: Path) -> bool:
    """Whether the file is an importance matrix: a .dat, or a GGUF that says so."""
    if path.suffix == ".dat":
        return path.is_file()
    if path.suffix != ".gguf" or not path.is_file():
        return False
    return read_gguf(path).value(Keys.General.TYPE, str) == "imatrix"
