"""The pipeline from a checkpoint to an artifact. `convert` is the command line's main command for Python."""

from pathlib import Path
from typing import Any

DEFAULT_PROFILE = "balanced-4bit"


def convert(
    model: str,
    profile: str = DEFAULT_PROFILE,
    output: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Convert a model; returns the report (see docs/report.md).

    model: Hub id, local directory or GGUF file. profile: a preset's name or the path of a TOML file. overrides:
    "PATTERN=FORMAT" texts. options: the other fields of converter.job.Job (imatrix, calibration, samples, ...).
    Raises formats.errors.ConvertError; calling again with the same arguments continues.
    """
    from converter.job import Job
    from converter.pipeline import run
    from converter.progress import Progress
    from profiles.rules import parse_override
    from profiles.schema import load_profile

    for key in ("imatrix", "work_dir"):
        if options.get(key) is not None:
            options[key] = Path(options[key])
    job = Job(
        model=str(model),
        profile=load_profile(profile),
        overrides=tuple(parse_override(text) for text in overrides),
        output=Path(output) if output is not None else None,
        **options,
    )
    _, report = run(job, Progress(quiet), fresh=fresh)
    return report
