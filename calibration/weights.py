"""From the tensors of a checkpoint to the parameters of transformers' model.

Most are stored under the parameter's own name. Two things differ: a model that is part of a larger one has a longer
prefix, and the experts of a layer, which transformers keeps in one 3-D parameter, are stored one by one.
"""

from collections.abc import Collection, Iterable, Iterator
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from formats.errors import ConvertError

# Prefixes of the text model inside an image-and-text model, as written by different versions of transformers.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", ""),
)

# (end of the parameter's name, ends of the stored names whose rows follow each other in it); {} is the expert.
_STORED_AS = (
    ("mlp.experts.gate_up_proj", ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight")),
    ("mlp.experts.down_proj", ("mlp.experts.{}.down_proj.weight",)),
    ("mlp.experts.gate_up_proj", ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight")),
    ("mlp.experts.down_proj", ("block_sparse_moe.experts.{}.w2.weight",)),
    ("mlp.gate.weight", ("block_sparse_moe.gate.weight",)),
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class WeightSource(Protocol):
    """Where weights come from; converter's Checkpoint is one."""

    @property
    def tensors(self) -> Collection[str]:
        """The checkpoint's tensor names."""

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, float32; the matrices of a 3-D tensor may come as one [n_rows, n_columns]."""


@runtime_checkable
class BlockSource(Protocol):
    """A source that gives a tensor in parts, too, and never holds all of it."""

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor as `read` has it, in parts of some rows."""


def blocks_of(source: WeightSource, name: str) -> Iterable[np.ndarray]:
    """A tensor in as small parts as the source gives it in."""
    return source.blocks(name) if isinstance(source, BlockSource) else [source.read(name)]


class ParameterReader:
    """Reads parameters by their name in the model; where a source has no head, that is the embedding."""

    def __init__(self, source: WeightSource):
        self.source = source
        self.stored = {_canonical(name): name for name in source.tensors}

    def matrices(self, parameter: str, n_matrices: int = 1) -> list[list[str]]:
        """For every matrix of the parameter the stored tensors whose rows make it up, in order.

        A 3-D parameter that is stored whole is one entry.
        """
        if parameter == HEAD and HEAD not in self.stored:
            parameter = EMBEDDING
        if parameter in self.stored:
            return [[self.stored[parameter]]]
        for end, parts in _STORED_AS:
            stem = parameter.removesuffix(end)
            names = [[stem + part.format(i) for part in parts] for i in range(n_matrices)]
            if stem != parameter and all(name in self.stored for matrix in names for name in matrix):
                return [[self.stored[name] for name in matrix] for matrix in names]
        raise ConvertError(
            "the model needs a tensor that the checkpoint lacks", parameter, "fetch the weights again; see config.json"
        )

    def read(self, parameter: str, like: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The parameter's values with the shape and dtype of `like`, on the device.

        They are copied into memory of torch's own: matrix products round differently on memory aligned differently.
        """
        values = torch.empty(like.shape, dtype=like.dtype)
        matrices = self.matrices(parameter, n_matrices(like))
        for target, names in zip(values if len(matrices) > 1 else [values], matrices, strict=True):
            rows, first = target.view(-1, like.shape[-1]), 0
            for name in names:
                for block in blocks_of(self.source, name):
                    part = torch.from_numpy(block).view(-1, block.shape[-1])
                    last = first + len(part)
                    if part.shape[1] != rows.shape[1] or last > len(rows):
                        raise _wrong_shape(name, (last, part.shape[1]), rows)
                    rows[first:last] = part
                    first = last
            if first != len(rows):
                raise _wrong_shape(names[-1], (first, rows.shape[1]), rows)
        return values.to(device)


def n_matrices(parameter: torch.Tensor) -> int:
    return parameter.shape[0] if parameter.dim() == 3 else 1


def _wrong_shape(name: str, stored: tuple[int, int], rows: torch.Tensor) -> ConvertError:
    return ConvertError(
        f"{list(stored)} values are stored for a place of {list(rows.shape)}",
        name,
        "fetch config.json and the weights again, from the same revision",
    )


def _canonical(name: str) -> str:
    for prefix, replacement in _PREFIXES:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
