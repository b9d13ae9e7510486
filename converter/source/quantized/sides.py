"""What stands beside the codes of a quantized tensor: found by name, and gone from the checkpoint once it is used."""

from collections.abc import Mapping
from math import prod

from bitwright.formats.errors import ConvertError
from bitwright.formats.files.stored_tensor import StoredTensor
from bitwright.formats.quantized.grids import BlockGrid


class WeightsAreNeeded(Exception):
    """How a tensor is stored is said by another one, which is not on this machine yet."""


class Sides:
    """The tensors beside one that is quantized. name: the tensor's, as if it were whole; codes: what is stored in its
    place; used: what has been taken."""

    def __init__(self, stored: Mapping[str, StoredTensor], name: str, codes: StoredTensor):
        self.stored, self.name, self.codes, self.used = stored, name, codes, set[str]()

    def take(self, *ends: str) -> StoredTensor | None:
        """The first that is stored of the tensors whose names are this one's with such an end."""
        for end in ends:
            if (found := self.stored.get(self.name + end)) is not None:
                self.used.add(self.name + end)
                return found
        return None

    def need(self, *ends: str) -> StoredTensor:
        """The same. Raises ConvertError where none is stored."""
        found = self.take(*ends)
        if found is None:
            names = " or ".join(repr(self.name + end) for end in ends)
            raise ConvertError(
                f"{self.name!r} is stored in codes, and {names} is missing, without which nobody can decode them",
                f"{self.codes.file}: {self.name}",
                "fetch all of the weights again; a checkpoint that lacks its scales cannot be used",
            )
        return found

    def wrong_shape(self, tensor: StoredTensor, shape: tuple[int, ...], what: str = "scales") -> ConvertError:
        return ConvertError(
            f"the {what} of {self.name!r} have the shape {list(tensor.shape)}, which does not fit its {list(shape)}",
            f"{tensor.file}: {self.name}",
            "fetch config.json and the weights again, from the same revision",
        )

    def contents(self, tensor: StoredTensor) -> bytes:
        """All of a small tensor. Raises WeightsAreNeeded."""
        if not tensor.file.is_file():
            raise WeightsAreNeeded
        return tensor.read(self.name).tobytes()

    def grid(
        self, tensor: StoredTensor, shape: tuple[int, ...], blocks: tuple[tuple[int, int], ...]
    ) -> tuple[BlockGrid, int, str]:
        """Scales of a tensor of this shape, the columns that share one, and in words what shares them.

        blocks: (rows, columns) that may share one, the likeliest first; a scale of the tensor, of every row, of groups
        of columns and of every column (transposed experts) are seen by their shapes. Raises ConvertError for others.
        """
        n_rows, n_columns = shape[-2:] if len(shape) > 1 else (1, shape[-1])
        n_matrices = prod(shape[:-2])
        n = prod(tensor.shape)
        sizes = [size for size in tensor.shape if size != 1]
        for height, width in blocks:
            down, across = -(-n_rows // height), -(-n_columns // width)
            expected = [size for size in (*shape[:-2], down, across) if size != 1]
            if sizes == expected and (height, width) != (1, 1):
                said = f"in blocks of {height}x{width}" if height > 1 else f"in groups of {width}"
                return BlockGrid(tensor, height, n_rows, across), width, said
        if n == 1:
            return BlockGrid(tensor, n_matrices * n_rows, n_matrices * n_rows, 1), n_columns, "per tensor"
        if n == n_matrices:
            return BlockGrid(tensor, n_rows, n_rows, 1), n_columns, "per matrix"
        if n == n_matrices * n_rows and (tensor.shape[-1] == 1 or len(tensor.shape) < len(shape)):
            return BlockGrid(tensor, 1, n_rows, 1), n_columns, "per channel"
        if len(tensor.shape) == len(shape) and n_columns % tensor.shape[-1] == 0:
            if tensor.shape[:-1] == shape[:-1]:
                width = n_columns // tensor.shape[-1]
                return BlockGrid(tensor, 1, n_rows, tensor.shape[-1]), width, f"in groups of {width}"
            if tensor.shape[:-2] == shape[:-2] and tensor.shape[-2:] == (1, n_columns):
                return BlockGrid(tensor, n_rows, n_rows, n_columns), 1, "per channel"
        raise self.wrong_shape(tensor, shape)
