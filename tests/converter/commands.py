"""Commands as a user types them, and what they leave."""

from pathlib import Path

from click.testing import CliRunner, Result

from bitwright.converter.cli import main
from bitwright.formats.errors import TryAgain

PLAIN = ["--profile", "uniform-8bit", "--judge", "off"]
TEXT = ["--calibration", "embedded", "--samples", "128", "--sequence-length", "16"]


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> None:
    result = convert(*arguments)
    assert result.exit_code == 0, result.stderr


def refused(*arguments: object) -> str:
    """The message of a command that has to fail, in its three lines."""
    result = convert(*arguments)
    assert result.exit_code in (1, TryAgain.exit_code) and result.stderr.count("\n") >= 3, result.output
    assert "\n  where: " in result.stderr and "\n  remedy: " in result.stderr and "Traceback" not in result.stderr
    return result.stderr


def snapshot(*roots: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()}
