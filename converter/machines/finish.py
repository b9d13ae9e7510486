"""The command `bitwright finish`: the pieces of all parts as one artifact, verified, judged and reported."""

import shlex
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
from bitwright.converter.machines.unlike import check_alike, missing, renamed
from bitwright.converter.pipeline import run
from bitwright.converter.report.data import Report
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan import PlannedTensor


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

    def was_copied(self, name: str) -> bool:
        return True


def gather(saved: SavedPlan, manifests: Collection[Path]) -> list[Piece]:
    """The pieces of all parts, in their order. Raises ConvertError as `finish` does."""
    own: dict[Path, Piece] = {}
    faults = []
    for path in manifests:
        try:
            piece = load_manifest(path)
        except ConvertError as error:
            faults.append(f"{error.what} ({error.where})")
        else:
            if piece.fingerprint["plan"] == saved.identity:
                own[path] = piece
            else:
                faults.append(f"{path} is of another plan")

    def command(part: Part) -> str:
        known = next(iter(own.values()), None)
        output = default_output(saved.path, part) if known is None else renamed(known.path, known.part, part)
        return shlex.join(encode_command(saved.path, part, output))

    if not own:
        raise ConvertError(
            "; ".join(faults) or "no part of this plan is encoded",
            str(saved.path),
            f"encode it, in as many parts as you like: {command(Part(1, 1))}",
        )
    check_alike({path: (piece.part, piece.fingerprint) for path, piece in own.items()}, command)
    by_part = {piece.part: piece for piece in own.values()}
    if lacking := missing(by_part, faults, str(saved.path), command):
        raise lacking
    return [by_part[part] for part in sorted(by_part)]


def _owners(saved: SavedPlan, pieces: Sequence[Piece], rows: Sequence[PlannedTensor]) -> dict[str, Piece]:
    """The piece that has each tensor. Raises ConvertError where they do not have what the plan has."""
    owners = {entry.name: piece for piece in pieces for entry in piece.tensors}
    sizes = {entry.name: entry.n_bytes for piece in pieces for entry in piece.tensors}
    if sizes != {row.tensor.name: row.n_bytes for row in rows}:
        raise ConvertError(
            "the parts do not have the tensors that the plan has",
            str(saved.path),
            f"{saved.again}, then encode all parts again",
        )
    return owners


def _default_manifests(plan: Path) -> list[Path]:
    """Those that `encode` has written without an --output."""
    directory = default_output(plan, Part(1, 1)).parent
    return sorted(directory.glob("*.json")) if directory.is_dir() else []
