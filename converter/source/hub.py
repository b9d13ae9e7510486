"""A model of the Hugging Face Hub: small files and headers first, the weights when they are asked for."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bitwright.converter.source.checkpoint import (
    IMATRIX_PATTERN,
    LICENSE_PATTERNS,
    METADATA_PATTERNS,
    SENSITIVITY_PATTERN,
    Checkpoint,
)
from bitwright.converter.source.lora.adapter import WEIGHTS_NAME, is_adapter
from bitwright.converter.source.quantized.sides import WeightsAreNeeded
from bitwright.converter.source.safetensors import (
    index_notes,
    open_directory,
)
from bitwright.converter.source.source_config import read_config
from bitwright.converter.source.stored_tensors import tensors_of
from bitwright.formats.errors import ConvertError, TryAgain
from bitwright.formats.files.safetensors import INDEX_NAME, SINGLE_NAME, read_weight_map, shard_names
from bitwright.formats.files.stored_tensor import DTYPE_BITS, StoredTensor

# Whether a head is the embedding is seen here before the weights are, at so many places of so many bytes.
_N_SAMPLES, _SAMPLE_BYTES = 4, 1 << 12

# Names and revisions become names of files in the cache: none of them leads out of it.
_HUB_ID = re.compile(r"(?!.*(?:^|[/@])\.\.?(?:[/@]|$))[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class AdapterOnHub(Exception):
    """The repository holds an adapter, and no model. directory: the adapter's, with its weights."""

    def __init__(self, directory: Path):
        self.directory = directory


def is_hub_id(model: str) -> bool:
    """Whether this could be a Hub id, org/name or org/name@revision."""
    return _HUB_ID.fullmatch(model) is not None


def open_hub(model: str, *, metadata_only: bool, token: str | None = None) -> Checkpoint:
    """The checkpoint of this Hub id[@revision]; the revision becomes a commit at once, so that all files are of the
    same. With metadata_only, and the weights not in the cache yet, the tensors have names, dtypes and shapes, read from
    the headers with range requests, but no data; of a head that may be the embedding some places are compared.

    huggingface_hub resumes broken downloads, keeps finished ones and works from its cache when it is offline; it takes
    HF_ENDPOINT, HF_HOME and a stored token from the environment. Only configuration, tokenizer and the safetensors
    files of the index are fetched. Raises AdapterOnHub for an adapter, which is small, and here then.
    """
    model_id, _, revision = model.partition("@")
    directory = _download(model_id, revision or None, [], token)
    if is_adapter(directory):
        raise AdapterOnHub(_download(model_id, directory.name, [WEIGHTS_NAME], token))
    commit, config, weight_map = directory.name, read_config(directory, model_id), read_weight_map(directory)
    if weight_map is not None and _has_single_file(model_id, commit, token):
        weight_map = None
    shards = shard_names(weight_map)
    if all((directory / shard).is_file() for shard in shards):
        return open_directory(directory, model_id, commit)

    def fetch_weights() -> Checkpoint:
        files = [*shards, IMATRIX_PATTERN, SENSITIVITY_PATTERN]
        return open_directory(_download(model_id, commit, files, token), model_id, commit)

    if not metadata_only:
        return fetch_weights()
    headers = {shard: _read_remote_header(model_id, commit, directory / shard, token) for shard in shards}

    def same_samples(one: StoredTensor, other: StoredTensor) -> bool:
        read = partial(_read_remote, model_id, commit, token)
        return all(read(one, *part) == read(other, *part) for part in _samples(one.n_bytes))

    where = f"{model_id}: {INDEX_NAME}"
    try:
        config, tensors, notes = tensors_of(config, headers, weight_map, same_samples, where)
    except WeightsAreNeeded:
        return fetch_weights()
    notes = [*index_notes(directory, weight_map), *notes]
    return Checkpoint(directory, model_id, commit, config, tensors, notes=tuple(notes), fetch_weights=fetch_weights)


def _has_single_file(model_id: str, commit: str, token: str | None) -> bool:
    """Whether the repository has weights in a single file; not, where the Hub cannot be asked: what is in the cache is
    all there is then."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi(token=token).file_exists(model_id, SINGLE_NAME, revision=commit)
    except (errors.HTTPError, OSError):
        return False


def _samples(n_bytes: int) -> list[tuple[int, int]]:
    """Parts of a tensor's data, (first byte, length), from its beginning to its end."""
    length = min(_SAMPLE_BYTES, n_bytes)
    return [(i * (n_bytes - length) // (_N_SAMPLES - 1), length) for i in range(_N_SAMPLES)]


def download(repository: str, revision: str | None, patterns: list[str], token: str | None = None) -> Path:
    """The directory of those files of a repository that the patterns name. Raises ConvertError."""
    from huggingface_hub import snapshot_download

    with _hub_errors(repository):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, token=token))


def _download(model_id: str, revision: str | None, shards: list[str], token: str | None) -> Path:
    return download(model_id, revision, [*METADATA_PATTERNS, *LICENSE_PATTERNS, *shards], token)


def _read_remote_header(model_id: str, commit: str, path: Path, token: str | None) -> dict[str, StoredTensor]:
    """The tensors of a shard that is not here yet: `path` is where it will lie, offsets count from its header's end."""
    from huggingface_hub import HfApi

    with _hub_errors(model_id):
        header = HfApi(token=token).parse_safetensors_file_metadata(model_id, path.name, revision=commit)
    tensors = {}
    for name, info in header.tensors.items():
        if info.dtype not in DTYPE_BITS:
            raise _unknown_dtype(name, info.dtype, f"{model_id}: {path.name}")
        tensors[name] = StoredTensor(info.dtype, tuple(info.shape), path, offset=info.data_offsets[0])
    return tensors


def _read_remote(
    model_id: str, commit: str, token: str | None, tensor: StoredTensor, start: int, n_bytes: int
) -> bytes:
    """Bytes of a tensor of _read_remote_header, from the one at `start` on."""
    header_bytes = struct.unpack("<Q", _read_range(model_id, commit, tensor.file.name, 0, 8, token))[0]
    first = 8 + header_bytes + tensor.offset + start
    return _read_range(model_id, commit, tensor.file.name, first, n_bytes, token)


def _read_range(model_id: str, commit: str, name: str, start: int, n_bytes: int, token: str | None) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    headers = {**build_hf_headers(token=token), "range": f"bytes={start}-{start + n_bytes - 1}"}
    with _hub_errors(model_id):
        response = get_session().get(hf_hub_url(model_id, name, revision=commit), headers=headers)
        hf_raise_for_status(response)
        if len(response.content) != n_bytes:
            raise OSError(f"{len(response.content)} bytes of {name} came where {n_bytes} were asked for")
    return response.content


@contextmanager
def _hub_errors(model_id: str) -> Iterator[None]:
    """The Hub's exceptions as what the user can do about them."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise ConvertError(
            "the repository is gated", model_id, f"ask for access at its page, then: hf auth login ({model_id})"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConvertError(
            "the Hub has no such repository, or it is private",
            model_id,
            "check the id; for a private one: hf auth login",
        ) from None
    except errors.RevisionNotFoundError:
        raise ConvertError(
            "the repository has no such revision", model_id, "give a branch, tag or commit after the @"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise TryAgain(
            f"the Hub cannot be reached, and the copy of the model here is incomplete ({first_line(error)})",
            model_id,
            "check the network and HF_HUB_OFFLINE, then run the same command again",
        ) from None
    except (errors.EntryNotFoundError, errors.NotASafetensorsRepoError) as error:
        raise ConvertError(
            f"the repository lacks a file ({first_line(error)})",
            model_id,
            "a model without safetensors weights has to be converted to safetensors first",
        ) from None
    except (errors.HTTPError, errors.SafetensorsParsingError, OSError) as error:
        raise TryAgain(
            f"the Hub did not answer as expected ({first_line(error)})",
            model_id,
            "run the same command again: finished files are kept; HF_ENDPOINT chooses a mirror",
        ) from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _unknown_dtype(name: str, dtype: str, where: str) -> ConvertError:
    return ConvertError(
        f"{name!r} is stored as {dtype}, which is no dtype of safetensors ({', '.join(DTYPE_BITS)})",
        where,
        "fetch this file again",
    )
