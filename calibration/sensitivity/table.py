"""What every format costs every tensor: the expected increase of the KL divergence, and the file that keeps it.

safetensors  metadata "bitwright.sensitivity": JSON with "version", the identity of table and factors, the formats
             and the rows that were encoded of each tensor
             "losses"                  float64 [n_tensors, n_formats], NaN where a format does not fit the rows;
                                       tensors in the order of "tensors", formats in that of "formats"
             "rows/T", "columns/T"     the Fisher factors of tensor T, float64 [n_matrices, n_rows | n_columns]
             "gradient_magnitude", "activation_variance", "weight_magnitude"   float64 [n_tensors]
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from bitwright.calibration.choices import Labels
from bitwright.calibration.sensitivity.fisher import FisherFactors
from bitwright.formats.choices import Effort
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import rename
from bitwright.formats.files.record import RecordKind
from bitwright.formats.files.whole import Place

_KIND = RecordKind("bitwright.sensitivity", 2, "sensitivity table", "bitwright imatrix --sensitivity MODEL")
MAGNITUDES = ("gradient_magnitude", "activation_variance", "weight_magnitude")
"""The fields of FisherFactors that hold one number a tensor."""
# Of FisherFactors and of SensitivityTable: what is kept in the metadata as it is.
_FACTORS_IDENTITY = {
    "model": (str, type(None)),
    "revision": (str, type(None)),
    "corpus": (str,),
    "corpus_sha256": (str,),
    "samples": (int,),
    "sequence_length": (int,),
    "labels": (str,),
}
_TABLE_IDENTITY = {"architecture": (str,), "weights_sha256": (str,), "effort": (str,), "tool": (str,)}


@dataclass(frozen=True, eq=False)
class SensitivityTable:
    """The expected increase of the mean KL divergence, in nats per token, by every format of every tensor.

    losses: GGUF tensor -> format name -> increase; a format whose block does not divide the tensor's rows is absent.
    factors: what the errors were weighted with; says which model and text they are of.
    sampled_rows: GGUF tensor -> rows that were encoded to find its losses, of all its matrices.
    architecture: GGUF's name; weights_sha256: of the first row of every tensor in the table, which tells a model from
    another of the same shapes; effort: of the encoders; tool: release and code that made the table.

    Raises ConvertError for losses that are negative or not finite, and for a tensor without losses or factors.
    """

    losses: Mapping[str, Mapping[str, float]]
    factors: FisherFactors
    sampled_rows: Mapping[str, int]
    architecture: str
    weights_sha256: str
    effort: Effort
    tool: str
    where: str = field(default="sensitivity table", repr=False)

    def __post_init__(self) -> None:
        for name, losses in self.losses.items():
            if name not in self.factors.rows or name not in self.sampled_rows or not losses:
                raise _KIND.damaged(self.where, f"{name!r} lacks losses, factors or a number of sampled rows")
            for format_name, loss in losses.items():
                if not 0 <= loss < np.inf:
                    raise _KIND.damaged(self.where, f"the loss of {name!r} in {format_name} is {loss}")

    def loss(self, tensor: str, format_name: str) -> float:
        """Raises ConvertError when the table has no such tensor, or not in this format."""
        losses = self.losses.get(tensor)
        if losses is None or format_name not in losses:
            has = ", ".join(losses) if losses else "no such tensor"
            raise ConvertError(
                f"the sensitivity table does not say what {format_name} costs: it has {has}",
                f"{self.where}, tensor {tensor}",
                "compute it again with this format: bitwright imatrix --sensitivity MODEL",
            )
        return losses[format_name]


def save_sensitivity(path: Path, table: SensitivityTable, place: Place = rename) -> None:
    """Write the file; it appears whole or not at all. The same table gives the same bytes."""
    names = sorted(table.losses)
    formats = sorted({name for losses in table.losses.values() for name in losses})
    factors = table.factors
    arrays = {
        "losses": np.array([[table.losses[name].get(f, np.nan) for f in formats] for name in names], np.float64),
        **{f"rows/{name}": np.ascontiguousarray(factors.rows[name], np.float64) for name in names},
        **{f"columns/{name}": np.ascontiguousarray(factors.columns[name], np.float64) for name in names},
        **{key: np.array([getattr(factors, key)[name] for name in names], np.float64) for key in MAGNITUDES},
    }
    header = {
        "tensors": names,
        "formats": formats,
        "sampled_rows": [table.sampled_rows[name] for name in names],
        "factors": {key: getattr(factors, key) for key in _FACTORS_IDENTITY},
        **{key: getattr(table, key) for key in _TABLE_IDENTITY},
    }
    _KIND.save(path, header, arrays, place)


def is_sensitivity(path: Path) -> bool:
    """Whether the file is a sensitivity table, be it of this version or another."""
    return _KIND.is_in(path)


def load_sensitivity(path: Path) -> SensitivityTable:
    """Read what save_sensitivity wrote.

    Raises ConvertError for a file that is missing, truncated, of another version, no such table, or holds impossible
    values.
    """
    return _table(str(path), *_KIND.load(path))


def _table(where: str, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> SensitivityTable:
    names, formats = (_unique_strings(where, header, key) for key in ("tensors", "formats"))
    if not isinstance(header.get("factors"), dict):
        raise _KIND.damaged(where, "the identity of its factors is absent")
    sampled = header.get("sampled_rows")
    if not isinstance(sampled, list) or len(sampled) != len(names) or not all(_is_count(n) for n in sampled):
        raise _KIND.damaged(where, "sampled_rows are not one number a tensor")

    def array(key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        values = arrays.pop(key, None)
        if values is None or values.dtype != np.float64 or (shape is not None and values.shape != shape):
            raise _KIND.damaged(
                where, f"it lacks float64 values of {key}" + (f" of shape {list(shape)}" if shape else "")
            )
        return values

    losses = array("losses", (len(names), len(formats)))
    magnitudes: dict[str, Any] = {
        key: dict(zip(names, array(key, (len(names),)).tolist(), strict=True)) for key in MAGNITUDES
    }
    factors = FisherFactors(
        rows={name: array(f"rows/{name}") for name in names},
        columns={name: array(f"columns/{name}") for name in names},
        **magnitudes,
        **_KIND.fields(where, header["factors"], _FACTORS_IDENTITY),
        where=where,
    )
    if arrays:
        raise _KIND.damaged(where, f"its values of {min(arrays)!r} belong to no tensor")
    identity = _KIND.fields(where, header, _TABLE_IDENTITY)
    if factors.labels not in get_args(Labels) or identity["effort"] not in get_args(Effort):
        raise _KIND.damaged(where, f"labels {factors.labels!r} or effort {identity['effort']!r} are unknown")
    return SensitivityTable(
        losses={
            name: {f: loss for f, loss in zip(formats, row.tolist(), strict=True) if not np.isnan(loss)}
            for name, row in zip(names, losses, strict=True)
        },
        factors=factors,
        sampled_rows=dict(zip(names, sampled, strict=True)),
        where=where,
        **identity,
    )


def _unique_strings(where: str, header: dict[str, Any], key: str) -> list[str]:
    values = header.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise _KIND.damaged(where, f"{key} is no list of names")
    if len(set(values)) != len(values):
        raise _KIND.damaged(where, f"{key} names one twice")
    return values


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
