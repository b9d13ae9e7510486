"""What the stages of a job have to do, counted before any of it is done.

A stage that runs the model counts products: those of a token with the weights that it meets, times the tokens. Encoding
counts weights by format, the rest what it goes through. How long a unit takes is not said here.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from bitwright.converter.artifact.feedback import moment_widths, wants_feedback
from bitwright.converter.artifact.run import Run
from bitwright.converter.judge.judging import REPORT_SEQUENCE_LENGTH, report_samples
from bitwright.converter.measure.evidence import ANALYSIS_SAMPLES, ANALYSIS_SEQUENCE_LENGTH
from bitwright.converter.measure.moments import collects_moments
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.planning.plan_modules import PlannedModule
from bitwright.profiles.planning.protect import looks_for_super_weights
from bitwright.profiles.vocabulary import EXPERT_ROLES, ModelMap

# A layer is run, run again for its gradients, and each product then has two of its own.
_GRADIENT_PRODUCTS = 4


@dataclass(frozen=True)
class Work:
    """A part of a stage. amount: in units of its own; None where it is not known yet. what: what else the rate depends
    on, in words. products: those of the model's run in it, where that is what it mostly is; 0.0 elsewhere."""

    stage: str
    amount: float | None
    what: str = ""
    products: float = 0.0


def work_of(run: Run, plan: Plan | None, importance_is_given: bool, reads_text_later: bool) -> Iterator[Work]:
    """What is done, in its order. plan: None where it rests on an analysis; what is encoded is unknown then.

    importance_is_given: no importance is computed. reads_text_later: as of converter.artifact.target.Planned."""
    job, weights = run.job, active_weights(run.model_map)
    tokens = job.samples * job.sequence_length
    computing = f"{job.device} {job.calibration_dtype}"
    if (n_bytes := download_bytes(run)) > 0:
        yield Work("download", float(n_bytes))
    squares = 0
    if collects_moments(run, plan):
        squares = sum(width * width for widths in moment_widths(run.model_map).values() for width in widths)
    if not importance_is_given:
        products = float(tokens * (weights + squares))
        yield Work("calibrate", products, f"{computing} moments={squares > 0}", products)
    if plan is None:
        read = ANALYSIS_SAMPLES * min(ANALYSIS_SEQUENCE_LENGTH, job.sequence_length)
        if job.sensitivity is None:
            products = float(_GRADIENT_PRODUCTS * read * weights)
            yield Work("analyse", products, computing, products)
        if job.refine:
            yield Work("refine", float(job.refine * weights), computing)
    if _adapts(run, plan, reads_text_later):
        again = importance_is_given and squares > 0
        yield Work("adapt", float(weights + (tokens * squares if again else 0)), f"{computing} moments={again}")
    if plan is None or job.in_sequence:  # what its pass over the model takes is in no rate of encoding
        yield Work("encode", None)
    else:
        yield from encoding_of(plan)
    yield Work("verify", float(sum(tensor.n_weights for tensor in run.model_map.tensors)), job.profile.target)
    if job.judge != "off":
        read = report_samples(job.judge) * min(REPORT_SEQUENCE_LENGTH, job.sequence_length)
        products = 2.0 * read * weights  # of the source and of the artifact
        yield Work("quality", products, f"{job.device} {job.profile.target}", products)
        yield Work("agreement", float(weights), job.profile.target)
        yield Work("guard", float(weights), f"{job.profile.target} {job.judge}")
    if job.lm_eval:
        yield Work("tasks", float(weights), f"{','.join(job.lm_eval)} {job.lm_eval_limit}")


def encoding_of(plan: Plan) -> Iterator[Work]:
    """Of every kind of encoding, how many weights."""
    amounts: Counter[str] = Counter()
    for row in plan.tensors:
        amounts[kind_of_encoding(plan, row)] += row.tensor.n_weights
    for kind, amount in amounts.items():
        yield Work("encode", float(amount), kind)


def kind_of_encoding(plan: Plan, row: PlannedTensor) -> str:
    """What the time of encoding a weight depends on: the format comes first."""
    takes = _takes_feedback(row) if isinstance(row, PlannedModule) else wants_feedback(row)
    fed = plan.error_feedback is not None and takes
    return f"{row.format} {plan.effort} {plan.error_feedback if fed else 'plain'}"


def _takes_feedback(row: PlannedModule) -> bool:
    return row.scheme is not None and row.scheme.takes_feedback


def active_weights(model_map: ModelMap) -> int:
    """The weights that a token meets on its way: of experts those that it is sent to."""
    share = _used_share(model_map)
    return round(
        sum(
            tensor.n_weights * (share if tensor.role in EXPERT_ROLES else 1.0)
            for tensor in model_map.tensors
            if tensor.quantizable
        )
    )


def _used_share(model_map: ModelMap) -> float:
    own = model_map.architecture
    used, of = (model_map.metadata.get(f"{own}.expert_{key}") for key in ("used_count", "count"))
    if used is None or of is None or not of.value:
        return 1.0
    return float(min(1.0, used.value / of.value))


def download_bytes(run: Run) -> int:
    """What is still to be fetched of the weights."""
    if run.checkpoint.fetch_weights is None:
        return 0
    stored = {part for tensor in run.checkpoint.tensors.values() for part in tensor.stored}
    return sum(part.n_bytes for part in stored if not part.file.is_file())


def _adapts(run: Run, plan: Plan | None, reads_text_later: bool) -> bool:
    """Whether the stage `adapt` runs the model."""
    if run.job.profile.target != "gguf":
        return reads_text_later
    return plan is None or looks_for_super_weights(run.job.protection, plan)
