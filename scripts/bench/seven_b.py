"""Peak memory, and time per layer, of calibrating a llama of 7B shape by layer streaming.

    python -m scripts.bench.seven_b                       importance: forward
    python -m scripts.bench.seven_b --gradients           Fisher factors: there and back
    python -m scripts.bench.seven_b --device cuda --samples 512 --layers 4

The checkpoint is synthetic: bfloat16, in shards of 4 GB. It is made of holes, which take no disk and hold zeros, or
with --write of random weights, which are the same 64 MiB over and over: 13.8 GB for all layers. The tokens are random.
The run is a process of its own, whose peak resident memory is the operating system's figure; on a GPU torch's peak is
printed too. The time of a layer is that between two checkpoints; the first layer of a pass counts for nothing, because
its weights do not load beside another's work. From it follows the time of 32 layers over 512 samples of 512 tokens.
"""

import multiprocessing
import os
import resource
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.places import Place
from bitwright.calibration.sensitivity.fisher import stream_fisher
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.sizes import size_text
from scripts.bench.memory import write_checkpoint
from scripts.smollm2 import VOCABULARY

SHARD_BYTES = 4 << 30
ALL_LAYERS, ALL_SAMPLES, ALL_TOKENS = 32, 512, 512


class LayerClock:
    """should_stop that notes when it is asked, which is after every layer, and the peak of a GPU's memory until then:
    torch's own figure starts anew where micro-batches are fitted to what is free."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak_on_gpu = 0

    def __call__(self) -> bool:
        import torch

        self.times.append(time.monotonic())
        if torch.cuda.is_available():
            self.peak_on_gpu = max(self.peak_on_gpu, torch.cuda.max_memory_allocated())
        return False


def calibrate(
    model: Path, gradients: bool, samples: int, sequence_length: int, device: str, threads: int | None
) -> tuple[int, int, list[float]]:
    """Runs in a process of its own: (peak resident bytes, peak bytes on a GPU, times after every layer)."""
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (samples, sequence_length)).astype(np.int32)
    corpus = Corpus(tokens, "random", "0" * 64)
    checkpoint = open_checkpoint(str(model))
    names = {name: (Place(name, 0),) for name in checkpoint.tensors}
    stream, clock = stream_fisher if gradients else stream_importance, LayerClock()
    streamable = StreamableModel(checkpoint, model, device=device, threads=threads)
    with tempfile.TemporaryDirectory(dir=model) as work_dir:
        stream(streamable, names, corpus, PassControl(Path(work_dir), should_stop=clock))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, clock.peak_on_gpu, clock.times


def seconds_per_layer(times: list[float]) -> float:
    """Median over the layers of a pass but the first; inf for less than three of them."""
    return statistics.median(np.diff(times)[1:].tolist() or [np.inf])


@click.command(help=__doc__)
@click.option("--gradients", is_flag=True, help="There and back.")
@click.option("--layers", default=ALL_LAYERS, show_default=True, help="Fewer make a smaller model of the same shapes.")
@click.option("--write", is_flag=True, help="Random weights on the disk instead of holes.")
@click.option("--samples", default=4, show_default=True)
@click.option("--sequence-length", default=ALL_TOKENS, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="The default is torch's, one a core.")
@click.option("--directory", default=".cache/bench-7b", type=click.Path(path_type=Path), show_default=True)
def main(
    gradients: bool,
    layers: int,
    write: bool,
    samples: int,
    sequence_length: int,
    device: str,
    threads: int | None,
    directory: Path,
) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        write_checkpoint(directory, layers, not write, SHARD_BYTES)
        n_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            run = other.submit(calibrate, directory, gradients, samples, sequence_length, device, threads)
            peak, on_gpu, times = run.result()
    finally:
        shutil.rmtree(directory)
    print(f"checkpoint {size_text(n_bytes)}, {layers} layers, {samples} samples of {sequence_length} tokens")
    print(f"peak resident memory {size_text(peak)}, {peak / n_bytes:.2f} of the checkpoint, {os.cpu_count()} cores")
    if on_gpu:
        print(f"peak memory on the GPU {size_text(on_gpu)}")
    scale = ALL_LAYERS * ALL_SAMPLES * ALL_TOKENS / (samples * sequence_length)
    passes = {"forward": times[:layers], "backward": times[layers:]} if gradients else {"forward": times}
    for name, of_pass in passes.items():
        seconds = seconds_per_layer(of_pass)
        print(
            f"{name}: {seconds:.2f} s a layer, {samples * sequence_length / seconds:.0f} tokens/s through one;"
            f" all {ALL_LAYERS} layers over {ALL_SAMPLES} samples {scale * seconds / 60:.1f} min"
        )


if __name__ == "__main__":
    main()
