"""`bitwright imatrix`: the importance matrix alone, and what else is measured of a model."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bitwright.converter.commands.outcome import fails_clearly, this_command
from bitwright.converter.commands.parameters import (
    PATH,
    GroupedCommand,
    option,
    options_of,
    part_option,
    quiet_option,
    scratch_option,
)
from bitwright.converter.job.options import CALIBRATION, OUTPUT
from bitwright.formats.errors import ConvertError

if TYPE_CHECKING:
    from bitwright.calibration.control import ShouldStop
    from bitwright.converter.job.progress import Progress

# What a part measures beside the importance, and one machine, too, by the name of its option.
_TAKEN_BY_PARTS = ("sensitivity", "activations", "super_weights")


@click.command(cls=GroupedCommand, short_help="Compute the importance matrix, and what else is measured.")
@click.argument("sources", nargs=-1, required=True, metavar="MODEL | PARTS...")
@option(
    "-o",
    "--output",
    group=OUTPUT,
    type=PATH,
    help="The file to write, .gguf or .dat; with --activations .safetensors. [default: MODEL.imatrix.gguf]",
)
@options_of("imatrix")
@option(
    "--super-weights",
    group=CALIBRATION,
    is_flag=True,
    help="Also find super weights, and store them in the file; with --part try a share of the candidates.",
)
@option(
    "--sensitivity",
    group=CALIBRATION,
    is_flag=True,
    help="Also measure what every format costs every tensor, in a file beside it.",
)
@option(
    "--activations",
    group=CALIBRATION,
    is_flag=True,
    help="Write statistics of activations instead of importance; with --part beside it.",
)
@option(
    "--moments",
    group=CALIBRATION,
    is_flag=True,
    help="With --part: also collect the second moments of the inputs, for error feedback.",
)
@part_option
@scratch_option
@option("--merge", group=OUTPUT, is_flag=True, help="Add up PARTS, the files of `bitwright imatrix --part`.")
@option("--model", group=OUTPUT, metavar="MODEL", help="With --merge --sensitivity: where the model is here.")
@option(
    "--fresh",
    group=OUTPUT,
    is_flag=True,
    help="Start over in a work directory that holds another computation, and replace its output.",
)
@quiet_option
@fails_clearly
def imatrix(sources: tuple[str, ...], output: Path | None, quiet: bool, events: Path | None, **options: Any) -> None:
    """Compute the importance matrix of MODEL, or convert one between GGUF and .dat; or a part of it on one of many
    machines (--part), or the whole of PARTS (--merge)."""
    from bitwright.converter.boundary.interrupts import Stop
    from bitwright.converter.job.progress import Progress

    progress = Progress(quiet)
    with progress.recorded(events, this_command()), Stop().on_interrupt() as should_stop:
        written = _written(sources, output, progress, should_stop, **options)
    click.echo("\n".join(map(str, written)))


def _written(
    sources: tuple[str, ...],
    output: Path | None,
    progress: "Progress",
    should_stop: "ShouldStop",
    *,
    part: str | None,
    scratch: Path | None,
    merge: bool,
    model: str | None,
    **options: Any,
) -> list[Path]:
    """What the command does: the whole, a part, or the parts merged."""
    command = this_command()
    if merge:
        from bitwright.converter.machines.measuring.importance import merge_parts

        if (
            output is None
            or part is not None
            or any(options[name] for name in ("super_weights", "activations", "moments"))
        ):
            raise ConvertError(
                "parts are merged into an importance matrix, and what else they have measured is written beside it",
                "--merge",
                "name it with --output FILE.gguf, and add no --part, --super-weights, --activations or --moments",
            )
        kept = {name: options[name] for name in ("sensitivity", "fresh", "threads")}
        paths = [Path(source) for source in sources]
        return merge_parts(paths, output, progress, should_stop, model=model, command=command, **kept)
    if len(sources) > 1 or model is not None:
        raise ConvertError("one model at a time is measured", " ".join(sources), "merge files of parts with --merge")
    moments = options.pop("moments")
    if part is None:
        from bitwright.converter.imatrix import write_importance

        if moments:
            raise ConvertError(
                "second moments serve a conversion whose calibration is shared, and others collect them themselves",
                "--moments",
                "leave it out, or add --part I/N, be it 1/1",
            )
        if scratch is not None:
            raise ConvertError(
                "--scratch is where a part is worked on", "--scratch", "use --work-dir, or add --part I/N"
            )
        return write_importance(sources[0], output, progress, should_stop, command=command, **options)
    from bitwright.converter.machines.measuring.importance import Measured, write_part
    from bitwright.converter.machines.part import part_of

    if options.pop("fresh"):
        raise ConvertError(
            "a part has nothing to start over", "--fresh with --part", "remove a part's file to compute it again"
        )
    options.pop("work_dir")
    measured = Measured(moments=moments, **{name: options.pop(name) for name in _TAKEN_BY_PARTS})
    return [
        write_part(
            part_of(part),
            output,
            progress,
            should_stop,
            words=shlex.split(command),
            measured=measured,
            scratch=scratch,
            model=sources[0],
            command=command,
            **options,
        )
    ]
