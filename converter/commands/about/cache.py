"""`bitwright cache`: what is kept of sources for their next conversions."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import job_option, json_option

if TYPE_CHECKING:
    from bitwright.formats.files.result_cache import ResultCache


@click.group(short_help="List or clear what is kept of sources.")
def cache() -> None:
    """List what is kept of sources for their next conversions, or remove it."""


@cache.command("list")
@job_option("cache")
@json_option
@fails_clearly
def list_cache(cache: Path | None, as_json: bool) -> None:
    """Every entry, the one that was used last first."""
    from bitwright.profiles.sizes import size_text

    opened = _opened(cache)
    entries = opened.entries()
    if as_json:
        rows = [
            {"result": e.key.get("result"), "model": e.key.get("model"), "revision": e.key.get("revision")}
            | {"bytes": e.n_bytes, "used": e.used, "path": str(e.path)}
            for e in entries
        ]
        click.echo(json.dumps(rows))
        return
    for e in entries:
        day = time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used))
        click.echo(f"{e.key.get('result', e.kind):<15}  {size_text(e.n_bytes):>10}  {day}  {e.key.get('model')}")
    total = size_text(sum(e.n_bytes for e in entries))
    click.echo(f"{len(entries)} entries, {total} of {size_text(opened.most_bytes)}, in {opened.directory}")


@cache.command("clear")
@job_option("cache")
@fails_clearly
def clear(cache: Path | None) -> None:
    """Remove every entry, and what is known of this machine's speed."""
    from bitwright.converter.job.cache import clear_cache
    from bitwright.profiles.sizes import size_text

    opened = _opened(cache)
    click.echo(f"removed {size_text(clear_cache(opened))} from {opened.directory}")


def _opened(directory: Path | None) -> "ResultCache":
    """Raises ConvertError where the cache is switched off."""
    from bitwright.converter.job.cache import open_cache
    from bitwright.formats.errors import ConvertError

    opened = open_cache(directory)
    if opened is None:
        raise ConvertError("the cache is switched off", "--cache, BITWRIGHT_CACHE", "name its directory: --cache DIR")
    return opened
