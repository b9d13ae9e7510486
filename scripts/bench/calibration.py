"""Calibration tokens/s beside plain transformers on the same model, tokens and cores.

    python -m scripts.bench.calibration --model DIRECTORY [--gradients] [--dtype bfloat16]

    ours           layer streaming: weights from disk, importance of every matrix, a checkpoint a layer
    plain          transformers, the whole model in memory, no output head, no hooks, one sample a call

with --gradients:

    ours           streamed there and back: every layer's input on disk, recomputed, squared gradients of every matrix
    plain          transformers, the whole model, its activations and its gradients in memory: loss and
                   backward, one sample a call; nothing is squared
    checkpointed   the same with transformers' gradient checkpointing, which recomputes every layer as ours does

All compute in the same dtype. They take turns; the median of each counts, and the median of the ratios of neighbours.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import click
import numpy as np

from bitwright.calibration.choices import Dtype
from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.sensitivity.fisher import stream_fisher
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus, load_corpus
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ours(stream: Callable[..., object], checkpoint: Checkpoint, corpus: Corpus, threads: int, dtype: Dtype) -> None:
    """Everything included but the import of torch."""
    names = {name: (name, 0) for name in checkpoint.tensors}
    with tempfile.TemporaryDirectory() as work_dir:
        model = StreamableModel(checkpoint, checkpoint.location, device="cpu", dtype=dtype, threads=threads)
        stream(model, names, corpus, PassControl(Path(work_dir)))


def plain(model, tokens: np.ndarray) -> None:
    """The forward passes alone."""
    import torch

    with torch.inference_mode():
        for sample in torch.from_numpy(tokens.astype(np.int64)):
            model.base_model(sample[None], use_cache=False)


def plain_gradients(model, checkpointed: bool, tokens: np.ndarray) -> None:
    """Forward and backward, each sample's gradients anew."""
    import torch

    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # without it nothing is checkpointed; these models have no dropout
    for sample in torch.from_numpy(tokens.astype(np.int64)):
        model.zero_grad(set_to_none=True)
        model(sample[None], labels=sample[None], use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    if checkpointed:
        model.gradient_checkpointing_disable()


@click.command(help=__doc__)
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--gradients", is_flag=True, help="Forward and backward.")
@click.option("--samples", default=32, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--threads", type=int, help="Of all; the default is torch's, one a core.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--rounds", default=3, show_default=True)
def main(
    model: Path,
    gradients: bool,
    samples: int,
    sequence_length: int,
    threads: int | None,
    dtype: Literal["float32", "bfloat16"],
    rounds: int,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads or torch.get_num_threads())
    checkpoint = open_checkpoint(str(model))
    corpus = load_corpus("embedded", load_tokenizer(model), samples, sequence_length)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()
    stream = stream_fisher if gradients else stream_importance
    contestants: dict[str, Callable[[], object]] = {
        "ours": partial(ours, stream, checkpoint, corpus, threads=torch.get_num_threads(), dtype=dtype)
    }
    if gradients:
        contestants["plain"] = partial(plain_gradients, whole, False, corpus.tokens)
        contestants["checkpointed"] = partial(plain_gradients, whole, True, corpus.tokens)
    else:
        contestants["plain"] = partial(plain, whole, corpus.tokens)
    plain(whole, corpus.tokens[:1])
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    print(f"{corpus.tokens.size} tokens, samples of {sequence_length}, {torch.get_num_threads()} threads, {dtype}")
    for _ in range(rounds):
        for name, run in contestants.items():
            rates[name].append(corpus.tokens.size / seconds(run))
        print("   ".join(f"{name} {measured[-1]:.0f} tokens/s" for name, measured in rates.items()), flush=True)
    medians = "   ".join(f"{name} {statistics.median(measured):.0f} tokens/s" for name, measured in rates.items())
    ratios = "   ".join(
        f"ours / {name} {statistics.median(a / b for a, b in zip(rates['ours'], measured, strict=True)):.2f}"
        for name, measured in rates.items()
        if name != "ours"
    )
    print(f"{ratios}   medians: {medians}")


if __name__ == "__main__":
    main()
