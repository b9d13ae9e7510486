"""The record of smoothing: every factor, by channel, and what was decided why.

safetensors  metadata "bitwright.smoothing": JSON with "version", "model", "revision", "alpha" and "groups"
             "factors/TENSOR"   float32 [n_matrices, n_columns], what the inputs of this GGUF tensor are divided by
                                and its columns multiplied with
             "values/NAME", "rows/NAME", "columns/NAME"   what becomes of the checkpoint's tensors, see Folding
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from bitwright.calibration.choices import Alpha
from bitwright.converter.smoothing.search import SmoothedGroup
from bitwright.converter.source.smoothed import Folding, identity_of_foldings
from bitwright.formats.files.record import RecordKind
from bitwright.formats.typed import is_a

_KIND = RecordKind("bitwright.smoothing", 1, "record of smoothing", "bitwright --fresh MODEL")
_FOLDED = tuple(field.name for field in fields(Folding))


@dataclass(frozen=True, eq=False)
class Smoothing:
    """alpha: as asked for. groups: as of smoothing.search; factors, foldings: as of smoothing.folder."""

    model: str
    revision: str | None
    alpha: Alpha
    groups: tuple[SmoothedGroup, ...]
    factors: dict[str, np.ndarray]
    foldings: dict[str, Folding]

    def identity(self) -> str:
        """Of what it makes of the model, "" where that is nothing."""
        return identity_of_foldings(self.foldings)


def save_smoothing(path: Path, smoothing: Smoothing) -> None:
    """Write the file; it appears whole or not at all. The same record gives the same bytes."""
    arrays = {f"factors/{name}": values for name, values in smoothing.factors.items()}
    for name, folding in smoothing.foldings.items():
        parts = {f.name: getattr(folding, f.name) for f in fields(Folding)}
        arrays |= {f"{key}/{name}": values for key, values in parts.items() if values is not None}
    header = {
        "model": smoothing.model,
        "revision": smoothing.revision,
        "alpha": smoothing.alpha,
        "groups": [group.to_dict() for group in smoothing.groups],
    }
    in_order = {name: np.ascontiguousarray(arrays[name], np.float32) for name in sorted(arrays)}
    _KIND.save(path, header, in_order)


def is_smoothing(path: Path) -> bool:
    return _KIND.is_in(path)


def load_smoothing(path: Path) -> Smoothing:
    """Read what save_smoothing wrote. Raises ConvertError for a damaged file."""
    where = str(path)
    header, arrays = _KIND.load(path)
    identity = _KIND.fields(where, header, {"model": (str,), "revision": (str, type(None)), "alpha": (float, int, str)})
    groups = header.get("groups")
    if not isinstance(groups, list) or not all(_is_group(group) for group in groups):
        raise _KIND.damaged(where, "its groups are no records of what was decided")
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, values in arrays.items():
        kind, _, name = key.partition("/")
        if kind not in ("factors", *_FOLDED) or values.dtype != np.float32 or not np.isfinite(values).all():
            raise _KIND.damaged(where, f"{key} is unknown, or has values that are no finite float32")
        parts.setdefault(kind, {})[name] = values
    factors = parts.pop("factors", {})
    names = dict.fromkeys(name for named in parts.values() for name in named)
    foldings = {
        name: Folding(**{kind: named[name] for kind, named in parts.items() if name in named}) for name in names
    }
    return Smoothing(**identity, groups=tuple(SmoothedGroup(**g) for g in groups), factors=factors, foldings=foldings)


def _is_group(group: Any) -> bool:
    declared = get_type_hints(SmoothedGroup)
    return (
        isinstance(group, dict)
        and group.keys() == declared.keys()
        and all(is_a(value, declared[key]) for key, value in group.items())
    )
