"""The stage `super weights`: looks for them in a checkpoint, and remembers what was found."""

from pathlib import Path

from calibration.control import ShouldStop
from calibration.corpus import load_corpus
from calibration.fisher import FisherFactors
from calibration.super_weights import SuperWeightReport
from converter.calibrate import load_tokenizer, runnable, uses_chat
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.progress import Progress
from formats.whole_file import whole_file
from profiles.vocabulary import ModelMap, Role

RESULT = "super_weights.json"

# Samples of the calibration text that are looked at beside the fixed prompts, and the text on which removals are
# measured: a thousand positions tell 0.01 nats from nothing.
_LOOKED_AT = 8
_MEASURED_SAMPLES, _MEASURED_LENGTH = 8, 256


def look_for_super_weights(
    job: Job,
    checkpoint: Checkpoint,
    model_map: ModelMap,
    work_dir: Path,
    progress: Progress,
    should_stop: ShouldStop,
    factors: FisherFactors | None = None,
) -> SuperWeightReport:
    """What the job's model has of super weights. It stays in the work directory and is not looked for again."""
    result = work_dir / RESULT
    if not result.exists():
        from calibration.spikes import PROMPT_LENGTH, DownProjection, prompt_tokens
        from calibration.super_weight_search import find_super_weights

        running, running_map = runnable(checkpoint, model_map, work_dir)
        tokenizer = load_tokenizer(running.location)
        chat, length = uses_chat(job, model_map), min(PROMPT_LENGTH, job.sequence_length - 1)
        samples = load_corpus(job.calibration, tokenizer, _LOOKED_AT, length + 1, job.seed, chat=chat)
        length_measured = min(_MEASURED_LENGTH, job.sequence_length)
        text = load_corpus(job.calibration, tokenizer, _MEASURED_SAMPLES, length_measured, job.seed, split="test")
        report = find_super_weights(
            running,
            running.location,
            [
                DownProjection(source, tensor.layer, tensor.name, matrix)
                for tensor in running_map.tensors
                if tensor.role in (Role.MLP_DOWN, Role.EXPERT_DOWN) and tensor.layer is not None
                for matrix, source in enumerate(tensor.sources)
            ],
            prompt_tokens(tokenizer, samples.tokens, length),
            text,
            factors=factors,
            model=checkpoint.model_id,
            revision=checkpoint.revision,
            work_dir=work_dir / "super-weights",
            device=job.device,
            threads=job.n_threads,
            progress=progress,
            should_stop=should_stop,
        )
        with whole_file(result, "record of super weights") as file:
            file.write(report.to_json().encode())
    return SuperWeightReport.from_json(result.read_text(encoding="utf-8"), str(result))
