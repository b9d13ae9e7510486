"""From what a caller asks for, on the command line or in Python, to a Job: one way for both."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from converter import default_profile
from converter.job import Job, check_option
from formats.errors import ConvertError, nearest
from profiles.budget import parse_size
from profiles.rules import parse_override
from profiles.schema import load_profile

_PATHS = ("output", "work_dir", "imatrix", "sensitivity")
_SIZES = {"target_size": "--target-size", "shard_bytes": "--split-size"}


def build_job(
    model: str | Path, profile: str | Path | None = None, overrides: str | Sequence[str] = (), **options: Any
) -> Job:
    """The Job of these options, which are its fields.

    profile: a preset's name or the path of a TOML file; None for the default. overrides: "PATTERN=FORMAT" each. Paths
    may be texts, sizes texts such as "1.2GiB", and lm_eval a text with commas.
    Raises ConvertError for an unknown option, with the nearest known one, and for a value that none can have.
    """
    known = [field.name for field in fields(Job)]
    for name in options:
        if name not in known:
            raise ConvertError(f"there is no option {name!r}", f"{name}={options[name]!r}"[:80], nearest(name, known))
    for name, value in (("model", model), ("profile", profile)):
        check_option(name, value, str | Path | None if name == "profile" else str | Path)
    overrides = (overrides,) if isinstance(overrides, str) else overrides
    check_option("overrides", overrides, list[str] | tuple[str, ...])
    for name in _PATHS:
        if isinstance(options.get(name), str):
            options[name] = Path(options[name])
    for name, option in _SIZES.items():
        if isinstance(options.get(name), str):
            options[name] = parse_size(options[name], option)
    tasks = options.pop("lm_eval", None)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()] if isinstance(tasks, str) else tasks
        check_option("lm_eval", names, list[str] | tuple[str, ...])
        options["lm_eval"] = tuple(names)
    loaded = load_profile(str(profile or default_profile(options)))
    return Job(
        model=str(model),
        profile=loaded,
        overrides=tuple(parse_override(text, loaded.target) for text in overrides),
        **options,
    )
