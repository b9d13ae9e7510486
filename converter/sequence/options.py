"""Whether the layers of a job are encoded in sequence, and what does not go with that."""

from bitwright.converter.job.job import Job
from bitwright.formats.errors import ConvertError
from bitwright.profiles.planning.plan import Plan

_LEAST_TUNING_TOKENS = 1024


def encodes_in_sequence(job: Job, plan: Plan) -> bool:
    return job.in_sequence and plan.error_feedback is not None


def asked_by(job: Job) -> str:
    """The option that asks for it."""
    return "--tune" if job.tune else "--sequential"


def refuse_with_sequence(job: Job) -> None:
    """Raises ConvertError for options that contradict it: codes that are chosen without any inputs, statistics of
    others, and a text that is too short to tune on."""
    if not job.in_sequence:
        return
    if job.feedback is None:
        raise ConvertError(
            "without error feedback no code depends on the inputs of its layer",
            f"{asked_by(job)} --no-error-feedback",
            "leave one of them out",
        )
    if job.statistics is not None:
        raise ConvertError(
            "in sequence the inputs of a layer are those in the artifact, of which no statistics tell",
            f"{asked_by(job)} --statistics",
            "leave one of them out",
        )
    if job.tune and job.samples * job.sequence_length < _LEAST_TUNING_TOKENS:
        raise ConvertError(
            f"{job.samples} samples of {job.sequence_length} tokens are too few to tune a layer on",
            f"--tune {job.tune}",
            f"give at least {_LEAST_TUNING_TOKENS} tokens: --samples, --sequence-length",
        )
