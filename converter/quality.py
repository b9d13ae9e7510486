"""The stage `quality`: the artifact's weights, decoded, beside the checkpoint's, through the same layer stream."""

from pathlib import Path
from typing import Any

from calibration.control import ShouldStop, never
from calibration.corpus import load_corpus
from calibration.quality import compare
from calibration.words import word_numbers
from converter.calibrate import load_tokenizer, runnable
from converter.checkpoint import Checkpoint
from converter.child import RuntimeTroubled
from converter.directory_artifact import DirectoryArtifact
from converter.job import Job, usable_cores
from converter.kept import kept_json
from converter.model_map import describe
from converter.progress import Progress
from converter.scheme_products import SchemeProducts
from converter.scratch import scratch_directory
from converter.source import open_checkpoint
from converter.target import Candidate
from converter.verify import DecodedArtifact, artifact_files
from profiles.vocabulary import ModelMap

# Of the conversion's own report: enough to see a loss that matters, in little time beside the calibration's.
REPORT_SAMPLES = 16
REPORT_SEQUENCE_LENGTH = 512


def measure_quality(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    candidate: Candidate,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
) -> dict[str, Any]:
    """The quality of a job's artifact as plain data, on text that the calibration has not seen. Measured once: the
    result stays in the work directory."""

    def measure() -> dict[str, Any]:
        running, _ = runnable(checkpoint, model_map, work_dir)
        tokenizer = load_tokenizer(running.location)
        corpus = load_corpus(
            None,
            tokenizer,
            REPORT_SAMPLES,
            min(REPORT_SEQUENCE_LENGTH, job.sequence_length),
            job.seed,
            split="test",
        )
        report = compare(
            running,
            candidate.weights,
            running.location,
            corpus,
            work_dir=scratch,
            arithmetic=candidate.arithmetic,
            words=word_numbers(corpus.tokens, tokenizer),
            device=job.device,
            threads=job.n_threads,
            progress=progress,
            should_stop=should_stop,
        )
        return report.to_dict()

    scratch = work_dir / "quality"
    return kept_json(work_dir / "quality.json", "quality report", progress, measure, scratch)


def evaluate_artifact(
    artifact: Path,
    model: str,
    progress: Progress,
    *,
    text: str | None,
    samples: int,
    sequence_length: int,
    threads: int,
    device: str,
) -> dict[str, Any]:
    """The quality of any artifact of this model, a GGUF or a directory, as plain data, and under "agreement" what its
    runtime computes beside that, None where the system keeps ending it; text None for the default of a conversion's
    report.

    Raises ConvertError when the artifact is not of this model.
    """
    from converter.agreement import runtime_agreement

    checkpoint = open_checkpoint(model)
    with scratch_directory() as work_dir:
        checkpoint, model_map = runnable(checkpoint, describe(checkpoint), work_dir)
        tokenizer = load_tokenizer(checkpoint.location)
        corpus = load_corpus(text, tokenizer, samples, sequence_length, split="test")
        candidate = open_candidate(artifact, model_map)
        report = compare(
            checkpoint,
            candidate.weights,
            checkpoint.location,
            corpus,
            work_dir=work_dir / "quality",
            arithmetic=candidate.arithmetic,
            words=word_numbers(corpus.tokens, tokenizer),
            device=device,
            threads=threads or None,
            progress=progress,
        )
        agreement = None
        try:
            agreement = runtime_agreement(
                checkpoint,
                model_map,
                candidate,
                work_dir,
                quality=report.to_dict() | {"corpus": text},
                seed=0,
                device=device,
                threads=threads or usable_cores(),
                progress=progress,
                should_stop=never,
            )
        except RuntimeTroubled as error:
            progress.say(f"warning: not judged is what the runtime computes: {error}")
    return report.to_dict() | {"agreement": agreement}


def open_candidate(artifact: Path, model_map: ModelMap) -> Candidate:
    """An artifact of this model as something to run. Raises ConvertError for one of another model."""
    if not artifact.is_dir():
        return Candidate(DecodedArtifact(artifact_files(artifact), model_map), artifact=artifact)
    directory = DirectoryArtifact.of_recipe(artifact)
    directory.check_model(model_map)
    return Candidate(directory, SchemeProducts(directory), artifact, directory.unreadable)
