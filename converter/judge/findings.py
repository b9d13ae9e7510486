"""The stages `quality`, `agreement` and `guard`: what the artifact predicts, what its runtime computes and writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.progress import Clock, Progress
from bitwright.converter.judge.agreement import runtime_agreement
from bitwright.converter.judge.child import RuntimeTroubled
from bitwright.converter.judge.guard import streamed_coherence
from bitwright.converter.judge.judging import Judging
from bitwright.converter.judge.quality import streamed_quality


class Findings(NamedTuple):
    """Of the three stages, each as plain data; agreement and coherence are None where the system does not let the
    runtime run: the next run of the same command judges them."""

    quality: dict[str, Any]
    agreement: dict[str, Any] | None
    coherence: dict[str, Any] | None


def judge(run: Run, candidate: Candidate, clock: Clock) -> Findings:
    """What is kept of an earlier run is not measured again. Raises Interrupted, and ConvertError."""
    judging = Judging.of_run(run)
    coherence = agreement = None
    with clock("quality"):
        quality = streamed_quality(judging, candidate)
    with clock("agreement"), _judging("what the runtime computes", run.progress):
        agreement = runtime_agreement(judging, candidate, quality)
    with clock("guard"), _judging("what the artifact writes", run.progress):
        coherence = streamed_coherence(judging, candidate, quality["corpus"])
    return Findings(quality, agreement, coherence)


@contextmanager
def _judging(what: str, progress: Progress) -> Iterator[None]:
    """A part that is left open when the system does not let the runtime run."""
    try:
        yield
    except RuntimeTroubled as error:
        progress.say(f"warning: not judged is {what}: {error}. Free some memory and run the same command again")
