"""A model of the Hugging Face Hub: small files and headers first, the weights when they are asked for."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converter.checkpoint import DTYPE_BYTES, METADATA_PATTERNS, Checkpoint, StoredTensor
from converter.safetensors_source import open_directory, read_config, read_weight_map, shard_names, unknown_dtype
from formats.errors import ConvertError

# Names and revisions become names of files in the cache: none of them leads out of it.
_HUB_ID = re.compile(r"(?!.*(?:^|[/@])\.\.?(?:[/@]|$))[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def is_hub_id(model: str) -> bool:
    """Whether this could be a Hub id, org/name or org/name@revision."""
    return _HUB_ID.fullmatch(model) is not None


def open_hub(model: str, *, metadata_only: bool, token: str | None = None) -> Checkpoint:
    """The checkpoint of this Hub id[@revision]; the revision becomes a commit at once, so that all files are of the
    same. With metadata_only, and the weights not in the cache yet, the tensors have names, dtypes and shapes, read from
    the headers with range requests, but no data.

    huggingface_hub resumes broken downloads, keeps finished ones and works from its cache when it is offline; it takes
    HF_ENDPOINT, HF_HOME and a stored token from the environment. Only configuration, tokenizer and the safetensors
    files of the index are fetched.
    """
    model_id, _, revision = model.partition("@")
    directory = _download(model_id, revision or None, [], token)
    commit, config, weight_map = directory.name, read_config(directory), read_weight_map(directory)
    shards = shard_names(weight_map)
    if all((directory / shard).is_file() for shard in shards):
        return open_directory(directory, model_id, commit)

    def fetch_weights() -> Checkpoint:
        return open_directory(_download(model_id, commit, shards, token), model_id, commit)

    if not metadata_only:
        return fetch_weights()
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for name, tensor in _read_remote_header(model_id, commit, directory / shard, token).items():
            if weight_map is None or weight_map.get(name) == shard:
                tensors[name] = tensor
    return Checkpoint(directory, model_id, commit, config, tensors, fetch_weights=fetch_weights)


def _download(model_id: str, revision: str | None, shards: list[str], token: str | None) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(model_id):
        patterns = [*METADATA_PATTERNS, *shards]
        return Path(snapshot_download(model_id, revision=revision, allow_patterns=patterns, token=token))


def _read_remote_header(model_id: str, commit: str, path: Path, token: str | None) -> dict[str, StoredTensor]:
    """The tensors of a shard that is not here yet: `path` is where it will lie, the offsets are not known."""
    from huggingface_hub import HfApi

    with _hub_errors(model_id):
        header = HfApi(token=token).parse_safetensors_file_metadata(model_id, path.name, revision=commit)
    tensors = {}
    for name, info in header.tensors.items():
        if info.dtype not in DTYPE_BYTES:
            raise unknown_dtype(name, info.dtype, f"{model_id}: {path.name}")
        tensors[name] = StoredTensor(info.dtype, tuple(info.shape), path, offset=0)
    return tensors


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
    except (errors.EntryNotFoundError, errors.NotASafetensorsRepoError) as error:
        raise ConvertError(
            f"the repository lacks a file, or its copy here is incomplete ({first_line(error)})",
            model_id,
            "check the network; a model without safetensors weights has to be converted to safetensors first",
        ) from None
    except (errors.HTTPError, errors.SafetensorsParsingError, OSError) as error:
        raise ConvertError(
            f"the Hub did not answer as expected ({first_line(error)})",
            model_id,
            "run the same command again: finished files are kept; HF_ENDPOINT chooses a mirror",
        ) from None


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
