"""Statistics that come with a model: an importance matrix or a sensitivity table that lies beside its weights, or is in
its repository. They take the place of what would be measured, once they are known to be of these very weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from bitwright.calibration.sensitivity.table import load_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.converter.artifact.run import Run
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.evidence import formats_to_measure
from bitwright.converter.measure.sensitivity import check_sensitivity
from bitwright.converter.source.checkpoint import IMATRIX_PATTERN, SENSITIVITY_PATTERN, Checkpoint, model_files
from bitwright.formats.errors import ConvertError
from bitwright.formats.registry import get_format

_OTHERWISE = "--no-published measures it here"


def with_published(run: Run) -> Run:
    """The same with the files that come with its model, where they fit and the job would measure what they hold: one
    that names a text of its own measures on that. Files of other weights, or that lack something, are left alone, and
    the notes say why.

    An importance matrix is taken where no second moments are wanted, which no file has: those that error feedback needs
    bring the importance along.
    """
    job = run.job
    if not job.published or job.calibration is not None or run.checkpoint.fetch_weights is not None:
        return run
    notes: list[str] = []
    sensitivity, imatrix = job.sensitivity, job.imatrix
    if sensitivity is None and job.profile.needs_sensitivity and not job.refine:
        sensitivity = _first(run, SENSITIVITY_PATTERN, "sensitivity table", _check_sensitivity, notes)
    if imatrix is None and (found := _files_of(run.checkpoint, IMATRIX_PATTERN)):
        if job.feedback is None and job.profile.target == "gguf":
            imatrix = _first(run, IMATRIX_PATTERN, "importance matrix", _check_imatrix, notes)
        elif job.profile.target == "gguf":
            notes.append(
                f"{found[0].name}, which comes with the model, is not used: error feedback calibrates, and that gives"
                " the importance along with what no file has; --no-error-feedback takes the file"
            )
    job = replace(job, sensitivity=sensitivity, imatrix=imatrix)
    return replace(run, job=job, notes=(*run.notes, *notes))


def brings_statistics(checkpoint: Checkpoint) -> bool:
    """Whether any such file is there, be it of use or not."""
    return any(_files_of(checkpoint, pattern) for pattern in (IMATRIX_PATTERN, SENSITIVITY_PATTERN))


def _files_of(checkpoint: Checkpoint, pattern: str) -> Sequence[Path]:
    """Of a GGUF the one of its own name, as others lie beside it; by name."""
    location = checkpoint.location
    if location.is_dir():
        return model_files(location, [pattern], largest=None)
    path = location.with_name(pattern.replace("*", location.stem))
    return [path] if path.is_file() else []


def _first(run: Run, pattern: str, what: str, check: Callable[[Run, Path], None], notes: list[str]) -> Path | None:
    """The first that fits; notes: take what is to be said of it, and of the others."""
    for path in _files_of(run.checkpoint, pattern):
        try:
            check(run, path)
        except ConvertError as error:
            notes.append(f"{path.name}, which comes with the model, is not used: {error.what}")
            continue
        notes.append(f"the {what} is {path.name}, which comes with the model; {_OTHERWISE}")
        return path
    return None


def _check_sensitivity(run: Run, path: Path) -> None:
    table = load_sensitivity(path)
    check_sensitivity(table, run.checkpoint, run.model_map)
    formats = formats_to_measure(run.job.profile, [rule.format for rule in run.job.overrides])
    for tensor, losses in table.losses.items():
        n_columns = table.factors.columns[tensor].shape[1]
        if missing := [name for name in formats if get_format(name).fits(n_columns) and name not in losses]:
            raise ConvertError(f"it does not say what {missing[0]} costs {tensor}", str(path), _OTHERWISE)


def _check_imatrix(run: Run, path: Path) -> None:
    """What it says of the weights are names and shapes alone; of a directory they are the publisher's word."""
    tensors = {tensor.name: tensor for tensor in run.model_map.tensors}
    importance = load_imatrix(path).shaped_as({t.name: (t.n_matrices, t.n_columns) for t in tensors.values()})
    for name in sorted({place.tensor for places in observed_names(run.model_map).values() for place in places}):
        wanted = (tensors[name].n_matrices, tensors[name].n_columns)
        if name not in importance.sums or importance.sums[name].shape != wanted:
            raise ConvertError(f"it lacks {name}, or has it in another shape", str(path), _OTHERWISE)
