"""Calibration tokens/s beside plain transformers on the same model, tokens and cores.

    python scripts/bench_calibration.py --model DIRECTORY

    ours    calibration by layer streaming: weights from disk, importance of every matrix, a checkpoint a layer
    plain   transformers in float32, the whole model in memory, no output head, no hooks, one sample a call

The two take turns; the median of each counts, and the median of the ratios of neighbours.
"""

import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from calibration.corpus import Corpus, load_corpus
from calibration.importance import compute_importance
from converter.calibrate import load_tokenizer
from converter.checkpoint import Checkpoint
from converter.source import open_checkpoint


def ours(checkpoint: Checkpoint, corpus: Corpus, threads: int) -> float:
    """Seconds, everything included but the import of torch."""
    names = {name: (name, 0) for name in checkpoint.tensors}
    with tempfile.TemporaryDirectory() as work_dir:
        start = time.perf_counter()
        compute_importance(
            checkpoint, checkpoint.location, names, corpus, work_dir=Path(work_dir), device="cpu", threads=threads
        )
        return time.perf_counter() - start


def plain(model, tokens: np.ndarray) -> float:
    """Seconds of the forward passes alone."""
    import torch

    start = time.perf_counter()
    with torch.inference_mode():
        for sample in torch.from_numpy(tokens.astype(np.int64)):
            model.base_model(sample[None], use_cache=False)
    return time.perf_counter() - start


@click.command(help=__doc__)
@click.option("--model", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--samples", default=32, show_default=True)
@click.option("--sequence-length", default=512, show_default=True)
@click.option("--threads", type=int, help="Of both; the default is torch's, one a core.")
@click.option("--rounds", default=3, show_default=True)
def main(model: Path, samples: int, sequence_length: int, threads: int | None, rounds: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads or torch.get_num_threads())
    checkpoint = open_checkpoint(str(model))
    corpus = load_corpus("embedded", load_tokenizer(model), samples, sequence_length)
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").eval()
    plain(whole, corpus.tokens[:1])
    rates: dict[str, list[float]] = {"ours": [], "plain": []}
    print(f"{corpus.tokens.size} tokens, samples of {sequence_length}, {torch.get_num_threads()} threads")
    for _ in range(rounds):
        rates["ours"].append(corpus.tokens.size / ours(checkpoint, corpus, torch.get_num_threads()))
        rates["plain"].append(corpus.tokens.size / plain(whole, corpus.tokens))
        print("   ".join(f"{name} {measured[-1]:.0f} tokens/s" for name, measured in rates.items()), flush=True)
    ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["plain"], strict=True))
    medians = "   ".join(f"{name} {statistics.median(measured):.0f} tokens/s" for name, measured in rates.items())
    print(f"ours / plain {ratio:.2f}   medians: {medians}")


if __name__ == "__main__":
    main()
