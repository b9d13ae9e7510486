"""The large statistics of all parts of a text brought together: in a directory, as one machine leaves them in its work
directory. One matrix at a time is in memory, and of this one three sums at most."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitwright.calibration.control import Interrupted, ShouldStop
from bitwright.calibration.statistics.activation_file import save_activations
from bitwright.calibration.statistics.activations import ActivationStatistics
from bitwright.converter.artifact.ownership import occupied
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.spelling import STATISTICS_RECORD
from bitwright.converter.machines.measuring.bundle import part_of
from bitwright.converter.machines.measuring.group_sums import GroupSumsOfPart
from bitwright.converter.machines.unlike import command_of
from bitwright.converter.measure.statistics_directory import Statistics, save_record
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import make_directory, remove_tree, rename
from bitwright.formats.files.whole import whole_file
from bitwright.formats.names import hidden_path

MOMENTS, ROWS = "moments/", "rows/"
"""What the names of a part's data begin with."""


def statistics_path(output: Path) -> Path:
    """Beside the importance matrix that is merged."""
    return output.with_suffix(".statistics")


def check_statistics_place(directory: Path, fresh: bool) -> None:
    """Refuse a place that is taken, with `fresh` by something else than statistics. Raises ConvertError."""
    if not os.path.lexists(directory) or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (fresh and (directory / STATISTICS_RECORD).is_file()):
        raise occupied(directory)


def write_statistics(
    directory: Path,
    parts: Sequence[GroupSumsOfPart],
    activations: ActivationStatistics | None,
    progress: Progress,
    should_stop: ShouldStop,
) -> None:
    """The second moments of all parts, which are in their order, and the activations with the rows that were kept. The
    directory appears whole, in place of one that may be replaced.

    Raises ConvertError for data of a part that are not what was written, and Interrupted.
    """
    draft = hidden_path(directory, "unfinished")
    remove_tree(draft)
    made = Statistics(draft, "", [], {}, {})
    names = sorted({name for part in parts for name in part.data.members})
    known = parts[0]
    for n_done, name in enumerate(names, start=1):
        if name.startswith(MOMENTS):
            _merge_moments(made.moments, name, parts)
        else:
            _merge_rows(made, name, parts)
        progress("merge", n_done, len(names), "matrices")
        if should_stop():
            raise Interrupted(f"stopped after {n_done} of {len(names)} matrices")
    if known.moments:
        _index_moments(made.moments, [part.moments for part in parts])
    make_directory(draft)
    if activations is not None:
        save_activations(made.activations, activations)
    if known.fingerprint["trials"]:
        lines = sorted(
            (line for part in parts for line in part.trials), key=lambda line: (line["removed"], line["part"])
        )
        with whole_file(made.trials, "trials of super weights") as file:
            file.write(json.dumps(lines, indent=1).encode())
    save_record(draft, str(known.identity["model"]), known.fingerprint["files"], known.fingerprint["text"])
    remove_tree(directory)
    rename(draft, directory)


def _merge_moments(directory: Path, name: str, parts: Sequence[GroupSumsOfPart]) -> None:
    from bitwright.calibration.statistics.quarter_sums import add_quarters
    from bitwright.calibration.statistics.second_moments import read_partial, thinned, write_packed
    from bitwright.calibration.stream.micro_batches import groups_of_part

    sums: dict[int, np.ndarray] = {}
    rows = []
    for part in parts:
        if name in part.data.members:
            of_part, held_out = _read(part, name, read_partial)
            sums |= of_part
            rows.append(held_out)
        add_quarters(sums, 0, groups_of_part(part.part.index, part.part.count).stop)
    if sums:  # held-out tokens alone may have reached an expert
        (upper,) = sums.values()
        write_packed(directory, _stem(name), upper, thinned(np.concatenate(rows)))


def _merge_rows(made: Statistics, name: str, parts: Sequence[GroupSumsOfPart]) -> None:
    kept: dict[int, list[np.ndarray]] = {}
    for part in parts:
        if name in part.data.members:
            for matrix, of_part in _read(part, name, _arrays).items():
                kept.setdefault(int(matrix), []).append(of_part)
    made.rows.write(_stem(name), {matrix: np.concatenate(kept[matrix]) for matrix in sorted(kept)})


def _stem(name: str) -> str:
    return name.partition("/")[2]


def _arrays(file: Any) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def _read(part: GroupSumsOfPart, name: str, read: Callable[[Any], Any]) -> Any:
    try:
        with part.data.open(name) as file:
            return read(file)
    except ConvertError as error:
        own = part_of(part.data.path)
        remedy = f"remove {own}, and make it again:\n    {command_of(part.command, part.part, own)}"
        raise ConvertError(error.what, error.where, remedy) from None


def _index_moments(directory: Path, of_parts: Sequence[dict[str, Any]]) -> None:
    from bitwright.calibration.passes.importance_pass import Fed, index_moments
    from bitwright.calibration.statistics.second_moments import moments_path

    make_directory(directory)
    shared: dict[str, str] = {}
    fed: dict[str, dict[int, Fed]] = {}
    for of_part in of_parts:
        shared |= of_part["shared"]
        for tensor, told in of_part["fed"].items():
            columns = None if told["columns"] is None else np.array(told["columns"], np.int64)
            fed.setdefault(tensor, {}).update(
                {matrix: Fed(parameter, of_parameter, columns) for matrix, parameter, of_parameter in told["matrices"]}
            )
    written = {name: group for name, group in shared.items() if moments_path(directory, group).exists()}
    index_moments(directory, written, fed)
