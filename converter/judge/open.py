"""The commands `bitwright evaluate` and `bitwright verify`: any artifact, a GGUF or a directory, beside its source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bitwright.calibration.choices import CacheRounding, Device
from bitwright.calibration.control import ShouldStop, never
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.boundary.machine import usable_cores
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.products import directory_candidate
from bitwright.converter.directory.verify import verify_directory
from bitwright.converter.gguf.verify import artifact_files, as_stored, gguf_candidate, verify
from bitwright.converter.job.cache import SourceCache, open_cache
from bitwright.converter.job.progress import Progress
from bitwright.converter.job.scratch import scratch_directory
from bitwright.converter.judge.agreement import runtime_agreement
from bitwright.converter.judge.child import RuntimeTroubled
from bitwright.converter.judge.judging import Judging
from bitwright.converter.judge.quality import quality_with_cache, streamed_quality
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.module_map import describe_for_directory
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.vocabulary import ModelMap


class OpenArtifact(Protocol):
    """An artifact that is known to be of a model."""

    def candidate(self) -> Candidate:
        """The artifact as something to run."""

    def errors(self, checkpoint: Checkpoint, progress: Progress) -> list[TensorError]:
        """The error of every tensor. Raises ConvertError as the stage `verify` does."""


def open_artifact(artifact: Path, model_map: ModelMap) -> OpenArtifact:
    """Raises ConvertError for a directory of another model, and for a file or a shard that is missing; a GGUF of
    another model is seen when its tensors are read."""
    if not artifact.is_dir():
        return _OpenGguf(artifact_files(artifact), model_map)
    directory = DirectoryArtifact.of_recipe(artifact)
    directory.check_model(model_map)
    return _OpenDirectory(directory)


@dataclass(frozen=True)
class _OpenGguf:
    """files: all shards, the first one first."""

    files: list[Path]
    model_map: ModelMap

    def candidate(self) -> Candidate:
        return gguf_candidate(self.files, self.model_map, usable_cores())

    def errors(self, checkpoint: Checkpoint, progress: Progress) -> list[TensorError]:
        checkpoint, model_map = as_stored(checkpoint, self.model_map, self.files)
        return verify(self.files, checkpoint, model_map, None, progress, usable_cores())


@dataclass(frozen=True)
class _OpenDirectory:
    directory: DirectoryArtifact

    def candidate(self) -> Candidate:
        return directory_candidate(self.directory)

    def errors(self, checkpoint: Checkpoint, progress: Progress) -> list[TensorError]:
        return verify_directory(
            self.directory.directory, self.directory, checkpoint, None, {}, progress, usable_cores()
        )


def evaluate_artifact(
    artifact: Path,
    model: str,
    progress: Progress,
    *,
    text: str | None,
    samples: int,
    sequence_length: int,
    threads: int,
    device: Device,
    cache: Path | None = None,
    kv: CacheRounding | None = None,
) -> dict[str, Any]:
    """The quality of any artifact of this model as plain data, and under "agreement" what its runtime computes beside
    that, None where the system keeps ending it. text: None for the default of a conversion's report. threads: 0 for
    every core. cache: as of Job. kv: what keys and values are kept in; the runtime, which is asked with none, is left
    alone then, and "by_position" says how the divergence grows with the text.

    Raises ConvertError when the artifact is not of this model, and for a model with latent attention and kv:
    transformers caches what is made of the latent, and runtimes the latent.
    """
    with scratch_directory() as work_dir:
        judging = judging_of(
            artifact,
            open_checkpoint(model, from_quantized=True),
            work_dir,
            progress,
            text=text,
            samples=samples,
            sequence_length=sequence_length,
            threads=threads,
            device=device,
            cache=cache,
        )
        candidate = candidate_of(artifact, judging)
        if kv is not None:
            return quality_with_cache(judging, candidate, kv)
        quality = streamed_quality(judging, candidate)
        agreement = None
        try:
            agreement = runtime_agreement(judging, candidate, quality)
        except RuntimeTroubled as error:
            progress.say(f"warning: not judged is what the runtime computes: {error}")
    return quality | {"agreement": agreement}


def judging_of(
    artifact: Path,
    checkpoint: Checkpoint,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop = never,
    **how: Any,
) -> Judging:
    """How an artifact is evaluated beside a source. how: text, samples, sequence_length, threads, device and cache, as
    of evaluate_artifact."""
    return Judging(
        checkpoint,
        _described(artifact, checkpoint),
        work_dir,
        how["text"],
        how["samples"],
        how["sequence_length"],
        seed=0,
        device=how["device"],
        threads=how["threads"] or usable_cores(),
        progress=progress,
        should_stop=should_stop,
        cache=SourceCache(open_cache(how["cache"]), checkpoint, how["device"], progress),
    )


def candidate_of(artifact: Path, judging: Judging) -> Candidate:
    """Raises ConvertError as open_artifact does."""
    _, running_map = judging.running
    return open_artifact(artifact, running_map).candidate()


def verify_artifact(artifact: Path, model: str, progress: Progress) -> list[TensorError]:
    """The error of every tensor of a GGUF, decoded by the gguf package, or of a directory. Raises ConvertError for an
    artifact of another model, and as the stage `verify` does."""
    checkpoint = open_checkpoint(model, from_quantized=True)
    return open_artifact(artifact, _described(artifact, checkpoint)).errors(checkpoint, progress)


def _described(artifact: Path, checkpoint: Checkpoint) -> ModelMap:
    """The source's map, as far as this kind of artifact asks."""
    by_modules = artifact.is_dir() and checkpoint.metadata is None
    return describe_for_directory(checkpoint) if by_modules else describe(checkpoint)
