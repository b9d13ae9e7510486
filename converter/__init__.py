"""The pipeline from a checkpoint to an artifact. `convert` is the command line's main command for Python."""

from pathlib import Path
from typing import Any

DEFAULT_PROFILE = "balanced-4bit"
BUDGET_PROFILE = "budget"
"""The profile of a conversion that is asked for a size or a divergence, where none is named."""


def default_profile(options: dict[str, Any]) -> str:
    """The profile of a conversion with these options, where none is named."""
    targets = (options.get(key) for key in ("target_size", "target_bpw", "target_kld"))
    return DEFAULT_PROFILE if all(target is None for target in targets) else BUDGET_PROFILE


def convert(
    model: str,
    profile: str | None = None,
    output: str | Path | None = None,
    overrides: tuple[str, ...] = (),
    fresh: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Convert a model; returns the report (see docs/report.md).

    model: Hub id, local directory or GGUF file. profile: a preset's name or the path of a TOML file; the default is
    "balanced-4bit", with a target "budget". overrides: "PATTERN=FORMAT" texts. options: the other fields of
    converter.job.Job (imatrix, calibration, samples, target_bpw, ...); target_size in bytes or as "1.2GiB".
    Raises formats.errors.ConvertError; calling again with the same arguments continues.
    """
    from converter.job import Job
    from converter.pipeline import run
    from converter.progress import Progress
    from profiles.budget import parse_size
    from profiles.rules import parse_override
    from profiles.schema import load_profile

    for key in ("imatrix", "work_dir", "sensitivity"):
        if options.get(key) is not None:
            options[key] = Path(options[key])
    if options.get("target_size") is not None:
        options["target_size"] = parse_size(str(options["target_size"]), "target_size")
    loaded = load_profile(profile or default_profile(options))
    job = Job(
        model=str(model),
        profile=loaded,
        overrides=tuple(parse_override(text, loaded.target) for text in overrides),
        output=Path(output) if output is not None else None,
        **options,
    )
    _, report = run(job, Progress(quiet), fresh=fresh)
    return report
