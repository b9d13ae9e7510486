"""The pipeline from a checkpoint to an artifact, and for Python what the command line does: convert, plan, advise,
evaluate, publish, inspect. Nothing heavy is imported before one of them is called."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from bitwright.calibration.choices import Device

if TYPE_CHECKING:
    from bitwright.converter.advice.recommendation import Recommendation
    from bitwright.converter.typed_options import Options


def convert(
    model: str | Path,
    profile: str | Path | None = None,
    output: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    fresh: bool = False,
    quiet: bool = False,
    **options: "Unpack[Options]",
) -> dict[str, Any]:
    """Convert a model; returns the report (see docs/report.md).

    model: Hub id, local directory or GGUF file. profile: a preset's name or the path of a TOML file; the default is
    "balanced-4bit", with a target "budget". overrides: "PATTERN=FORMAT" texts. options: the other fields of
    Job (imatrix, calibration, samples, target_bpw, ...), as converter.job.build.build_job takes them.
    Raises formats.errors.ConvertError and nothing else; calling again with the same arguments continues.
    """
    from bitwright.converter.boundary.errors import clear_errors
    from bitwright.converter.job.build import build_job
    from bitwright.converter.job.options import check_value
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.pipeline import run

    with clear_errors():
        check_value("fresh", fresh, bool, "--fresh")
        check_value("quiet", quiet, bool, "--quiet")
        job = build_job(model, profile, overrides, output=output, **options)
        progress = Progress(quiet)
        with progress.recorded(job.events, job.command):
            return run(job, progress, fresh=fresh)[1].to_dict()


def advise(model: str | Path, hardware: str = "this", **options: Any) -> "Recommendation":
    """Which artifact of a model for a machine: a frozen Recommendation (see docs/advise.md).

    model: as of `convert`. hardware: a name of the registry, or "this" for the machine at hand. options: the other
    fields of converter.advice.request.Request: context, batch, gpus, phase, memory ("24GiB"), runtime, attention, kv,
    profile, overrides, measured ("PROFILE=41.2"), target_speed, max_kld, sensitivity, work_dir, reports ("org/name").
    Reads headers and configuration only. Raises formats.errors.ConvertError and nothing else.
    """
    from bitwright.converter.advice.request import request_of
    from bitwright.converter.advice.stage import advise as advise_on
    from bitwright.converter.boundary.errors import clear_errors

    with clear_errors():
        return advise_on(request_of(model, hardware=hardware, **options))


def plan(
    model: str | Path,
    profile: str | Path | None = None,
    output: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    **options: "Unpack[Options]",
) -> dict[str, Any]:
    """What `convert` with the same arguments would write, to the byte, and about how long that takes, as
    `bitwright plan --json` prints it. Reads headers only. Raises formats.errors.ConvertError."""
    from bitwright.converter.boundary.errors import clear_errors
    from bitwright.converter.job.build import build_job
    from bitwright.converter.outlook import outlook

    with clear_errors():
        return outlook(build_job(model, profile, overrides, output=output, **options)).to_dict()


def evaluate(
    artifact: str | Path,
    against: str | Path,
    text: str | None = None,
    samples: int = 16,
    sequence_length: int = 512,
    threads: int = 0,
    device: Device = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """The quality of an artifact, a GGUF or a directory, beside its source, as `bitwright evaluate --json` prints it.

    text: the name of a corpus or a file; None for text that no calibration sees. threads: 0 for all cores.
    Raises formats.errors.ConvertError.
    """
    from bitwright.converter.boundary.errors import clear_errors
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.judge.open import evaluate_artifact

    with clear_errors():
        return evaluate_artifact(
            Path(artifact),
            str(against),
            Progress(quiet),
            text=text,
            samples=samples,
            sequence_length=sequence_length,
            threads=threads,
            device=device,
        )


def publish(
    artifact: str | Path,
    to: str,
    public: bool = False,
    base_model: str | None = None,
    name: str | None = None,
    replace: bool = False,
    work_dir: str | Path | None = None,
    dry_run: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Publish an artifact in a repository of the Hub, with its report, its recipe and a card; returns what the
    repository holds then, as `bitwright publish --json` prints it.

    to: org/name. public, base_model, name, replace: see converter.publishing.stage.Target. work_dir: where its report
    is; None for beside it. dry_run: change nothing. Raises formats.errors.ConvertError.
    """
    from bitwright.converter.boundary.errors import clear_errors
    from bitwright.converter.job.progress import Progress
    from bitwright.converter.publishing.stage import Target
    from bitwright.converter.publishing.stage import publish as publish_artifact

    with clear_errors():
        target = Target(to, public, base_model, name, replace)
        place = None if work_dir is None else Path(work_dir)
        return publish_artifact(Path(artifact), target, Progress(quiet), work_dir=place, dry_run=dry_run)


def inspect(file: str | Path) -> dict[str, Any]:
    """What is in an artifact, or in a file that was measured of a model, as `bitwright inspect --json` prints it.
    Raises formats.errors.ConvertError."""
    from bitwright.converter.boundary.errors import clear_errors
    from bitwright.converter.report.inspect import inspect_file

    with clear_errors():
        return inspect_file(Path(file))
