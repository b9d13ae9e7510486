"""`bitwright imatrix --part` and `--merge`: a calibration whose samples are shared among machines."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.calibration.control import ShouldStop
from bitwright.calibration.sensitivity.table import save_sensitivity
from bitwright.calibration.statistics.activations import ActivationStatistics, InputRows
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.second_moments import moments_path
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.artifact.ownership import Replaceable, check_places, check_replaceable
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.build import build_job
from bitwright.converter.job.cache import machine_identity, text_identity
from bitwright.converter.job.defaults import DEFAULT_PROFILE
from bitwright.converter.job.identity import job_fingerprint
from bitwright.converter.job.job import Job
from bitwright.converter.job.kept import kept
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.recipe import IMPORTANCE_FILE
from bitwright.converter.job.work_directory import stops_cleanly
from bitwright.converter.machines.measuring.bundle import Bundle, data_of, write_bundle
from bitwright.converter.machines.measuring.group_sums import Groups, GroupSumsOfPart, load_part, save_part
from bitwright.converter.machines.measuring.merging import (
    MOMENTS,
    ROWS,
    check_statistics_place,
    statistics_path,
    write_statistics,
)
from bitwright.converter.machines.part import Part
from bitwright.converter.machines.saved_plan import plain_options
from bitwright.converter.machines.unlike import gathered
from bitwright.converter.machines.work import part_directory, work_path
from bitwright.converter.measure.activations import activation_names
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.evidence import ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH, matrices_of
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.measure.sensitivity import CANDIDATE_FORMATS, Trials, build_sensitivity
from bitwright.converter.measure.super_weights import streamed_trials
from bitwright.converter.model.model_map import describe
from bitwright.converter.preflight import check_samples
from bitwright.converter.source.open import open_by_content
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove, remove_tree
from bitwright.formats.typed import to_plain

if TYPE_CHECKING:
    from bitwright.calibration.passes.importance_pass import FedMatrices


@dataclass(frozen=True)
class Measured:
    """What a part measures beside the importance. sensitivity: gradients, of their own samples. moments: second moments
    of the inputs, in the same pass. activations: statistics of the inputs, in a pass of their own, which tells the
    importance, too. super_weights: a share of the trials of the search for them."""

    sensitivity: bool = False
    moments: bool = False
    activations: bool = False
    super_weights: bool = False

    @property
    def has_statistics(self) -> bool:
        """Of which a directory is merged."""
        return self.moments or self.activations or self.super_weights

    def to_dict(self) -> dict[str, bool]:
        """For a fingerprint."""
        others = {"moments": self.moments, "activations": self.activations, "trials": self.super_weights}
        return {"gradients": self.sensitivity, **others}


def write_part(
    part: Part,
    output: Path | None,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    words: Sequence[str],
    measured: Measured,
    scratch: Path | None = None,
    **options: Any,
) -> Path:
    """Run the model over the samples of a part and write their sums; returns the file.

    output: None for imatrix.parts/3-of-16.safetensors; large sums are in a file beside it, see group_sums.py. words: of
    the command. scratch: where the hidden states are, on a disk of this machine; None for beside the output. options:
    of the job, as of build_job. Raises ConvertError (Stopped when should_stop() asked for it); the same call continues
    after the last layer.
    """
    from bitwright.calibration.stream.micro_batches import N_GROUPS

    if part.count > N_GROUPS:
        raise ConvertError(
            f"a text is summed by {N_GROUPS} groups of samples, and cannot be cut into {part.count} parts",
            f"--part {part}",
            f"take {N_GROUPS} parts at most",
        )
    if options.get("calibration") is None:
        raise ConvertError(
            "machines that choose the text for themselves may choose different ones",
            "--part",
            "name it: --calibration embedded, a file, or a dataset of the Hub",
        )
    given = {name: value for name, value in options.items() if value not in (None, ())}
    output = output or Path("imatrix.parts") / f"{part.index}-of-{part.count}.safetensors"
    run = _run(build_job(**given, profile=DEFAULT_PROFILE), output, work_path(output, scratch), progress, should_stop)
    job = run.job
    fingerprint = to_plain(
        job_fingerprint(job, run.checkpoint, "imatrix")
        | machine_identity(job.device)
        | {"dtype": _dtype(job), **measured.to_dict()}
    )
    if measured.has_statistics:
        data_of(output)  # that it has the name of a part's file
    if _made_before(output, part, fingerprint):
        progress.say(f"{output}: already done")
        remove_tree(run.work_dir)
        return output
    with part_directory(output, scratch, {**fingerprint, "part": str(part)}, progress, job.command):
        made = _streamed(run, part, measured)
        fingerprint |= {"text": text_identity(made.text)}
        identity = {"model": run.checkpoint.model_id, "revision": run.checkpoint.revision, **made.text.identity}
        remove(output)
        data = write_bundle(data_of(output), made.files) if measured.has_statistics else Bundle(output, {})
        said = (part, fingerprint, plain_options(options), identity, list(words))
        save_part(output, GroupSumsOfPart(*said, **made.sums, data=data))
    return output


@dataclass(frozen=True)
class _Streamed:
    """text: that was calibrated on. sums: fields of GroupSumsOfPart. files: of its data, by name."""

    text: Corpus
    sums: dict[str, Any]
    files: dict[str, Path]


def _streamed(run: Run, part: Part, measured: Measured) -> _Streamed:
    """Everything that a part measures."""
    from bitwright.calibration.passes.activation_pass import stream_activation_sums
    from bitwright.calibration.passes.importance_pass import stream_importance_groups
    from bitwright.calibration.sensitivity.fisher import stream_gradient_groups
    from bitwright.calibration.stream.micro_batches import Excerpt, groups_of_part

    job, groups = run.job, groups_of_part(part.index, part.count)
    running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
    model, tokenizer = streamable(run, running, job.calibration_dtype), load_tokenizer(running.location)
    text = calibration_text(job, tokenizer, run.model_map, job.samples)
    excerpt = Excerpt.of_groups(groups, len(text.tokens))
    names, files = observed_names(running_map), dict[str, Path]()
    sums: dict[str, Any] = {"importance": {}, "gradients": {}, "activations": {}, "inputs": {}}
    sums |= {"moments": {}, "observed": sorted({place.tensor for places in names.values() for place in places})}
    if measured.moments or not measured.activations:
        directory = run.work_dir / "moments" if measured.moments else None
        importance, partial = stream_importance_groups(
            model, names, text, run.control("calibration"), excerpt, directory
        )
        sums["importance"] = {group: of._asdict() for group, of in importance.items()}
        if partial is not None and directory is not None:
            sums["moments"] = {"shared": partial.shared, "fed": _plain(partial.fed)}
            files |= {f"{MOMENTS}{name}": moments_path(directory, name) for name in {*partial.shared.values()}}
    if measured.activations:
        rows = InputRows(run.work_dir / "activation-rows")
        control = run.control("activations")
        seen = stream_activation_sums(model, activation_names(running_map), text, control, excerpt, rows)
        sums |= {"activations": seen.groups, "inputs": seen.inputs}
        kept_rows = (path for path in rows.directory.glob("*.npz") if not path.name.startswith("."))
        files |= {f"{ROWS}{path.stem}": path for path in kept_rows}
    if measured.sensitivity:
        few = calibration_text(job, tokenizer, run.model_map, ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH)
        excerpt = Excerpt.of_groups(groups, len(few.tokens))
        sums["gradients"] = stream_gradient_groups(model, few, run.control("analysis"), excerpt, seed=job.seed)
    sums["trials"] = streamed_trials(run, slice(part.index - 1, None, part.count)) if measured.super_weights else []
    if lost := sorted(str(path) for path in files.values() if not path.is_file()):
        raise ConvertError(
            "sums that the part has measured are gone", lost[0], f"remove {run.work_dir}, and run the command again"
        )
    return _Streamed(text, sums, files)


def _plain(fed: "FedMatrices") -> dict[str, Any]:
    """As it is in a file, see GroupSumsOfPart."""
    plain = {}
    for tensor, of_matrices in fed.items():
        columns = next(iter(of_matrices.values())).columns
        plain[tensor] = {
            "columns": None if columns is None else columns.tolist(),
            "matrices": [[matrix, of.parameter, of.matrix] for matrix, of in sorted(of_matrices.items())],
        }
    return plain


def merge_parts(
    paths: Sequence[Path],
    output: Path,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    model: str | None = None,
    sensitivity: bool = False,
    fresh: bool = False,
    command: str = "the same call",
    **changes: Any,
) -> list[Path]:
    """Add up the sums of all parts, in the order of their groups: the importance matrix that one machine computes, and
    beside it a directory of the other statistics that they have, see measure.statistics_directory. Returns what was
    written.

    sensitivity: measure what every format costs every tensor, too, for which the model is read; model: where it is on
    this machine, None for as the parts say. fresh: replace what has the output's name. changes: options of the parts'
    job that differ here, such as threads. Raises ConvertError for parts that are missing, damaged or do not go
    together, with the commands that compute them.
    """
    check_places(paths, [output])
    parts = gathered(paths, load_part, "the files that `bitwright imatrix --part I/N`")
    first, replaceable = parts[0], Replaceable()
    files = [output, *([output.with_suffix(".sensitivity.safetensors")] if sensitivity else [])]
    if fresh:
        for path in files:
            check_replaceable(path, directory=False)
        replaceable.allow(files)
    if sensitivity and not first.fingerprint["gradients"]:
        raise ConvertError(
            "the parts have no gradients, of which sensitivity is made",
            str(paths[0]),
            "compute them with --sensitivity",
        )
    importance, activations = _merged(parts)
    has_statistics = any(first.fingerprint[what] for what in ("moments", "activations", "trials"))
    directory = statistics_path(output) if has_statistics else None
    if directory is not None:
        check_places(paths, [directory])
        check_statistics_place(directory, fresh)
        with stops_cleanly(output.parent, command):
            write_statistics(directory, parts, activations, progress, should_stop)
    if sensitivity:
        here = {name: value for name, value in {**changes, "model": model}.items() if value is not None}
        job = build_job(**{**first.options, **here}, profile=DEFAULT_PROFILE, command=command)
        gradients = {group: of for part in parts for group, of in part.gradients.items()}
        run = _run(job, output, work_path(output, None), progress, should_stop)
        fingerprint = first.fingerprint | {"part": "all"}
        with part_directory(output, None, fingerprint, progress, command):
            _write_sensitivity(run, importance, gradients, files[1], replaceable)
    save_imatrix(output, importance, replaceable.put)
    return [*files, *([directory] if directory is not None else [])]


def _merged(parts: Sequence[GroupSumsOfPart]) -> tuple[ImportanceMatrix, ActivationStatistics | None]:
    """What the parts' own files tell, which are in their order and are not used again."""
    from bitwright.calibration.passes.activation_pass import ActivationSums, merged_activations
    from bitwright.calibration.passes.importance_pass import TensorSums, importance_of_groups

    first, activations = parts[0], None
    if first.fingerprint["activations"]:
        of_parts = [ActivationSums(part.activations, part.inputs) for part in parts]
        activations = merged_activations(of_parts, **first.identity)
    if activations is None or first.importance:
        sums = {group: TensorSums(**of) for part in parts for group, of in part.importance.items()}  # type: ignore[arg-type]
        return importance_of_groups(sums, **first.identity), activations
    seen, observed = activations.importance(), set(first.observed)
    sums_of, counts = ({name: of[name] for name in sorted(of) if name in observed} for of in (seen.sums, seen.counts))
    return replace(seen, sums=sums_of, counts=counts), activations


def _write_sensitivity(
    run: Run, importance: ImportanceMatrix, gradients: Groups, path: Path, replaceable: Replaceable
) -> None:
    from bitwright.calibration.sensitivity.fisher import fisher_of_groups

    job = run.job
    running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
    few = calibration_text(
        job, load_tokenizer(running.location), run.model_map, ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH
    )
    model = streamable(run, running, job.calibration_dtype)
    factors = fisher_of_groups(model, matrices_of(running_map), few, gradients)
    stored = kept(
        run.work_dir / IMPORTANCE_FILE,
        "importance matrix",
        run.progress,
        lambda: importance,
        save_imatrix,
        load_imatrix,
    )
    table = build_sensitivity(run, factors, stored.with_costs(factors.columns), Trials(CANDIDATE_FORMATS))
    save_sensitivity(path, table, replaceable.put)


def _run(job: Job, output: Path, work_dir: Path, progress: Progress, should_stop: ShouldStop) -> Run:
    check_samples(job.samples, job.sequence_length)
    checkpoint = open_by_content(job.model, from_quantized=job.from_quantized, base=job.base)
    job = replace(job, output=output, work_dir=work_dir)
    return Run(job, output, work_dir, checkpoint, describe(checkpoint), progress, should_stop)


def _dtype(job: Job) -> str:
    from bitwright.calibration.stream.build import choose_device, choose_dtype

    return str(choose_dtype(job.calibration_dtype, choose_device(job.device)))


def _made_before(output: Path, part: Part, fingerprint: dict[str, Any]) -> bool:
    """Whether the part is there as it would be made. Raises ConvertError for something else of its name."""
    if not output.exists():
        return False
    found = load_part(output)
    if found.part != part:
        raise ConvertError(f"the file is of part {found.part}, and this is part {part}", str(output), "use --output")
    return found.fingerprint == fingerprint | {"text": found.fingerprint.get("text")}
