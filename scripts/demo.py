"""Convert a real model with one command, run it in llama.cpp, print what it cost, and say where the report's page is.

    python -m scripts.demo [DIRECTORY]

The model is SmolLM2-135M-Instruct, rebuilt as a Hugging Face directory whose weights lie on no format's grid (see
scripts/smollm2.py). Nothing is downloaded. It takes about three minutes on two cores.
"""

from pathlib import Path

import click

from bitwright.converter.cli import main as convert
from bitwright.converter.judge.llama_cpp import LlamaCpp
from scripts.smollm2 import build

PROMPT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\n"
N_TOKENS = 40


def generate(artifact: Path) -> str:
    """The artifact's answer to the prompt, from llama.cpp."""
    with LlamaCpp(artifact) as model:
        return model.detokenize(model.generate(model.tokenize(PROMPT), N_TOKENS))


@click.command(help=__doc__)
@click.argument("directory", default="demo", type=click.Path(path_type=Path))
def main(directory: Path) -> None:
    model = build(directory / "SmolLM2-135M-Instruct", off_grid=True)
    arguments = ["--samples", "128", "--sequence-length", "192", "--judge", "fast"]
    arguments += ["--output", str(directory), str(model)]
    click.echo("about three minutes on two cores")
    click.echo(f"$ bitwright {' '.join(arguments)}")
    convert(arguments, standalone_mode=False)
    (artifact,) = directory.glob("*.gguf")
    click.echo(f"\nllama.cpp, {N_TOKENS} tokens of {artifact.name}:\n{PROMPT}{generate(artifact)}")
    (page,) = directory.glob("*.bitwright/report.html")
    click.echo(f"\nall of it as a page: {page.absolute().as_uri()}")


if __name__ == "__main__":
    main()
