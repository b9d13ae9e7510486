"""From the tensors of a checkpoint to the parameters of transformers' model, and from these to the places of a GGUF."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from bitwright.calibration.places import MatrixNames, Place
from bitwright.calibration.stream.anatomy.stored_names import StoredMatrices, locate_parameters
from bitwright.calibration.stream.device.transfer import WeightTransfer
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "lm_head.weight"
"""What the output head is called, whatever its model calls it."""


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
    """Reads parameters by their name in the model; where a source has no head, that is the embedding.

    model: transformers' text model, with or without weights. wrapper: the configuration of the larger model that it is
    part of, None where it is none.
    """

    def __init__(self, source: WeightSource, model: "PreTrainedModel", wrapper: Any = None):
        self.source = source
        self.stored = locate_parameters(model, wrapper or model.config, source.tensors)
        table = model.get_input_embeddings()
        self.embedding = next(f"{name}.weight" for name, module in model.named_modules() if module is table)

    def of(self, source: WeightSource) -> "ParameterReader":
        """The same of another source of the same tensors."""
        other = copy(self)
        other.source = source
        return other

    def matrices(self, parameter: str, n_matrices: int | None = None) -> Sequence[Sequence[str]]:
        """For every matrix of the parameter the stored tensors whose rows make it up, in order.

        A 3-D parameter that is stored whole is one entry. n_matrices: how many it has, where that is known. Raises
        ConvertError where something of it is not stored.
        """
        found = self._stored(parameter).names
        if (n_matrices and len(found) not in (1, n_matrices)) or len({len(names) for names in found}) > 1:
            raise _lacking(parameter)
        return found

    def may_be_exchanged(self, parameter: str) -> bool:
        """Whether its matrices may be stored with rows and columns exchanged."""
        return self._stored(parameter).exchanged

    def places(self, parameter: str, n_matrices: int, names: MatrixNames) -> Iterator[tuple[Place, slice, int]]:
        """Where a parameter's statistics go, for everything in names that is stored in it: the place, the matrices of
        the parameter, and which of the blocks of as many rows each of these is made of."""
        stored = self.matrices(parameter, n_matrices)
        step = n_matrices // len(stored)
        for i, stored_names in enumerate(stored):
            for block, name in enumerate(stored_names):
                for place in names.get(name, ()):
                    yield place, slice(i * step, (i + 1) * step), block

    def read(self, parameter: str, like: torch.Tensor, transfer: WeightTransfer) -> torch.Tensor:
        """The parameter's values with the shape and dtype of `like`, sent to the device."""
        return transfer.send(self.fill(parameter, transfer.buffer(like)))

    def fill(self, parameter: str, values: torch.Tensor) -> torch.Tensor:
        """The parameter's values, in the place of these. They are copied into memory of torch's own: matrix products
        round differently on memory aligned differently."""
        if self._stored(parameter).exchanged and self._read_exchanged(parameter, values):
            return values
        matrices = self.matrices(parameter, n_matrices(values))
        for target, names in zip(values if len(matrices) > 1 else [values], matrices, strict=True):
            rows, first = target.reshape(-1, target.shape[-1] if target.dim() else 1), 0
            for name in names:
                for block in blocks_of(self.source, name):
                    part = torch.from_numpy(block).reshape(-1, block.shape[-1] if block.ndim else 1)
                    last = first + len(part)
                    if part.shape[1] != rows.shape[1] or last > len(rows):
                        raise _wrong_shape(name, (last, part.shape[1]), rows)
                    rows[first:last] = part
                    first = last
            if first != len(rows):
                raise _wrong_shape(names[-1], (first, rows.shape[1]), rows)
        return values

    def _read_exchanged(self, parameter: str, values: torch.Tensor) -> bool:
        """Fill in a parameter [n_matrices, n_rows, n_columns] whose matrices are stored transposed; False where they
        are stored as they are."""
        ((name,),) = self.matrices(parameter)
        stored = torch.from_numpy(self.source.read(name))
        n, n_rows, n_columns = values.shape
        if stored.shape[-1] == n_columns:
            return False
        if stored.numel() != values.numel() or stored.shape[-1] != n_rows:
            raise _wrong_shape(name, (stored.numel() // stored.shape[-1], stored.shape[-1]), values.view(-1, n_columns))
        values.copy_(stored.reshape(n, n_columns, n_rows).transpose(1, 2))
        return True

    def _stored(self, parameter: str) -> StoredMatrices:
        if parameter not in self.stored and parameter == HEAD:
            parameter = self.embedding
        if parameter not in self.stored:
            raise _lacking(parameter)
        return self.stored[parameter]


def n_matrices(parameter: torch.Tensor) -> int:
    return parameter.shape[0] if parameter.dim() == 3 else 1


def _lacking(parameter: str) -> ConvertError:
    return ConvertError(
        "the model needs a tensor that the checkpoint lacks", parameter, "fetch the weights again; see config.json"
    )


def _wrong_shape(name: str, stored: tuple[int, int], rows: torch.Tensor) -> ConvertError:
    return ConvertError(
        f"{list(stored)} values are stored for a place of {list(rows.shape)}",
        name,
        "fetch config.json and the weights again, from the same revision",
    )
