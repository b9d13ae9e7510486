"""The command `bitwright finish`: the pieces of all parts as one artifact, verified, judged and reported."""

import re
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.control import ShouldStop
from bitwright.converter.artifact.target import Adapted, Prepared
from bitwright.converter.artifact.writer import PlanEncoder
from bitwright.converter.job.progress import Progress
from bitwright.converter.machines.encode import default_output, encode_command
from bitwright.converter.machines.part import Part
from bitwright.converter.machines.piece import Piece, load_manifest
from bitwright.converter.machines.saved_plan import SavedPlan, load_plan
from bitwright.converter.pipeline import run
from bitwright.converter.report.data import Report
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan import PlannedTensor

# Parts whose commands an error shows.
_SHOWN = 8


def finish(
    plan: Path, manifests: Sequence[Path], progress: Progress, should_stop: ShouldStop, **changes: Any
) -> tuple[Prepared[Any], Report]:
    """Do what is left of a job whose tensors are encoded: assemble, verify, judge and report. Returns what
    pipeline.run returns.

    manifests: of all parts, in any order; none for those of `encode` without an --output. changes: options of the
    plan's job that differ here, which no byte depends on, and the output.
    Raises ConvertError that names the parts that are missing, damaged or of something else, with the commands that
    encode them again.
    """
    saved = load_plan(plan)
    pieces = gather(saved, manifests or _default_manifests(plan))

    @contextmanager
    def encoders(adapted: Adapted[Any, Any]) -> Iterator[PlanEncoder[Any]]:
        yield _Pieces(adapted.prepared.plan.tensors, _owners(saved, pieces, adapted.prepared.plan.tensors))

    return run(saved.job(extent="end", **changes), progress, should_stop, encoders=encoders)


@dataclass(frozen=True)
class _Pieces:
    """What stands for an encoder where everything is encoded. owners: of every tensor."""

    rows: tuple[PlannedTensor, ...]
    owners: dict[str, Piece]

    def encode(self, planned: PlannedTensor) -> Iterator[np.ndarray]:
        return self.owners[planned.tensor.name].read(planned.tensor.name)

    def remarks(self, name: str) -> dict[str, object]:
        (entry,) = [entry for entry in self.owners[name].tensors if entry.name == name]
        return dict(entry.remarks or {})


def gather(saved: SavedPlan, manifests: Collection[Path]) -> list[Piece]:
    """The pieces of all parts, in their order. Raises ConvertError as `finish` does."""
    pieces, faults = [], []
    for path in manifests:
        try:
            pieces.append(load_manifest(path))
        except ConvertError as error:
            faults.append(f"{error.what} ({error.where})")
    foreign = [piece for piece in pieces if piece.fingerprint["plan"] != saved.identity]
    faults += [f"{piece.path} is of another plan" for piece in foreign]
    own = [piece for piece in pieces if piece.fingerprint["plan"] == saved.identity]
    counts = {piece.part.count for piece in own}
    if len(counts) > 1:
        raise ConvertError(
            f"the plan was cut into different numbers of parts: {', '.join(map(str, sorted(counts)))}",
            ", ".join(str(piece.path) for piece in own[:_SHOWN]),
            "give the manifests of one number of parts",
        )
    if not own:
        raise ConvertError(
            "; ".join(faults) or "no part of this plan is encoded",
            str(saved.path),
            f"encode it, as one part or as more: {_commands(saved, [Part(1, 1)], own)}",
        )
    _check_alike(saved, own)
    (count,) = counts
    by_part: dict[Part, Piece] = {piece.part: piece for piece in own}
    missing = [part for part in (Part(i, count) for i in range(1, count + 1)) if part not in by_part]
    if missing:
        numbers = ", ".join(str(part.index) for part in missing)
        parts = f"part {numbers} of {count} is" if len(missing) == 1 else f"parts {numbers} of {count} are"
        raise ConvertError(
            "; ".join([f"{parts} missing", *faults]),
            str(saved.path),
            f"encode what is missing: {_commands(saved, missing, own)}",
        )
    return [by_part[part] for part in sorted(by_part)]


def _check_alike(saved: SavedPlan, pieces: Sequence[Piece]) -> None:
    """Refuse parts of machines, or of versions, that do not compute the same to the bit: the fewer ones are named."""
    alike: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        alike[repr(sorted(piece.fingerprint.items()))].append(piece)
    if len(alike) == 1:
        return
    most, *others = sorted(alike.values(), key=len, reverse=True)
    odd = [piece for group in others for piece in group]
    first, other = most[0].fingerprint, odd[0].fingerprint
    keys = [key for key in {**first, **other} if first.get(key) != other.get(key)]
    numbers = ", ".join(str(piece.part) for piece in odd)
    values = "; ".join(f"{key} is {other.get(key)} there and {first.get(key)} in the others" for key in keys)
    raise ConvertError(
        f"parts {numbers} were encoded where a machine computes otherwise: {values}",
        ", ".join(str(piece.path) for piece in odd[:_SHOWN]),
        "remove these manifests, and encode them on machines of the others' kind: "
        + _commands(saved, [piece.part for piece in odd], most),
    )


def _owners(saved: SavedPlan, pieces: Sequence[Piece], rows: Sequence[PlannedTensor]) -> dict[str, Piece]:
    """The piece that has each tensor. Raises ConvertError where they do not have what the plan has."""
    owners = {entry.name: piece for piece in pieces for entry in piece.tensors}
    sizes = {entry.name: entry.n_bytes for piece in pieces for entry in piece.tensors}
    if sizes != {row.tensor.name: row.n_bytes for row in rows}:
        raise ConvertError(
            "the parts do not have the tensors that the plan has",
            ", ".join(str(piece.path) for piece in pieces[:_SHOWN]),
            f"{saved.again}, then encode all parts again",
        )
    return owners


def _default_manifests(plan: Path) -> list[Path]:
    """Those that `encode` has written without an --output."""
    directory = default_output(plan, Part(1, 1)).parent
    return sorted(directory.glob("*.json")) if directory.is_dir() else []


def _commands(saved: SavedPlan, parts: Sequence[Part], known: Sequence[Piece]) -> str:
    """What encodes these parts, whose manifests are to be called as those that are known are."""
    lines = [encode_command(saved.path, part, _name(saved.path, part, known)) for part in parts[:_SHOWN]]
    more = [f"and so on for {len(parts) - _SHOWN} more"] if len(parts) > _SHOWN else []
    return "\n    ".join(["", *map(shlex.join, lines), *more])


def _name(plan: Path, part: Part, known: Sequence[Piece]) -> Path:
    """The manifest of a part, called as those that are known."""
    for piece in known:
        number = rf"(?<!\d)0*{piece.part.index}(?!\d)"
        if (found := re.search(number, piece.path.name)) is not None:
            renamed = re.sub(number, f"{part.index:0{len(found[0])}d}", piece.path.name, count=1)
            return piece.path.with_name(renamed)
    return default_output(plan, part)
