"""What each scheme of a safetensors directory does to a model's predictions, beside llm-compressor's output with its
defaults on the same calibration samples.

    .venv/bin/python -m scripts.bench.safetensors --model .cache/smollm2
    make .venv-llmcompressor/.ready
    .venv/bin/python -m scripts.bench.safetensors --model .cache/smollm2 --peer .venv-llmcompressor/bin/python

The model is taken in bfloat16, llm-compressor's default. With --planted it is one that computes the same, but in whose
layers one channel of what attention and MLP are given is 128 times as large. With --adapt ours falls back to finer
schemes where the inputs of a matrix cannot bear its own, as a conversion does; llm-compressor has no such thing. With
--error-feedback ours chooses the codes of a row together, and llm-compressor's are those of its GPTQ.

Every directory is written by `convert`, or by llm-compressor's oneshot, and evaluated by the same code: the weights
that are decoded from its files, INT8 products by exact integers, FP8 and FP4 inputs rounded as the format says.
Embeddings and head stay in 16 bits in all of them.
"""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from bitwright.calibration.control import PassControl
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus, load_corpus
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.products import SchemeProducts
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.work_directory import WorkDirectory, default_work_dir
from bitwright.converter.judge.open import open_artifact
from bitwright.converter.measure.activations import ACTIVATIONS_FILE
from bitwright.converter.measure.running import load_tokenizer, uses_chat
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.module_map import describe_modules, stored_dtypes
from bitwright.converter.pipeline import run
from bitwright.converter.preparation import fingerprint, prepare
from bitwright.converter.report.text import table
from bitwright.converter.smoothing.stage import SMOOTHED_ACTIVATIONS_FILE, SMOOTHING_FILE
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan_modules import plan_modules
from bitwright.profiles.reading.schema import load_profile, parse_profile

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """alpha: of SmoothQuant, None for none. peer: llm-compressor's name of the scheme, None where it has no such."""

    label: str
    scheme: str
    alpha: float | str | None
    peer: str | None


ROWS = (
    Row("W8A8, naive", "W8A8", None, "W8A8"),
    Row("W8A8, SmoothQuant 0.5", "W8A8", 0.5, "W8A8"),
    Row("W8A8, SmoothQuant auto", "W8A8", "auto", None),
    Row("W8A8 static, naive", "W8A8_STATIC", None, "W8A8_STATIC"),
    Row("W8A8 static, SmoothQuant 0.5", "W8A8_STATIC", 0.5, "W8A8_STATIC"),
    Row("W8A8 static, SmoothQuant auto", "W8A8_STATIC", "auto", None),
    Row("FP8", "FP8", None, "FP8_DYNAMIC"),
    Row("W4A16", "W4A16", None, "W4A16"),
    Row("NVFP4A16", "NVFP4A16", None, "NVFP4A16"),
    Row("NVFP4", "NVFP4", None, "NVFP4"),
)


PLANTED = 128


class Bench:
    def __init__(self, model: Path, scratch: Path, calibration: Job, corpus: Corpus, adapt: bool, fed: bool):
        self.adapt, self.fed = adapt, fed
        self.model, self.scratch, self.calibration, self.corpus = model, scratch, calibration, corpus
        self.checkpoint: Checkpoint = open_checkpoint(str(model))
        self.model_map = describe(self.checkpoint)
        self.baseline = Baseline(StreamableModel(self.checkpoint, model), corpus, PassControl(scratch / "quality"))

    def ours(self, row: Row) -> tuple[Candidate, Path]:
        """Our directory. Statistics of the same model and the same smoothing are computed once."""
        directory, kept = self.scratch / "ours", self.scratch / f"kept-{row.alpha}"
        work = default_work_dir(directory)
        for path in (directory, work):
            shutil.rmtree(path, ignore_errors=True)
        job = replace(
            self.calibration,
            model=str(self.model),
            profile=load_profile(self._profile(row)),
            output=directory,
            alpha=row.alpha,
            error_feedback="best" if self.fed else "off",
            judge="off",
        )
        claimed = WorkDirectory(work)
        with claimed.locked():
            prepared = prepare(job)
            claimed.claim(fingerprint(prepared.run, prepared))
            _copy(self.scratch / "kept", work)
            _copy(kept, work)
        run(job, Progress(quiet=True))
        # With feedback importance comes with second moments, which are gone once the matrices are encoded.
        importance = () if self.fed else ("imatrix.gguf",)
        _copy(work, self.scratch / "kept", ACTIVATIONS_FILE, "activation-rows", *importance)
        _copy(work, kept, SMOOTHING_FILE, SMOOTHED_ACTIVATIONS_FILE)
        return open_artifact(directory, self.model_map).candidate(), directory

    def theirs(self, row: Row, tokens: np.ndarray, python: Path, dtype: str) -> tuple[Candidate, Path]:
        """llm-compressor's directory, read by the tensors that its scheme stores."""
        directory = self.scratch / "theirs"
        shutil.rmtree(directory, ignore_errors=True)
        job = {"model": str(self.model.absolute()), "output": str(directory), "scheme": row.peer, "alpha": row.alpha}
        job |= {"tokens": tokens.tolist(), "dtype": dtype, "gptq": self.fed}
        script = Path(__file__).parents[1] / "peers" / "llmcompressor_directory.py"
        done = subprocess.run(
            [str(python), str(script)], input=json.dumps(job), text=True, capture_output=True, check=False
        )
        if done.returncode:
            raise ConvertError(f"llm-compressor failed: {done.stderr[-600:]}", row.label, "see its message")
        modules = describe_modules(self.checkpoint, self.model_map)
        text = f'description = "d"\ngood_for = "g"\ntarget = "safetensors"\nbase = "{row.scheme}"\n'
        plan = plan_modules(parse_profile(text, "peer", "peer"), modules, stored_dtypes(self.checkpoint))
        artifact = DirectoryArtifact.of_plan(directory, plan)
        return Candidate(artifact, SchemeProducts(artifact), directory), directory

    def figures(self, candidate: Candidate, directory: Path) -> list[str]:
        scores = self.baseline.stream_scores(candidate.weights, arithmetic=candidate.arithmetic)
        n_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        return [
            f"{np.exp(scores[1].mean()):.3f}",
            f"{scores[2].mean():.5f}",
            f"{scores[3].mean():.1%}",
            f"{n_bytes / 2**20:.1f} MiB",
        ]

    def _profile(self, row: Row) -> str:
        path = self.scratch / f"{row.scheme}.toml"
        head = 'description = "d"\ngood_for = "g"\ntarget = "safetensors"\n'
        path.write_text(f'{head}base = "{row.scheme}"\n[activations]\nadapt = {str(self.adapt).lower()}\n')
        return str(path)


def in_bfloat16(model: Path, directory: Path, planted: bool) -> Path:
    """A copy of the model."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, directory)
    weights = load_file(directory / "model.safetensors")
    if planted:
        plant(weights)
    weights = {name: values.to(torch.bfloat16) for name, values in weights.items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    return directory


def plant(weights: "dict[str, torch.Tensor]") -> None:
    """Makes one channel of every norm's output PLANTED times as large, and the columns that read it as much smaller: a
    power of two, so that nothing else changes."""
    readers = {"input_layernorm": "self_attn.{}_proj", "post_attention_layernorm": "mlp.{}_proj"}
    for name in [name for name in weights if name.endswith("layernorm.weight")]:
        layer, norm, _ = name.rsplit(".", 2)
        channel = 7 * int(layer.rsplit(".", 1)[1])
        weights[name][channel] *= PLANTED
        for reader in ("q", "k", "v", "gate", "up"):
            if (column := f"{layer}.{readers[norm].format(reader)}.weight") in weights:
                weights[column][:, channel] /= PLANTED


def _copy(source: Path, target: Path, *names: str) -> None:
    target.mkdir(exist_ok=True)
    for name in names or [path.name for path in source.iterdir()] if source.exists() else ():
        path = source / name
        if path.is_dir():
            shutil.copytree(path, target / name, dirs_exist_ok=True)
        elif path.exists():
            shutil.copyfile(path, target / name)


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=Path(".cache/smollm2"), show_default=True)
@click.option("--calibration-length", default=256, show_default=True, help="Tokens in each of 128 samples.")
@click.option("--samples", default=16, show_default=True, help="Sequences to evaluate.")
@click.option("--sequence-length", default=256, show_default=True)
@click.option("--rows", default="", help="Only these rows, by their numbers from 0 on: 0,1,7.")
@click.option("--peer", type=click.Path(path_type=Path), help="Python of an environment with llm-compressor.")
@click.option("--peer-dtype", default="auto", show_default=True, help="In which llm-compressor holds the model.")
@click.option("--planted", is_flag=True, help="Plant an outlier first.")
@click.option("--adapt", is_flag=True, help="Let ours fall back to finer schemes.")
@click.option("--error-feedback", "fed", is_flag=True, help="Choose the codes of a row together.")
def main(
    model: Path,
    calibration_length: int,
    samples: int,
    sequence_length: int,
    rows: str,
    peer: Path | None,
    peer_dtype: str,
    planted: bool,
    adapt: bool,
    fed: bool,
) -> None:
    tokenizer = load_tokenizer(model)
    corpus = load_corpus("embedded", tokenizer, samples, sequence_length, split="test")
    profile = parse_profile('description = "d"\ngood_for = "g"\nbase = "F16"\n', "bench", "bench")
    job = Job(str(model), profile, calibration="embedded", samples=128, sequence_length=calibration_length)
    shown = [ROWS[int(i)] for i in rows.split(",")] if rows else list(ROWS)
    with tempfile.TemporaryDirectory() as directory:
        model = in_bfloat16(model, Path(directory) / "model", planted)
        bench = Bench(model, Path(directory), job, corpus, adapt, fed)
        chat = uses_chat(job, bench.model_map)
        tokens = load_corpus("embedded", tokenizer, 128, calibration_length, chat=chat).tokens
        cells = []
        for row in shown:
            cells.append([row.label, "ours", *bench.figures(*bench.ours(row))])
            click.echo("  ".join(cells[-1]), err=True)
            if peer is not None and row.peer is not None:
                try:
                    found = bench.figures(*bench.theirs(row, tokens, peer, peer_dtype))
                except ConvertError as error:
                    if "group_size" not in error.what:
                        raise
                    found = ["refused: its group does not divide the columns", "", "", ""]
                cells.append([row.label, "llm-compressor", *found])
                click.echo("  ".join(cells[-1]), err=True)
        source = np.exp(bench.baseline.stream_scores(bench.checkpoint)[0].mean())
        n_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    cells.insert(0, ["16 bit", "source", f"{source:.3f}", "0", "100.0%", f"{n_bytes / 2**20:.1f} MiB"])
    click.echo(table(["scheme", "written by", "perplexity", "mean KLD", "same top token", "size"], cells))


if __name__ == "__main__":
    main()
