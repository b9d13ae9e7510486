"""What transformers makes of the tensors that a checkpoint's files hold: which of them are read, and by which names."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from bitwright.converter.architectures.architecture import known_architecture
from bitwright.converter.architectures.description import Architecture
from bitwright.converter.source.quantized.decode import decode_quantized
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import SourceTensor, StoredTensor
from bitwright.formats.schemes.expert_names import STACKED
from bitwright.profiles.vocabulary import Role

Tensors = dict[str, SourceTensor]
# Whether two tensors of the same dtype and shape hold the same bytes.
SameBytes = Callable[[StoredTensor, StoredTensor], bool]

_BYTES_AT_ONCE = 1 << 24


def tensors_of(
    config: dict[str, Any],
    headers: Mapping[str, Mapping[str, StoredTensor]],
    weight_map: dict[str, str] | None,
    same: SameBytes,
    where: str,
) -> tuple[dict[str, Any], Tensors, list[str]]:
    """The configuration, the tensors of a model by their names in transformers, and what to note of them; of a model
    that is quantized already those that it stands for.

    headers: of every file what it holds. weight_map: tensor -> file, out of the index where there is one.
    Raises ConvertError where index and files contradict each other, and for what cannot be decoded.
    """
    config, tensors, notes = decode_quantized(config, _merged(headers, weight_map, where), where)
    architecture = known_architecture(config)
    if architecture is None:  # nobody knows how its experts are stored
        return config, tensors, notes
    tensors = split_experts(tensors, architecture.stored_whole)
    tensors = {name: tensors[stored] for name, stored in by_name(architecture.spelled, tensors, where).items()}
    tensors, about_head = _with_head(architecture, config, tensors, same)
    return config, tensors, [*notes, *about_head]


def _merged(
    headers: Mapping[str, Mapping[str, StoredTensor]], weight_map: dict[str, str] | None, where: str
) -> dict[str, StoredTensor]:
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


def split_experts(tensors: Tensors, whole: Collection[str] = ()) -> Tensors:
    """whole: last parts of the names of those that stay as they are.

    The experts of a layer one by one where they are stored as one 3-D tensor, as transformers 5 holds them: of
    gate_up_proj [n_experts, gate's and up's rows, n_columns] every matrix's rows follow each other."""
    split: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        parts = STACKED.get(last) if prefix.endswith(".experts") and len(tensor.shape) == 3 else None
        if parts is None or last in whole or tensor.shape[1] % len(parts) or tensor.inputs_first:
            split[name] = tensor
            continue
        n_experts, n_rows, n_columns = tensor.shape
        shape = n_rows // len(parts), n_columns
        for i in range(n_experts * len(parts)):
            expert, part = divmod(i, len(parts))
            split[f"{prefix}.{expert}.{parts[part]}.weight"] = tensor.part(i * shape[0], shape)
    return split


def _with_head(
    architecture: Architecture, config: dict[str, Any], tensors: Tensors, same: SameBytes
) -> tuple[Tensors, list[str]]:
    """A head that is tied to the embedding is the embedding, unless both are stored and differ."""
    embedding_name, head_name = architecture.named(Role.EMBEDDING), architecture.named(Role.OUTPUT)
    if embedding_name is None or head_name is None or not architecture.completed(config)["tie_word_embeddings"]:
        return tensors, []
    by_role = {embedding_name: Role.EMBEDDING, head_name: Role.OUTPUT}
    stored = {by_role.get(architecture.canonical_name(name) or ""): name for name in tensors}
    embedding, head = stored.get(Role.EMBEDDING), stored.get(Role.OUTPUT)
    if head is None:
        return tensors, []
    if embedding is None:
        return {embedding_name if name == head else name: tensor for name, tensor in tensors.items()}, []
    ours, theirs = tensors[head], tensors[embedding]
    if (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape) and _same_stored(ours, theirs, same):
        return {name: tensor for name, tensor in tensors.items() if name != head}, []
    note = "config.json ties the head to the embedding, and a head that differs from it is stored: it is kept, as"
    return tensors, [f"{note} transformers keeps it"]


def _same_stored(one: SourceTensor, other: SourceTensor, same: SameBytes) -> bool:
    """Whether two tensors of the same shape are stored alike, in the same bytes."""
    pairs = list(zip(one.stored, other.stored, strict=False))
    alike = len(one.stored) == len(other.stored) and all((a.dtype, a.shape) == (b.dtype, b.shape) for a, b in pairs)
    return alike and all(same(a, b) for a, b in pairs)


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors of the same size hold the same bytes; reads no further than the first difference."""
    return all(
        np.array_equal(_read(one, start, n), _read(other, start, n))
        for start in range(0, one.n_bytes, _BYTES_AT_ONCE)
        for n in [min(_BYTES_AT_ONCE, one.n_bytes - start)]
    )


def _read(tensor: StoredTensor, start: int, n_bytes: int) -> np.ndarray:
    return np.fromfile(tensor.file, np.uint8, n_bytes, offset=tensor.offset + start)
