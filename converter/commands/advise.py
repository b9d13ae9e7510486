"""`bitwright advise MODEL`: which artifact for this machine, how fast, how good, and why."""

import gc
import json
from pathlib import Path
from typing import Any

import click

from bitwright.converter.commands.outcome import fails_clearly
from bitwright.converter.commands.parameters import PATH, json_option


@click.command(short_help="Say which artifact fits a machine, how fast and how good.")
@click.argument("model")
@click.option("--hardware", default="this", show_default=True, metavar="NAME|this", help="The machine it will run on.")
@click.option("--context", type=click.IntRange(1), help="Tokens in each text. [default: 32768, or the model's]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Texts that are written at once.")
@click.option(
    "--gpus", type=click.IntRange(1), default=1, show_default=True, help="GPUs of this kind that share the model."
)
@click.option(
    "--phase",
    type=click.Choice(["decode", "prefill", "both"]),
    default="both",
    show_default=True,
    help="Count prompts, generated tokens, or both.",
)
@click.option(
    "--memory", metavar="SIZE", help="Room for model and cache on a device, such as 24GiB. [default: the device's]"
)
@click.option(
    "--runtime",
    type=click.Choice(["llama.cpp", "vllm", "any"]),
    default="any",
    show_default=True,
    help="The runtime that will load it.",
)
@click.option(
    "--attention",
    type=click.Choice(["auto", "fa1", "fa2", "fa3", "fa4"]),
    default="auto",
    show_default=True,
    help="The version of FlashAttention to assume.",
)
@click.option(
    "--kv", default="auto", show_default=True, metavar="FORMAT", help="Format of keys and values, such as Q8_0."
)
@click.option("--profile", metavar="NAME|FILE", help="Consider this profile and no other.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="PATTERN=FORMAT",
    help="Override formats of that profile by role or name.",
)
@click.option(
    "--measured", multiple=True, metavar="PROFILE=SPEED", help="A speed measured on that machine; narrows the ranges."
)
@click.option("--target-tokens-per-second", "target_speed", type=float, help="The lowest speed that is acceptable.")
@click.option("--max-kld", type=float, metavar="NATS", help="The largest divergence that is acceptable.")
@click.option("--sensitivity", type=PATH, help="A sensitivity table to predict divergences from.")
@click.option("--work-dir", type=PATH, help="Where a report of this model is. [default: beside it, and here]")
@click.option("--reports", metavar="ORG/NAME", help="A repository of the Hub with reports of this model.")
@click.option("--from-quantized", is_flag=True, help="Accept a GGUF that is quantized already.")
@click.option("--base", metavar="MODEL", help="The model that a LoRA adapter belongs to.")
@click.option("--threads", type=int, default=0, help="Threads that measure this machine. [default: all cores]")
@click.option("--plot", type=PATH, metavar="FILE.html", help="Write a page with pictures, too.")
@json_option
@fails_clearly
def advise(model: str, as_json: bool, plot: Path | None, **options: Any) -> None:
    """Recommend an artifact of MODEL for a machine: what fits, how fast, how good, and why. Reads headers only."""
    from bitwright.converter.advice.request import request_of
    from bitwright.converter.advice.stage import advise as advise_on
    from bitwright.converter.advice.text import advice_text

    # A vocabulary is hundreds of thousands of objects that stay; looking for circles among them after every 700 new
    # ones takes a sixth of the time.
    gc.set_threshold(100_000, 20, 100)
    request = request_of(model, **options)
    advice = advise_on(request)
    click.echo(json.dumps(advice.to_dict()) if as_json else advice_text(advice))
    if plot is not None:
        from bitwright.converter.advice.page import write_page

        write_page(plot, request, advice)
        click.echo(f"wrote {plot}", err=True)
