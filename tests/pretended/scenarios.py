"""What is done on the pretended device, in a process of its own; results are plain, for the process that asks."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from bitwright import converter
from bitwright.calibration.control import Interrupted, PassControl
from bitwright.calibration.evaluation.generation import generate_greedily, stream_readings
from bitwright.calibration.evaluation.quality import stream_quality
from bitwright.calibration.passes.activation_pass import stream_activations
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.places import MatrixNames
from bitwright.calibration.sensitivity.fisher import stream_fisher
from bitwright.calibration.statistics.smoothing import Products, choose_alpha
from bitwright.calibration.stream import micro_batches
from bitwright.calibration.stream.checkpointing import STATE_NAME
from bitwright.calibration.stream.device import int8_products
from bitwright.calibration.stream.forward import stream_past
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.super_weights.spikes import Peaks
from bitwright.calibration.text.corpus import Corpus
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.products import SchemeProducts
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.kernels import int8_matmul
from tests import tiny_models
from tests.calibration.stream.streaming import DictSource, stacked_names
from tests.pretended.device import Counts, pretended
from tests.tiny_architectures import ALL_TINY_MODELS

LENGTH = 16
Figures = dict[str, np.ndarray]


class KeptRows:
    def __init__(self) -> None:
        self.shapes: Figures = {}

    def write(self, tensor: str, rows: dict[int, np.ndarray]) -> None:
        self.shapes[f"rows {tensor}"] = np.array([of.shape for of in rows.values()])


def _importance(model: StreamableModel, names: MatrixNames, corpus: Corpus, work: Path) -> Figures:
    matrix = stream_importance(model, names, corpus, PassControl(work / "pass"), work / "moments")
    figures = dict(matrix.sums)
    for path in (work / "moments").glob("*.npz"):
        with np.load(path) as stored:
            figures |= {f"{key} {path.stem}": stored[key] for key in ("upper", "held_out")}
    return figures


def _activations(model: StreamableModel, names: MatrixNames, corpus: Corpus, work: Path) -> Figures:
    rows: Any = KeptRows()
    seen = stream_activations(model, names, corpus, PassControl(work), rows=rows)
    inputs = {f"{key} {name}": getattr(of, key) for name, of in seen.inputs.items() for key in asdict(of)}
    caches = {f"{key} {layer}": getattr(of, key) for layer, of in seen.caches.items() for key in ("keys", "values")}
    return inputs | caches | rows.shapes


def _gradients(model: StreamableModel, names: MatrixNames, corpus: Corpus, work: Path) -> Figures:
    factors = stream_fisher(model, names, corpus, PassControl(work))
    return {f"{side} {name}": of for side in ("rows", "columns") for name, of in getattr(factors, side).items()}


def _peaks(model: StreamableModel, names: MatrixNames, corpus: Corpus, work: Path) -> Figures:
    peaks = Peaks()
    stream_past(peaks, model, corpus.tokens, PassControl(work))
    return {f"rows {k}": v for k, v in peaks.rows.items()} | {f"columns {k}": v for k, v in peaks.columns.items()}


def _quality(model: StreamableModel, names: MatrixNames, corpus: Corpus, work: Path) -> Figures:
    source: Any = model.weights
    changed = DictSource({name: np.round(of, 2) for name, of in source.tensors.items()})
    report = stream_quality(model, changed, corpus, PassControl(work))
    return {"mean_kld": np.array(report.mean_kld), "perplexity": np.array(report.perplexity)}


def _continued(model: StreamableModel, names: MatrixNames, corpus: Corpus, work: Path) -> Figures:
    prompts = [sample[: 5 + i].tolist() for i, sample in enumerate(corpus.tokens)]
    made = [
        generate_greedily(model, prompts, 4, frozenset(), PassControl(work / str(resident)), resident=resident)
        for resident in (True, False)
    ]
    texts = [(prompt, of.tokens) for prompt, of in zip(prompts, made[0], strict=True)]
    read = stream_readings(model, texts, PassControl(work / "read"))
    figures = {f"surprises {i}": np.array(of.surprises) for i, of in enumerate(read)}
    return figures | {f"tokens {i}": np.array([of[i].tokens for of in made]) for i in range(len(prompts))}


PASSES: dict[str, Callable[[StreamableModel, MatrixNames, Corpus, Path], Figures]] = {
    "importance": _importance,
    "activations": _activations,
    "gradients": _gradients,
    "peaks": _peaks,
    "quality": _quality,
    "generation": _continued,
}


@contextmanager
def one_sample_at_once(kind: str) -> Iterator[None]:
    """Micro-batches of one sample on this device, and on a CPU."""
    with mock.patch.dict(micro_batches._TOKENS, {"cpu": LENGTH, kind: LENGTH}):
        yield


def _run(of: str, name: str, kind: str, n_samples: int) -> Figures:
    directory = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    source = DictSource.of(directory)
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB_SIZE, (n_samples, LENGTH)).astype(np.int32)
    model = StreamableModel(source, directory, device=kind, dtype="float32", threads=1)
    with tempfile.TemporaryDirectory() as work:
        return PASSES[of](model, stacked_names(source.tensors), Corpus(tokens, "random", "0" * 64), Path(work))


def observed(
    of: str, name: str, runs: list[tuple[str, int]]
) -> tuple[dict[tuple[str, int], tuple[Counts, Figures]], Figures]:
    """The pass on the device of each kind over so many samples, one at once; and what a CPU gives of as many as the
    last run has."""
    seen = {}
    for kind, n_samples in runs:
        with one_sample_at_once(kind), pretended(kind) as counts:
            figures = _run(of, name, kind, n_samples)
        seen[kind, n_samples] = counts, figures
    with one_sample_at_once("cpu"):
        return seen, _run(of, name, "cpu", runs[-1][1])


def on_several(of: str, name: str, numbers: list[int], n_samples: int) -> list[tuple[Counts, Figures]]:
    """The pass over so many samples, one at once, on each of these numbers of GPUs."""
    seen = []
    for number in numbers:
        with one_sample_at_once("cuda"), pretended("cuda", number=number) as counts:
            figures = _run(of, name, "cuda", n_samples)
        seen.append((counts, figures))
    return seen


def continued_on(numbers: list[int], **limits: int) -> Figures:
    """The peaks of a model that runs on another number of GPUs after every layer."""
    directory = tiny_models.checkpoint("llama", ALL_TINY_MODELS["llama"])
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB_SIZE, (8, LENGTH)).astype(np.int32)
    model = StreamableModel(DictSource.of(directory), directory, device="cuda", dtype="float32", threads=1)
    with tempfile.TemporaryDirectory() as work, one_sample_at_once("cuda"):
        for number in numbers:
            peaks, control = Peaks(), PassControl(Path(work), should_stop=lambda: True)
            with pretended("cuda", number=number, **limits), suppress(Interrupted):
                stream_past(peaks, model, tokens, control)
    return {f"rows {k}": v for k, v in peaks.rows.items()} | {f"columns {k}": v for k, v in peaks.columns.items()}


def with_little_memory(of: str, kind: str, n_samples: int = 64, **limits: int) -> tuple[Counts, Figures, Figures]:
    """64 samples at once, where they may; and on a CPU. limits: as of pretended."""
    with mock.patch.dict(micro_batches._TOKENS, {"cpu": LENGTH, kind: 64 * LENGTH}):
        with pretended(kind, **limits) as counts:
            figures = _run(of, "llama", kind, n_samples)
        return counts, figures, _run(of, "llama", "cpu", n_samples)


def refused(kind: str, **limits: int) -> tuple[str, str, str]:
    """What the user is told."""
    with pretended(kind, **limits):
        try:
            _run("importance", "llama", kind, 4)
        except ConvertError as error:
            return error.what, error.where, error.remedy
    raise AssertionError("it was not refused")


def micro_batches_of(memories: list[int]) -> list[dict[str, Any]]:
    """What the checkpoint says of the micro-batch of a pass that is stopped after a layer and goes on, each time with
    another amount of memory."""
    directory = tiny_models.checkpoint("gemma3", ALL_TINY_MODELS["gemma3"])
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB_SIZE, (64, LENGTH)).astype(np.int32)
    model, noted = StreamableModel(DictSource.of(directory), directory, device="cuda", dtype="float32"), []
    with tempfile.TemporaryDirectory() as work, mock.patch.dict(micro_batches._TOKENS, {"cpu": LENGTH}):
        for memory in memories:
            with pretended("cuda", memory), suppress(Interrupted):
                stream_past(Peaks(), model, tokens, PassControl(Path(work), should_stop=lambda: True))
            with np.load(Path(work) / STATE_NAME) as stored:
                noted.append(json.loads(str(stored["header"]))["notes"]["micro-batch"])
    return noted


def converted(name: str, kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """A conversion to a GGUF, judged: its report."""
    directory = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    with tempfile.TemporaryDirectory() as place, pretended(kind):
        output = Path(place) / f"{name}.gguf"
        return converter.convert(str(directory), output=output, device=kind, quiet=True, **options)


def converted_directory(name: str, kind: str, options: dict[str, Any], **limits: int) -> list[dict[str, Any]]:
    """A conversion to a directory, and its quality by the products and caches of its schemes: there, one sample at
    once, and on a CPU. limits: as of pretended."""
    directory = tiny_models.checkpoint(name, ALL_TINY_MODELS[name])
    tokens = np.random.default_rng(0).integers(3, tiny_models.VOCAB_SIZE, (2, LENGTH)).astype(np.int32)
    corpus, source = Corpus(tokens, "random", "0" * 64), open_checkpoint(str(directory))
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / name

        def quality(device: str) -> dict[str, Any]:
            artifact = DirectoryArtifact.of_recipe(output)
            model = StreamableModel(source, directory, device=device, dtype="float32", threads=1)
            control = PassControl(Path(place) / device)
            return stream_quality(model, artifact, corpus, control, arithmetic=SchemeProducts(artifact)).to_dict()

        with pretended(kind, **limits):
            converter.convert(str(directory), output=output, device=kind, quiet=True, **options)
            with one_sample_at_once(kind):
                there = quality(kind)
        return [there, quality("cpu")]


def smoothed(kind: str) -> list[tuple[float | None, dict[str, float]]]:
    """Which alpha is chosen there, and on a CPU, for inputs that are rounded by row, and under one scale."""
    random = np.random.default_rng(0)
    rows = (random.normal(size=(96, 64)) * np.exp(random.normal(size=64))).astype(np.float32)
    weights = (random.normal(size=(48, 64)) * np.exp(0.5 * random.normal(size=64))).astype(np.float32)
    products = [Products(rows, (weights, weights[:7]), np.abs(rows).max(0), np.abs(weights).max(0))]
    chosen = []
    for static in (False, True):
        with pretended(kind):
            chosen.append(choose_alpha(products, static, kind))
        chosen.append(choose_alpha(products, static))
    return chosen


def products_of_integers(kind: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Layers of INT8 with scales that are measured and stored, with zero points and without, there and on a CPU: of
    more columns than are added up in one go, whose sums float32 does not hold."""
    random, made = np.random.default_rng(0), []
    rows = (random.standard_t(3, (9, 2500)) * np.exp(random.normal(size=(9, 1)))).astype(np.float32)
    rows[0], rows[1], rows[2] = 0, np.abs(rows[1]) + 1, 1
    weights, scales = random.integers(-128, 128, (11, 2500)).astype(np.int8), random.random(11, np.float32)
    weights[0] = 127
    for symmetric in (True, False):
        for stored in (None, 0.031):
            point = None if symmetric else -37
            if stored is None:
                values = int8_matmul.quantize_per_token(rows, symmetric)
            else:
                values = int8_matmul.quantize(rows, np.float32(stored), None if point is None else np.array(point))
            with pretended(kind):
                there = torch.from_numpy(rows).to(kind)
                if stored is None:
                    codes = int8_products.quantize_per_token(there, symmetric)
                else:
                    of_all = torch.tensor([stored], device=kind)
                    points = None if point is None else torch.tensor([point], dtype=torch.int32, device=kind)
                    codes = int8_products.quantize(there, of_all, points)
                matrix = int8_products.Int8Matrix.on(torch.device(kind), weights, scales)
                outputs = int8_products.int8_linear(codes, matrix).cpu().numpy()
            made.append((outputs, int8_matmul.int8_linear(values, weights, scales)))
    return made


def rules() -> dict[str, str]:
    """What the pretended device itself says to what a real one refuses: the name of the error by what was done."""
    told: dict[str, str] = {}

    def attempt(what: str, do: Callable[[], object]) -> None:
        try:
            do()
        except (RuntimeError, TypeError) as error:
            told[what] = type(error).__name__

    with pretended("mps", 1 << 20):
        there = torch.ones(4, device="mps")
        attempt("mixed", lambda: there + torch.ones(4))
        attempt("numpy", there.numpy)
        attempt("float64", there.double)
        attempt("float8", lambda: there.to(torch.float8_e4m3fn))
        attempt("full", lambda: torch.zeros(1 << 20, device="mps"))
    with pretended("cuda", 1 << 20) as counts:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            copied = torch.ones(4).to("cuda", non_blocking=True)
        attempt("race", lambda: copied + 1)
        torch.cuda.current_stream().wait_stream(stream)
        attempt("waited", lambda: copied + 1)
        with torch.inference_mode():
            made = torch.ones(4, device="cuda") * 2
        attempt("inference", lambda: made.add_(1))
        attempt("full", lambda: torch.zeros(1 << 20, device="cuda"))
        waits = dict(counts.waits)
        bool((copied > 0).all())
        copied.cpu()
        told["waits"] = str({key: n - waits.get(key, 0) for key, n in counts.waits.items()})
    return told


def generation_batches(kind: str) -> list[int]:
    """How many prompts go through the model together."""
    from bitwright.calibration.evaluation import generation

    sizes: list[int] = []
    continued = generation._continue

    def noted(model: Any, prompts: Any, *rest: Any) -> Any:
        sizes.append(len(prompts))
        return continued(model, prompts, *rest)

    directory = tiny_models.checkpoint("llama", ALL_TINY_MODELS["llama"])
    model = StreamableModel(DictSource.of(directory), directory, device=kind, threads=1)
    with mock.patch.object(generation, "_continue", noted), tempfile.TemporaryDirectory() as work:
        prompts = [[3, 4, 5]] * 20
        if kind == "cpu":
            generate_greedily(model, prompts, 1, frozenset(), PassControl(Path(work)), resident=True)
        else:
            with pretended(kind):
                generate_greedily(model, prompts, 1, frozenset(), PassControl(Path(work)), resident=True)
    return sizes
