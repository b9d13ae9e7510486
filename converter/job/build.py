"""From what a caller asks for, on the command line or in Python, to a Job: one way for both."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bitwright.converter.job.defaults import default_profile
from bitwright.converter.job.job import Job
from bitwright.converter.job.options import check_value, flag, given_value
from bitwright.formats.errors import ConvertError, nearest
from bitwright.profiles.reading.rules import parse_override
from bitwright.profiles.reading.schema import load_profile


def build_job(
    model: str | Path, profile: str | Path | None = None, overrides: str | Sequence[str] = (), **options: Any
) -> Job:
    """The Job of these options, which are its fields.

    profile: a preset's name or the path of a TOML file; None for the default. overrides: "PATTERN=FORMAT" each. Paths
    may be texts, sizes texts such as "1.2GiB", alpha "0.5" or "auto", and lm_eval a text with commas.
    Raises ConvertError for an unknown option, with the nearest known one, and for a value that none can have.
    """
    known = {field.name: field for field in fields(Job)}
    for name, value in options.items():
        if name not in known:
            raise ConvertError(f"there is no option {name!r}", f"{name}={value!r}"[:80], nearest(name, list(known)))
    overrides = (overrides,) if isinstance(overrides, str) else overrides
    for name, value, declared in (
        ("model", model, str | Path),
        ("profile", profile, str | Path | None),
        ("overrides", overrides, list[str] | tuple[str, ...]),
    ):
        check_value(name, value, declared, flag(known[name]))
    values = {name: given_value(known[name], value) for name, value in options.items()}
    loaded = load_profile(str(profile or default_profile(options)))
    return Job(
        model=str(model),
        profile=loaded,
        overrides=tuple(parse_override(text, loaded.target) for text in overrides),
        **values,
    )
