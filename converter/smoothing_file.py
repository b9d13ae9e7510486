"""The record of smoothing: every factor, by channel, and what was decided why.

safetensors  metadata "bitwright.smoothing": JSON with "version", "model", "revision", "alpha" and "groups"
             "factors/TENSOR"   float32 [n_matrices, n_columns], what the inputs of this GGUF tensor are divided by
                                and its columns multiplied with
             "values/NAME", "rows/NAME", "columns/NAME"   what becomes of the checkpoint's tensors, see Folding
"""

from dataclasses import dataclass, fields
from hashlib import sha256
from pathlib import Path

import numpy as np

from calibration.smoothing import Alpha
from converter.smooth_search import SmoothedGroup
from converter.smoothed import Folding
from formats.record import RecordKind

_KIND = RecordKind("bitwright.smoothing", 1, "record of smoothing", "convert --fresh MODEL")


@dataclass(frozen=True, eq=False)
class Smoothing:
    """alpha: as asked for. groups, factors, foldings: as of smooth_search.Smoother."""

    model: str
    revision: str | None
    alpha: Alpha
    groups: tuple[SmoothedGroup, ...]
    factors: dict[str, np.ndarray]
    foldings: dict[str, Folding]

    def identity(self) -> str:
        """Of what it makes of the model, "" where that is nothing."""
        digest = sha256()
        for name, folding in sorted(self.foldings.items()):
            for key in ("values", "rows", "columns"):
                if (values := getattr(folding, key)) is not None:
                    digest.update(f"{key}/{name}".encode() + np.ascontiguousarray(values, "<f4").tobytes())
        return digest.hexdigest() if self.foldings else ""


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
    header, arrays = _KIND.load(path)
    try:
        parts: dict[str, dict[str, np.ndarray]] = {}
        factors = {}
        for key, values in arrays.items():
            kind, _, name = key.partition("/")
            if not np.isfinite(values).all():
                raise ValueError(f"{key} has values that are not finite")
            if kind == "factors":
                factors[name] = values
            else:
                parts.setdefault(name, {})[kind] = values
        return Smoothing(
            model=header["model"],
            revision=header["revision"],
            alpha=header["alpha"],
            groups=tuple(SmoothedGroup(**group) for group in header["groups"]),
            factors=factors,
            foldings={name: Folding(**of) for name, of in parts.items()},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _KIND.damaged(str(path), str(error)) from None
