"""A Checkpoint: a model as it is stored, whose tensors stay on disk until rows of them are asked for."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_writer import GGUFValue

from formats.encoding import check_finite
from formats.errors import ConvertError
from formats.names import is_text, printable
from formats.regular_file import LARGEST_METADATA_BYTES, check_size, open_regular, read_whole
from formats.safetensors_file import DTYPE_BITS

LICENSE_PATTERNS = ("LICENSE*", "NOTICE*")
"""What goes with a model wherever it goes, and no conversion reads."""
TEMPLATES = "additional_chat_templates"
"""The only folder of a checkpoint that is looked into."""
INDEX_NAME = "model.safetensors.index.json"
METADATA_PATTERNS = (
    *("config.json", "generation_config.json", INDEX_NAME, "adapter_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.json", "*.jinja", "README.md"),
)
"""Everything beside the weights that a conversion reads; also all that is fetched of a Hub repository."""

# numpy has no bfloat16: its bits are read as uint16 and become the upper half of a float32.
_NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
DTYPE_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in _NUMPY_DTYPES.items()}
"""Of the dtypes that weights are read in."""
_BLOCK_WEIGHTS = 1 << 20


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype, one of DTYPE_BITS, of which a Checkpoint reads those of DTYPE_BYTES; shape, slowest
    dimension first; offset of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def n_columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def n_rows(self) -> int:
        """Rows over all matrices of the tensor; a vector is one row."""
        n_rows = 1
        for dimension in self.shape[:-1]:
            n_rows *= dimension
        return n_rows

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.n_columns * DTYPE_BITS[self.dtype] // 8


@dataclass(frozen=True)
class Checkpoint:
    """A model as it is stored.

    location: the directory, or the GGUF file.
    model_id: Hub id, or the name of the directory or file.
    revision: commit hash on the Hub, None elsewhere.
    config: config.json, with the text model's own configuration on top where the model has other parts too; of a
        GGUF the architecture alone.
    tensors: every stored tensor by its name, as transformers takes it.
    notes: what of its files is not read, or read otherwise than they say, a sentence each.
    metadata: the key-value pairs of a GGUF; None for a Hugging Face checkpoint.
    fetch_weights: brings the weights to this machine and opens them; None when they are here.
    """

    location: Path
    model_id: str
    revision: str | None
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    metadata: dict[str, GGUFValue] | None = None
    notes: tuple[str, ...] = ()
    fetch_weights: Callable[[], "Checkpoint"] | None = field(default=None, compare=False, repr=False)

    def with_weights(self) -> "Checkpoint":
        """This checkpoint with its weights on this machine; downloads what is missing.

        Raises ConvertError where a head that was the embedding at some places, before the weights were here, is not.
        """
        if self.fetch_weights is None:
            return self
        fetched = self.fetch_weights()
        if fetched.tensors.keys() != self.tensors.keys():
            raise ConvertError(
                "the head was taken for the embedding, after comparing some places of both; the weights say otherwise",
                self.model_id,
                "run the same command again: the weights are here now, and it begins with them",
            )
        return fetched

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop, counted over all matrices of the tensor: float32 [stop - start, n_columns]; the values
        of a vector: float32 [n_values]. Raises ConvertError for a value that is not finite: whoever reads the weights
        first finds it, and nothing is made of it.

        Reads with plain file reads, from any thread: a mapping would count every page it has touched as resident
        memory, and end the process when a file is cut short under it.
        """
        tensor = self.tensors[name]
        stop = tensor.n_rows if stop is None else stop
        if not 0 <= start <= stop <= tensor.n_rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {tensor.n_rows}")
        row_bytes = tensor.n_columns * DTYPE_BYTES[tensor.dtype]
        n_values = (stop - start) * tensor.n_columns
        values = np.fromfile(
            tensor.file, _NUMPY_DTYPES[tensor.dtype], count=n_values, offset=tensor.offset + start * row_bytes
        )
        if values.size != n_values:
            raise ConvertError(
                f"the file ends inside the tensor {name!r}", str(tensor.file), "fetch or copy this file again"
            )
        weights = _to_float32(values, tensor.dtype).reshape(stop - start, tensor.n_columns)
        try:
            check_finite(weights, start)
        except ConvertError as error:
            raise ConvertError(error.what, f"{tensor.file}: tensor {name}, {error.where}", error.remedy) from None
        return weights.reshape(-1) if len(tensor.shape) < 2 else weights

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The whole tensor as `read` has it, in parts of some rows, for what need not hold all of it at once."""
        tensor = self.tensors[name]
        for start, stop in block_spans(tensor.n_rows, tensor.n_columns):
            yield self.read(name, start, stop)

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows of these indices, in their order: float32 [len(rows), n_columns]."""
        tensor = self.tensors[name]
        shape = (tensor.n_rows, tensor.n_columns)
        mapped = np.memmap(tensor.file, _NUMPY_DTYPES[tensor.dtype], "r", tensor.offset, shape)
        return _to_float32(mapped[rows], tensor.dtype)

    def files(self) -> list[tuple[str, int, str]]:
        """(relative name, bytes, identity) of every file that the conversion reads, sorted by name.

        The identity is "sha256:..." of the content of small files. Of weights it is the commit on the Hub, the same
        before and after their download, with the bytes of the tensors; elsewhere a hash of the file's beginning, where
        the header is, and the modification time: hashing terabytes is no option.
        """
        if self.location.is_file():
            return [(self.location.name, self.location.stat().st_size, _weights_identity(self.location))]
        small = metadata_files(self.location)
        entries = [
            (path.relative_to(self.location).as_posix(), path.stat().st_size, _content_identity(path)) for path in small
        ]
        weights: dict[Path, int] = {}
        for tensor in self.tensors.values():
            weights[tensor.file] = weights.get(tensor.file, 0) + tensor.n_bytes
        for path, n_bytes in weights.items():
            if self.revision is not None:
                entries.append((path.name, n_bytes, f"commit:{self.revision}"))
            else:
                entries.append((path.name, path.stat().st_size, _weights_identity(path)))
        return sorted(entries)


def block_spans(n_rows: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in parts of about a million weights: (first row, the one after the last)."""
    step = max(1, _BLOCK_WEIGHTS // n_columns)
    return ((start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def metadata_files(directory: Path) -> list[Path]:
    """Those files of a checkpoint that METADATA_PATTERNS name, by name. Raises ConvertError as model_files does."""
    return model_files(directory, METADATA_PATTERNS)


def model_files(directory: Path, patterns: Sequence[str]) -> list[Path]:
    """Those files of a checkpoint, those in its folder of templates included, that the patterns name, by name.

    Raises ConvertError for one that has a name of no UTF-8, is no regular file, is larger than any of its kind, or is a
    link to a file that is not the model's: what it names would be read, and copied into an artifact that others are
    given.
    """
    found = []
    templates = directory / TEMPLATES
    for path in sorted([*directory.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]):
        name = path.relative_to(directory).as_posix()
        if not any(fnmatch(name, pattern) for pattern in patterns) or (path.is_dir() and name not in patterns):
            continue
        if not is_text(name):
            raise ConvertError(
                "the file's name is no UTF-8, in which the files of an artifact are listed",
                printable(str(path)),
                "give it a name of UTF-8, or take it out of the model's directory",
            )
        target = Path(os.path.realpath(path))  # unlike Path.resolve it bears links that lead to each other
        if not any(target.is_relative_to(root) for root in _roots(directory)):
            raise ConvertError(
                "the file is a link to a place outside of the model",
                f"{path} -> {target}",
                "put a copy of the file itself there, if you trust it, or take the link out",
            )
        check_size(path, LARGEST_METADATA_BYTES, "take it out of the model's directory, or fetch it again")
        found.append(path)
    return found


def _roots(directory: Path) -> list[Path]:
    """Where a model's own files may lie: in its directory, or in the Hub's cache, whose snapshots are links."""
    from huggingface_hub import constants

    resolved = directory.resolve()
    in_cache = [resolved.parent.parent] if resolved.parent.name == "snapshots" else []
    return [resolved, *in_cache, Path(constants.HF_HUB_CACHE).resolve()]


def _to_float32(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        bits = values.astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32)
    with np.errstate(over="ignore"):  # of F64; a weight beyond float32 is refused as the infinity that it becomes
        return values.astype(np.float32)


def _content_identity(path: Path) -> str:
    return f"sha256:{hashlib.sha256(read_whole(path, LARGEST_METADATA_BYTES)).hexdigest()}"


def _weights_identity(path: Path) -> str:
    with open_regular(path) as file:
        head = file.read(1 << 20)
    return f"head-sha256:{hashlib.sha256(head).hexdigest()} mtime_ns:{path.stat().st_mtime_ns}"
