"""How much calibration is enough: KL divergence of a low-bit model against samples, their length, and chat templates.

Every row is the importance of one calibration, one conversion with it, and the divergence on two texts that no
calibration has seen: plain passages, and passages as conversations by the model's chat template. Importance is a sum
over samples, so a length is run once, over all samples, and the fewer samples are its first ones.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import click

from bitwright.calibration.control import PassControl, never
from bitwright.calibration.evaluation.quality import Baseline
from bitwright.calibration.passes.importance_pass import stream_importance
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import EMBEDDED, Corpus, load_corpus
from bitwright.converter.gguf.verify import DecodedArtifact
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.calibrate import observed_names
from bitwright.converter.measure.running import load_tokenizer
from bitwright.converter.model.model_map import describe
from bitwright.converter.pipeline import run
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.files.journal import append_line
from bitwright.profiles.reading.schema import parse_profile

EVALUATION_SAMPLES, EVALUATION_LENGTH = 16, 512


class Study:
    """A model, and the importance matrices of it that have been computed, kept on disk."""

    def __init__(self, model: Path, cache: Path, progress: Progress):
        self.cache, self.progress = cache, progress
        self.checkpoint = open_checkpoint(str(model))
        self.model_map = describe(self.checkpoint)
        self.tokenizer = load_tokenizer(self.checkpoint.location)
        cache.mkdir(parents=True, exist_ok=True)
        self.baselines = {chat: self._baseline(chat) for chat in (False, True)}

    def _baseline(self, chat: bool) -> Baseline:
        corpus = load_corpus(EMBEDDED, self.tokenizer, EVALUATION_SAMPLES, EVALUATION_LENGTH, split="test", chat=chat)
        work_dir = self.cache / ("talk" if chat else "text")
        return Baseline(StreamableModel(self.checkpoint, self.checkpoint.location), corpus, PassControl(work_dir))

    def importance(self, samples: list[int], length: int, chat: bool) -> dict[int, Path]:
        """The importance of the first so many samples, for each of these numbers."""
        paths = {n: self.cache / f"{n}x{length}-{'chat' if chat else 'plain'}.gguf" for n in samples}
        corpus = load_corpus(EMBEDDED, self.tokenizer, max(samples), length, chat=chat)
        if len(corpus.tokens) < max(samples):
            raise SystemExit(f"the text has {len(corpus.tokens)} samples of {length} tokens, not {max(samples)}")
        total, start = None, 0
        for n in sorted(samples):
            if not paths[n].exists():
                part = self._measured(replace(corpus, tokens=corpus.tokens[start:n]))
                save_imatrix(paths[n], part if total is None else _sum(total, part))
            total, start = load_imatrix(paths[n]), n
        return paths

    def _measured(self, corpus: Corpus) -> ImportanceMatrix:
        with tempfile.TemporaryDirectory() as directory:
            model = StreamableModel(self.checkpoint, self.checkpoint.location)
            control = PassControl(Path(directory), self.progress)
            return stream_importance(model, observed_names(self.model_map), corpus, control)

    def divergences(self, imatrix: Path, base: str) -> tuple[float, float]:
        """The mean divergence of the model in that format, encoded with this importance: on text, on conversations."""
        text = f'description = "the layers in {base}"\ngood_for = "studies"\nbase = "{base}"\n'
        text += '[[rule]]\nroles = ["embedding", "output"]\nformat = "Q8_0"\n'
        with tempfile.TemporaryDirectory() as directory:
            job = Job(
                model=str(self.checkpoint.location),
                profile=parse_profile(text, base.lower(), "study"),
                output=Path(directory) / "model.gguf",
                imatrix=imatrix,
                protect_super_weights="off",
                judge="off",
                effort="fast",
            )
            run(job, self.progress, never)
            artifact = DecodedArtifact([Path(directory) / "model.gguf"], self.model_map)
            name = f"{base}-{imatrix.stem}"
            plain, talk = (self.baselines[chat].stream_scores(artifact, name)[2].mean() for chat in (False, True))
        return float(plain), float(talk)


def _sum(a: ImportanceMatrix, b: ImportanceMatrix) -> ImportanceMatrix:
    sums = {name: a.sums[name] + b.sums[name] for name in a.sums}
    return replace(a, sums=sums, counts={name: a.counts[name] + b.counts[name] for name in a.counts})


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), default=Path(".cache/smollm2-wide"))
@click.option("--format", "base", default="IQ2_XS", show_default=True, help="Of the layers; embedding and output Q8_0.")
@click.option("--samples", default="128,512,1024", show_default=True, help="Numbers of samples, with commas between.")
@click.option("--lengths", default="128,512,2048", show_default=True, help="Tokens in a sample.")
@click.option(
    "--kinds", default="plain,chat", show_default=True, help="Of calibration: with the chat template or without."
)
@click.option("--most-tokens", type=int, help="Leave out what is longer in all.")
@click.option("--cache", type=click.Path(path_type=Path), default=Path(".cache/study-calibration"))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Append each row to it.")
def main(
    model: Path,
    base: str,
    samples: str,
    lengths: str,
    kinds: str,
    most_tokens: int | None,
    cache: Path,
    json_path: Path | None,
) -> None:
    """Print mean KL divergence on plain text and on conversations for every amount and kind of calibration."""
    progress = Progress()
    study = Study(model, cache / model.name, progress)
    numbers = [int(n) for n in samples.split(",")]
    click.echo(f"{base}, effort fast; mean KLD over {EVALUATION_SAMPLES} samples of {EVALUATION_LENGTH} tokens")
    click.echo(
        f"{'calibration':>12} {'samples':>8} {'length':>7} {'tokens':>9} | {'plain text':>11} {'conversations':>14}"
    )
    for length in [int(n) for n in lengths.split(",")]:
        fitting = [n for n in numbers if most_tokens is None or n * length <= most_tokens]
        for kind in kinds.split(",") if fitting else ():
            chat = kind == "chat"
            for n, path in study.importance(fitting, length, chat).items():
                plain, talk = study.divergences(path, base)
                click.echo(f"{kind:>12} {n:>8} {length:>7} {n * length:>9} | {plain:>11.4f} {talk:>14.4f}")
                row = {"format": base, "chat": chat, "samples": n, "length": length, "plain": plain, "talk": talk}
                if json_path:
                    append_line(json_path, row)
    progress.close()


if __name__ == "__main__":
    main()
