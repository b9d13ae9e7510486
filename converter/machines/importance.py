"""`bitwright imatrix --part` and `--merge`: a calibration whose samples are shared among machines."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bitwright.calibration.control import ShouldStop
from bitwright.calibration.sensitivity.table import save_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
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
from bitwright.converter.machines.group_sums import Groups, GroupSumsOfPart, load_part, save_part
from bitwright.converter.machines.part import Part
from bitwright.converter.machines.saved_plan import plain_options
from bitwright.converter.machines.unlike import gathered
from bitwright.converter.machines.work import part_directory, work_path
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.evidence import ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH, matrices_of
from bitwright.converter.measure.running import calibration_text, load_tokenizer, runnable, streamable
from bitwright.converter.measure.sensitivity import CANDIDATE_FORMATS, Trials, build_sensitivity
from bitwright.converter.model.model_map import describe
from bitwright.converter.preflight import check_samples
from bitwright.converter.source.open import open_by_content
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.disk import remove_tree
from bitwright.formats.typed import to_plain


def write_part(
    part: Part,
    output: Path | None,
    progress: Progress,
    should_stop: ShouldStop,
    *,
    words: Sequence[str],
    sensitivity: bool = False,
    scratch: Path | None = None,
    **options: Any,
) -> Path:
    """Run the model over the samples of a part and write their sums; returns the file.

    output: None for imatrix.parts/3-of-16.safetensors. words: of the command. sensitivity: gradients, too, of their own
    samples. scratch: where the hidden states are, on a disk of this machine; None for beside the output. options: of
    the job, as of build_job. Raises ConvertError (Stopped when should_stop() asked for it); the same call continues
    after the last layer.
    """
    from bitwright.calibration.stream.micro_batches import N_GROUPS, Excerpt

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
    groups = range(N_GROUPS * (part.index - 1) // part.count, N_GROUPS * part.index // part.count)
    fingerprint = to_plain(
        job_fingerprint(job, run.checkpoint, "imatrix")
        | machine_identity(job.device)
        | {"dtype": _dtype(job), "gradients": sensitivity}
    )
    if _made_before(output, part, fingerprint):
        progress.say(f"{output}: already done")
        remove_tree(run.work_dir)
        return output
    with part_directory(output, scratch, {**fingerprint, "part": str(part)}, progress, job.command):
        from bitwright.calibration.passes.importance_pass import stream_importance_groups
        from bitwright.calibration.sensitivity.fisher import stream_gradient_groups

        running, running_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        model, tokenizer = streamable(run, running, job.calibration_dtype), load_tokenizer(running.location)
        text = calibration_text(job, tokenizer, run.model_map, job.samples)
        excerpt = Excerpt.of_groups(groups, len(text.tokens))
        sums = stream_importance_groups(model, observed_names(running_map), text, run.control("calibration"), excerpt)
        gradients: Groups = {}
        if sensitivity:
            few = calibration_text(job, tokenizer, run.model_map, ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH)
            excerpt = Excerpt.of_groups(groups, len(few.tokens))
            gradients = stream_gradient_groups(model, few, run.control("analysis"), excerpt, seed=job.seed)
        identity = {"model": model.name, "revision": model.revision, **text.identity}
        importance = {group: of._asdict() for group, of in sums.items()}
        fingerprint |= {"text": text_identity(text)}
        made = GroupSumsOfPart(part, fingerprint, plain_options(options), identity, list(words), importance, gradients)
        save_part(output, made)
    return output


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
    """Add up the sums of all parts, in the order of their groups: the importance matrix that one machine computes.
    Returns the files that were written.

    sensitivity: measure what every format costs every tensor, too, for which the model is read; model: where it is on
    this machine, None for as the parts say. fresh: replace what has the output's name. changes: options of the parts'
    job that differ here, such as threads. Raises ConvertError for parts that are missing, damaged or do not go
    together, with the commands that compute them.
    """
    check_places(paths, [output])
    parts = gathered(paths, load_part, "the files that `bitwright imatrix --part I/N`")
    replaceable = Replaceable()
    written = [output, *([output.with_suffix(".sensitivity.safetensors")] if sensitivity else [])]
    if fresh:
        for path in written:
            check_replaceable(path, directory=False)
        replaceable.allow(written)
    from bitwright.calibration.passes.importance_pass import TensorSums, importance_of_groups

    first = parts[0]
    sums = {group: TensorSums(**of) for part in parts for group, of in part.importance.items()}  # type: ignore[arg-type]
    importance = importance_of_groups(sums, **first.identity)
    if sensitivity:
        if not first.fingerprint["gradients"]:
            raise ConvertError(
                "the parts have no gradients, of which sensitivity is made",
                str(paths[0]),
                "compute them with --sensitivity",
            )
        here = {name: value for name, value in {**changes, "model": model}.items() if value is not None}
        job = build_job(**{**first.options, **here}, profile=DEFAULT_PROFILE, command=command)
        gradients = {group: of for part in parts for group, of in part.gradients.items()}
        run = _run(job, output, work_path(output, None), progress, should_stop)
        fingerprint = first.fingerprint | {"part": "all"}
        with part_directory(output, None, fingerprint, progress, command):
            _write_sensitivity(run, importance, gradients, written[1], replaceable)
    save_imatrix(output, importance, replaceable.put)
    return written


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
