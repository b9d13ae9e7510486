"""How an artifact is judged: beside which source, on which text, and by what means."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bitwright.calibration.choices import Device, Judge
from bitwright.calibration.control import PassControl, ShouldStop
from bitwright.calibration.stream.streamable import StreamableModel
from bitwright.calibration.text.corpus import Corpus, load_corpus
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.cache import SourceCache
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.running import load_tokenizer, runnable
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.profiles.vocabulary import ModelMap

# Of a conversion's own report: enough to see a loss that matters, in little time beside the calibration's; or less.
REPORT_SAMPLES, FAST_SAMPLES, REPORT_SEQUENCE_LENGTH = 16, 4, 512


def report_samples(judge: Judge) -> int:
    """How many sequences a conversion's own report is measured on."""
    return FAST_SAMPLES if judge == "fast" else REPORT_SAMPLES


@dataclass(frozen=True)
class Judging:
    """What all judges of an artifact share.

    checkpoint, model_map: the source, as it is stored. work_dir: where the results stay, and what is left of unfinished
    ones. text: what quality is measured on, the name of a corpus or a file; None for the default of load_corpus.
    samples, sequence_length: how much of it, in sequences and tokens. seed: of what is drawn from it. device, threads:
    what runs the model, and on how many cores. cache: of what is known of the source. judge: whether the guard asks all
    of its questions.
    """

    checkpoint: Checkpoint
    model_map: ModelMap
    work_dir: Path
    text: str | None
    samples: int
    sequence_length: int
    seed: int
    device: Device
    threads: int
    progress: Progress
    should_stop: ShouldStop
    cache: SourceCache
    judge: Judge = "full"

    @classmethod
    def of_run(cls, run: Run) -> "Judging":
        """Of what a conversion has written, on text that its calibration has not seen."""
        return cls(
            run.checkpoint,
            run.model_map,
            run.work_dir,
            None,
            report_samples(run.job.judge),
            min(REPORT_SEQUENCE_LENGTH, run.job.sequence_length),
            run.job.seed,
            run.job.device,
            run.job.n_threads,
            run.progress,
            run.should_stop,
            run.cache,
            run.job.judge,
        )

    @cached_property
    def running(self) -> tuple[Checkpoint, ModelMap]:
        """The source as a directory that transformers can run, and its map."""
        return runnable(self.checkpoint, self.model_map, self.work_dir)

    @cached_property
    def tokenizer(self) -> Any:
        """The source's, as transformers runs it."""
        running, _ = self.running
        return load_tokenizer(running.location)

    def held_out(self, text: str | None, samples: int, sequence_length: int) -> Corpus:
        """Samples of the part of a text that no calibration sees."""
        return load_corpus(text, self.tokenizer, samples, sequence_length, self.seed, split="test")

    @property
    def candidate_logits(self) -> Path:
        """The artifact's logits of the first sample that quality is measured on, see Baseline.stream_scores: what the
        stage `quality` leaves for the stage `agreement`."""
        return self.work_dir / "candidate-logits.npy"

    @property
    def source_model(self) -> StreamableModel:
        """The source to be streamed, in float32 on every device: bfloat16 alone makes a divergence of 0.002 nats, more
        than a format of 6 bits."""
        running, _ = self.running
        name, revision = self.checkpoint.model_id, self.checkpoint.revision
        return StreamableModel(
            running, running.location, name, revision, device=self.device, dtype="float32", threads=self.threads
        )

    def candidate_model(self, candidate: Candidate) -> StreamableModel:
        """The same model with the artifact's weights, computed with as its runtime does."""
        return replace(
            self.source_model, weights=candidate.weights, variant="artifact", arithmetic=candidate.arithmetic
        )

    def control(self, name: str) -> PassControl:
        """Of a pass over the model, whose checkpoints are in a directory of that name in the work directory."""
        return PassControl(self.work_dir / name, self.progress, self.should_stop)
