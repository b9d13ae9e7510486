"""Values of options as people write them, as the command line takes them again, and as jobs are compared by them."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.formats.files.disk import file_sha256

if TYPE_CHECKING:
    from bitwright.calibration.choices import Alpha
    from bitwright.profiles.reading.rules import LayerQuantizationConfig
    from bitwright.profiles.reading.schema import QuantizationProfile

STATISTICS_RECORD = "statistics.json"
"""What says of a directory of statistics what is in it, see converter.measure.statistics_directory."""

MOMENTS_OF_STATISTICS = "moments"
"""The directory in it that has second moments, where these are among them."""

# What a text says, as profiles.sizes.parse_size reads sizes. flag: the option, for errors.


def names_in(text: str, flag: str) -> tuple[str, ...]:
    """Names with commas between them."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def alpha_of(text: str, flag: str) -> "Alpha":
    from bitwright.calibration.statistics.smoothing import parse_alpha

    return parse_alpha(text)


# What a value is compared by when a job is continued.


def itself(value: Any) -> object:
    return value


def path_itself(path: Path | None) -> str | None:
    """Wherever the command is typed."""
    return str(path.absolute()) if path else None


def content(path: Path | None) -> str | None:
    """Of a file that is read."""
    return file_sha256(path) if path else None


def statistics_content(directory: Path | None) -> str | None:
    """By the record of the statistics in it, which has the hashes of all files."""
    return content(directory / STATISTICS_RECORD) if directory else None


def profile_content(profile: "QuantizationProfile") -> str:
    """With the profiles that it extends."""
    return hashlib.sha256("".join((*profile.inherited, profile.text)).encode()).hexdigest()


def rule_texts(rules: "tuple[LayerQuantizationConfig, ...]") -> list[str]:
    return [rule.text for rule in rules]


# How the command that makes the same bytes again says a value. Files go by their names, wherever they lie.


def spelt(value: Any) -> str:
    return value.name if isinstance(value, Path) else str(value)


def profile_spelt(profile: "QuantizationProfile") -> str:
    """A preset's name, or that of the file."""
    from bitwright.profiles.reading.schema import has_name

    return profile.name if has_name(profile) else profile_file(profile.name)


def profile_file(name: str) -> str:
    return f"{name}.toml"


def rule_spelt(rule: "LayerQuantizationConfig") -> str:
    return f"{(rule.roles or rule.tensors)[0]}={rule.format}"


def text_spelt(calibration: str) -> str:
    """A file's name, or the name of a corpus."""
    path = Path(calibration).expanduser()
    return path.name if path.is_file() else calibration
