"""What transformers makes of the tensors that a checkpoint's files hold: which of them are read, and by which names."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from converter.architecture import Architecture, known_architecture
from converter.checkpoint import StoredTensor
from formats.errors import ConvertError
from profiles.vocabulary import Role

Tensors = dict[str, StoredTensor]
# Whether two tensors of the same dtype and shape hold the same bytes.
SameBytes = Callable[[StoredTensor, StoredTensor], bool]

# Last part of the name -> the matrices whose rows follow each other in every expert.
_FUSED_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_BYTES_AT_ONCE = 1 << 24


def tensors_of(
    config: dict[str, Any],
    headers: Mapping[str, Tensors],
    weight_map: dict[str, str] | None,
    same: SameBytes,
    where: str,
) -> tuple[Tensors, list[str]]:
    """The tensors of a model by their names in transformers, and what to note of them.

    headers: of every file what it holds. weight_map: tensor -> file, out of the index where there is one.
    Raises ConvertError where index and files contradict each other.
    """
    tensors = _merged(headers, weight_map, where)
    tensors = split_experts(tensors)
    architecture = known_architecture(config)
    if architecture is None:  # refused when the model is described
        return tensors, []
    tensors = {name: tensors[stored] for name, stored in by_name(architecture.spelled, tensors, where).items()}
    return _with_head(architecture, config, tensors, same)


def _merged(headers: Mapping[str, Tensors], weight_map: dict[str, str] | None, where: str) -> Tensors:
    """transformers reads the whole of every file that the index names, the last one first in the say."""
    tensors = {name: tensor for file in sorted(headers) for name, tensor in headers[file].items()}
    for name, file in (weight_map or {}).items():
        if name not in tensors:
            raise ConvertError(
                f"{file} lacks the tensor {name!r} that the index promises",
                where,
                "fetch the index and this shard again, from the same revision",
            )
        if (last := tensors[name].file.name) != file:
            raise ConvertError(
                f"the index gives {name!r} to {file}, and transformers reads it from {last}, which holds it, too",
                where,
                "fetch the index and its shards again, from the same revision",
            )
    return tensors


def by_name(rename: Callable[[str], str | None], names: Iterable[str], where: str) -> dict[str, str]:
    """Every name by its new one, without those whose new one is None. Raises ConvertError where two become the same."""
    renamed: dict[str, str] = {}
    for name in names:
        new = rename(name)
        if new is None:
            continue
        if new in renamed:
            raise ConvertError(
                f"{renamed[new]!r} and {name!r} are stored for the same place in the model",
                where,
                "fetch the weights again, or take one of them out",
            )
        renamed[new] = name
    return renamed


def split_experts(tensors: Tensors) -> Tensors:
    """The experts of a layer one by one where they are stored as one 3-D tensor, as transformers 5 holds them: of
    gate_up_proj [n_experts, gate's and up's rows, n_columns] every matrix's rows follow each other."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        parts = _FUSED_EXPERTS.get(last) if prefix.endswith(".experts") and len(tensor.shape) == 3 else None
        if parts is None or tensor.shape[1] % len(parts):
            split[name] = tensor
            continue
        n_experts, n_rows, n_columns = tensor.shape
        shape = n_rows // len(parts), n_columns
        step = tensor.n_bytes // (n_experts * len(parts))
        for i in range(n_experts * len(parts)):
            expert, part = divmod(i, len(parts))
            place = replace(tensor, shape=shape, offset=tensor.offset + i * step)
            split[f"{prefix}.{expert}.{parts[part]}.weight"] = place
    return split


def _with_head(
    architecture: Architecture, config: dict[str, Any], tensors: Tensors, same: SameBytes
) -> tuple[Tensors, list[str]]:
    """A head that is tied to the embedding is the embedding, unless both are stored and differ."""
    if not architecture.completed(config)["tie_word_embeddings"]:
        return tensors, []
    by_role = {architecture.named(role): role for role in (Role.EMBEDDING, Role.OUTPUT)}
    stored = {by_role.get(architecture.canonical_name(name) or ""): name for name in tensors}
    embedding, head = stored.get(Role.EMBEDDING), stored.get(Role.OUTPUT)
    if head is None:
        return tensors, []
    if embedding is None:
        renamed = architecture.named(Role.EMBEDDING)
        return {renamed if name == head else name: tensor for name, tensor in tensors.items()}, []
    ours, theirs = tensors[head], tensors[embedding]
    if (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and same(ours, theirs):
        return {name: tensor for name, tensor in tensors.items() if name != head}, []
    note = "config.json ties the head to the embedding, and a head that differs from it is stored: it is kept, as"
    return tensors, [f"{note} transformers keeps it"]


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of the same size hold the same bytes; reads no further than the first difference."""
    return all(
        np.array_equal(_read(one, start, n), _read(other, start, n))
        for start in range(0, one.n_bytes, _BYTES_AT_ONCE)
        for n in [min(_BYTES_AT_ONCE, one.n_bytes - start)]
    )


def _read(tensor: StoredTensor, start: int, n_bytes: int) -> np.ndarray:
    return np.fromfile(tensor.file, np.uint8, n_bytes, offset=tensor.offset + start)
