"""The pipeline from a checkpoint to an artifact. `convert` is the command line's main command for Python."""

from collections.abc import Sequence
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
    model: str | Path,
    profile: str | Path | None = None,
    output: str | Path | None = None,
    overrides: str | Sequence[str] = (),
    fresh: bool = False,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Convert a model; returns the report (see docs/report.md).

    model: Hub id, local directory or GGUF file. profile: a preset's name or the path of a TOML file; the default is
    "balanced-4bit", with a target "budget". overrides: "PATTERN=FORMAT" texts. options: the other fields of
    converter.job.Job (imatrix, calibration, samples, target_bpw, ...), as converter.options.build_job takes them.
    Raises formats.errors.ConvertError and nothing else; calling again with the same arguments continues.
    """
    from converter.boundary import clear_errors
    from converter.job import check_option
    from converter.options import build_job
    from converter.pipeline import run
    from converter.progress import Progress

    with clear_errors():
        check_option("fresh", fresh, bool)
        check_option("quiet", quiet, bool)
        job = build_job(model, profile, overrides, output=output, **options)
        return run(job, Progress(quiet), fresh=fresh)[1]
