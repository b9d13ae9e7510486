"""The command `bitwright encode`: the tensors of one part of a plan, in a file of their own."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from bitwright.calibration.control import ShouldStop
from bitwright.converter.artifact.writer import JOURNAL, ArtifactWriter, PlanEncoder
from bitwright.converter.job.cache import machine_identity
from bitwright.converter.job.identity import tool_identity
from bitwright.converter.job.progress import Progress
from bitwright.converter.machines.part import Part
from bitwright.converter.machines.piece import Piece, data_path, load_manifest, piece_of, save_manifest
from bitwright.converter.machines.saved_plan import SavedPlan, load_plan
from bitwright.converter.machines.shares import rows_of
from bitwright.converter.machines.work import part_directory, work_path
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove, remove_tree
from bitwright.formats.files.journal import read_lines
from bitwright.formats.files.whole import copy_file, whole_file
from bitwright.profiles.planning.plan import PlannedTensor

R = TypeVar("R", bound=PlannedTensor)


@dataclass(frozen=True)
class _SomeRows(Generic[R]):
    """An encoder of a plan, of which some rows are asked for."""

    encoder: PlanEncoder[R]
    rows: tuple[R, ...]

    def encode(self, planned: R) -> Iterator[np.ndarray]:
        return self.encoder.encode(planned)

    def remarks(self, name: str) -> dict[str, object]:
        return self.encoder.remarks(name)

    def was_copied(self, name: str) -> bool:
        return self.encoder.was_copied(name)


def encode_part(
    plan: Path,
    part: Part,
    output: Path | None,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    command: str,
    scratch: Path | None = None,
    **changes: Any,
) -> Path:
    """Encode the tensors of a part; returns its manifest, which is written last, beside the data.

    output: of the manifest; None for PLAN.parts/3-of-16.json. command: what continues the part when it is run again.
    scratch: where the data grow, on a disk of this machine; None for beside the output. changes: options of the plan's
    job that differ here, which no byte depends on: threads, and the place of the model or of the importance matrix.
    Raises ConvertError (Stopped when should_stop() asked for it); the same call continues after the last tensor.
    """
    saved = load_plan(plan)
    output = output or default_output(plan, part)
    fingerprint = part_fingerprint(saved)
    if _made_before(output, part, fingerprint):
        progress.say(f"{output}: already done")
        remove_tree(work_path(output, scratch))
        return output
    _, adapted = saved.measured(progress, should_stop, command=command, **changes)
    rows = rows_of(adapted.prepared.plan.tensors, part)
    piece = piece_of(output, part, fingerprint, rows)
    begun = {**fingerprint, "part": str(part)}
    with part_directory(output, scratch, begun, progress, command) as directory:
        if not rows:  # there are more parts than tensors
            with whole_file(directory / piece.file_name, "piece") as file:
                file.write(piece.header)
        with adapted.prepared.target.encoder(adapted) as encoder:
            journal = directory / JOURNAL
            (grown,) = ArtifactWriter(_SomeRows(encoder, rows), [piece], directory, journal).write(
                progress, should_stop
            )
        remove(output)
        copy_file(grown, data_path(output))
        lines = {line["tensor"]: line for line in read_lines(journal)}
        save_manifest(_with_hashes(piece, lines))
    return output


def default_output(plan: Path, part: Part) -> Path:
    """Of the manifest of a part."""
    return plan.with_name(f"{plan.stem}.parts") / f"{part.index}-of-{part.count}.json"


def part_fingerprint(saved: SavedPlan) -> dict[str, Any]:
    """What all parts of an encoding have to have in common, as plain JSON data: tool, plan, and what of a machine
    decides the last bits of what it computes."""
    return {"tool": tool_identity(), "plan": saved.identity, **machine_identity("cpu")}


def _with_hashes(piece: Piece, written: dict[str, dict[str, Any]]) -> Piece:
    entries = []
    for entry in piece.tensors:
        line = dict(written[entry.name])
        sha256 = line.pop("sha256")
        del line["tensor"]
        entries.append(replace(entry, sha256=sha256, remarks=line))
    return replace(piece, tensors=tuple(entries))


def _made_before(output: Path, part: Part, fingerprint: dict[str, Any]) -> bool:
    """Whether the part is there as it would be made. Raises ConvertError for something else of its name."""
    if not output.exists():
        return False
    found = load_manifest(output)
    if found.part != part:
        raise ConvertError(
            f"the manifest is of part {found.part}, and this is part {part}", str(output), "name another --output"
        )
    return found.fingerprint == fingerprint


def encode_command(plan: Path, part: Part, output: Path) -> list[str]:
    """What encodes a part, as words."""
    return ["bitwright", "encode", "--plan", str(plan), "--part", str(part), "--output", str(output)]
