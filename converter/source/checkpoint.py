"""A Checkpoint: a model as it is stored, whose tensors stay on disk until rows of them are asked for."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_writer import GGUFValue

from bitwright.formats.encoding import check_finite
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.regular_file import LARGEST_METADATA_BYTES, check_size, open_regular, read_whole
from bitwright.formats.files.safetensors import INDEX_NAME
from bitwright.formats.files.stored_tensor import SourceTensor
from bitwright.formats.names import is_text, printable
from bitwright.formats.schemes.row_chunks import row_spans

LICENSE_PATTERNS = ("LICENSE*", "NOTICE*")
"""What goes with a model wherever it goes, and no conversion reads."""
TEMPLATES = "additional_chat_templates"
_POOLING = "*_Pooling"
# The folders of a checkpoint that are looked into, as patterns: sentence-transformers numbers the second.
_FOLDERS = (TEMPLATES, _POOLING)
POOLING_PATTERNS = ("modules.json", f"{_POOLING}/config.json")
"""What sentence-transformers says of how the vectors of tokens become one of a text."""
SENTENCEPIECE_NAMES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
"""SentencePiece's file as the families of models name it: Llama's and Gemma's, XLM-R's, T5's."""
METADATA_PATTERNS = (
    *("config.json", "generation_config.json", INDEX_NAME, "adapter_config.json"),
    *("hf_quant_config.json", "quantize_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(*SENTENCEPIECE_NAMES, "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.json", "*.jinja", *POOLING_PATTERNS, "README.md"),
)
"""Everything beside the weights that a conversion reads; also all that is fetched of a Hub repository."""

IMATRIX_PATTERN, SENSITIVITY_PATTERN = "*.imatrix.gguf", "*.sensitivity.safetensors"
"""Statistics of the model, which are fetched with its weights, see converter/measure/published.py."""

_BLOCK_WEIGHTS = 1 << 20
# What is hashed of a file of weights beside its beginning, where its content alone tells: so many places of so many
# bytes, the last one at its end.
_N_PLACES, _PLACE_BYTES = 64, 1 << 16


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
    beside: small files outside of location that it is made of, too.
    fetch_weights: brings the weights to this machine and opens them; None when they are here.
    by_content: files are told apart by what is in them alone, so that copies on several machines are the same.
    """

    location: Path
    model_id: str
    revision: str | None
    config: dict[str, Any]
    tensors: Mapping[str, SourceTensor]
    metadata: dict[str, GGUFValue] | None = None
    notes: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()
    fetch_weights: Callable[[], "Checkpoint"] | None = field(default=None, compare=False, repr=False)
    by_content: bool = False

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
        return replace(fetched, by_content=self.by_content)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop, counted over all matrices of the tensor: float32 [stop - start, n_columns]; the values
        of a vector: float32 [n_values]. Raises ConvertError for a value that is not finite: whoever reads the weights
        first finds it, and nothing is made of it."""
        tensor = self.tensors[name]
        stop = tensor.n_rows if stop is None else stop
        if not 0 <= start <= stop <= tensor.n_rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {tensor.n_rows}")
        weights = tensor.rows(name, start, stop)
        _check_finite(weights, name, tensor, start)
        return weights.reshape(-1) if len(tensor.shape) < 2 else weights

    def read_columns(self, name: str, start: int, stop: int, matrix: int = 0) -> np.ndarray:
        """Columns start to stop of one of its matrices, each as a row: float32 [stop - start, rows of a matrix], as
        `read` has them. What is stored with its inputs first is read so at the cost of the columns asked for."""
        tensor = self.tensors[name]
        columns = tensor.columns(name, matrix, start, stop)
        _check_finite(columns, f"{name}, columns", tensor, start)
        return columns

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The whole tensor as `read` has it, in parts of some rows, for what need not hold all of it at once."""
        tensor = self.tensors[name]
        for start, stop in block_spans(tensor.n_rows, tensor.n_columns):
            yield self.read(name, start, stop)

    def read_rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """The rows of these indices, in their order: float32 [len(rows), n_columns]. Raises as `read` does."""
        tensor = self.tensors[name]
        weights = tensor.gather(name, rows)
        _check_finite(weights, f"{name}, some rows", tensor, 0)
        return weights

    def files(self) -> list[tuple[str, int, str]]:
        """(relative name, bytes, identity) of every file that the conversion reads, sorted by name.

        The identity is "sha256:..." of the content of small files. Of weights it is the commit on the Hub, the same
        before and after their download, with the bytes of the tensors; elsewhere a hash of the file's beginning, where
        the header is, and the modification time, by_content a hash of places all over it instead: hashing terabytes is
        no option.
        """
        identity = places_identity if self.by_content else _weights_identity
        if self.location.is_file():
            return [(self.location.name, self.location.stat().st_size, identity(self.location))]
        small = metadata_files(self.location)
        entries = [
            (path.relative_to(self.location).as_posix(), path.stat().st_size, _content_identity(path)) for path in small
        ]
        entries += [(f"beside/{path.name}", path.stat().st_size, _content_identity(path)) for path in self.beside]
        weights: dict[Path, int] = {}
        for stored in {stored for tensor in self.tensors.values() for stored in tensor.stored}:
            weights[stored.file] = weights.get(stored.file, 0) + stored.n_bytes
        for path, n_bytes in weights.items():
            if self.revision is not None and path.is_relative_to(self.location):
                entries.append((path.name, n_bytes, f"commit:{self.revision}"))
            else:
                entries.append((path.name, path.stat().st_size, identity(path)))
        return sorted(entries)


def _check_finite(weights: np.ndarray, name: str, tensor: SourceTensor, first: int) -> None:
    try:
        check_finite(weights, first)
    except ConvertError as error:
        raise ConvertError(error.what, f"{tensor.file}: tensor {name}, {error.where}", error.remedy) from None


def block_spans(n_rows: int, n_columns: int) -> Iterator[tuple[int, int]]:
    """The rows of a tensor in parts of about a million weights: (first row, the one after the last)."""
    return row_spans(n_rows, n_columns, _BLOCK_WEIGHTS)


def metadata_files(directory: Path) -> list[Path]:
    """Those files of a checkpoint that METADATA_PATTERNS name, by name. Raises ConvertError as model_files does."""
    return model_files(directory, METADATA_PATTERNS)


def model_folders(directory: Path) -> list[Path]:
    """The folders of a checkpoint in which files of the model may be."""
    return [folder for pattern in _FOLDERS for folder in directory.glob(pattern) if folder.is_dir()]


def model_files(directory: Path, patterns: Sequence[str], largest: int | None = LARGEST_METADATA_BYTES) -> list[Path]:
    """Those files of a checkpoint, those in its known folders included, that the patterns name, by name.

    largest: bytes that none of them exceeds; None for files that are not read whole.

    Raises ConvertError for one that has a name of no UTF-8, is no regular file, is larger than any of its kind, or is a
    link to a file that is not the model's: what it names would be read, and copied into an artifact that others are
    given.
    """
    found = []
    inside = (path for folder in model_folders(directory) for path in folder.iterdir())
    for path in sorted([*directory.iterdir(), *inside]):
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
        if largest is not None:
            check_size(path, largest, "take it out of the model's directory, or fetch it again")
        found.append(path)
    return found


def _roots(directory: Path) -> list[Path]:
    """Where a model's own files may lie: in its directory, or in the Hub's cache, whose snapshots are links."""
    from huggingface_hub import constants

    resolved = directory.resolve()
    in_cache = [resolved.parent.parent] if resolved.parent.name == "snapshots" else []
    return [resolved, *in_cache, Path(constants.HF_HUB_CACHE).resolve()]


def _content_identity(path: Path) -> str:
    return f"sha256:{hashlib.sha256(read_whole(path, LARGEST_METADATA_BYTES)).hexdigest()}"


def _weights_identity(path: Path) -> str:
    with open_regular(path) as file:
        head = file.read(1 << 20)
    return f"head-sha256:{hashlib.sha256(head).hexdigest()} mtime_ns:{path.stat().st_mtime_ns}"


def places_identity(path: Path) -> str:
    """A hash of places all over a file, the same of all its copies."""
    digest, n_bytes = hashlib.sha256(), path.stat().st_size
    with open_regular(path) as file:
        digest.update(file.read(1 << 20))
        for i in range(1, _N_PLACES + 1):
            file.seek(max(0, n_bytes * i // _N_PLACES - _PLACE_BYTES))
            digest.update(file.read(_PLACE_BYTES))
    return f"places-sha256:{digest.hexdigest()}"
