"""A GGUF as the artifact of a conversion, for llama.cpp."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.feedback import feedback_notes, wants_feedback
from bitwright.converter.artifact.layout import Files, Layout, partial_path
from bitwright.converter.artifact.naming import gguf_name
from bitwright.converter.artifact.ownership import Replaceable
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Adapted, Located, Planned, Prepared
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.artifact.writer import JOURNAL, ArtifactWriter, PlanEncoder, written_sha256
from bitwright.converter.gguf.coverage import gguf_coverage
from bitwright.converter.gguf.encode import Encoder
from bitwright.converter.gguf.folding.equalise import Equalised, blank_record, equalise, equalised_before
from bitwright.converter.gguf.layout import as_encoded, counted_bytes, gguf_layouts, uniform_sizes
from bitwright.converter.gguf.protect import (
    Protected,
    protect,
    protected_before,
    protection_notes,
    refuse_protection,
)
from bitwright.converter.gguf.reuse import ReusingEncoder
from bitwright.converter.gguf.verify import gguf_candidate, verify
from bitwright.converter.job.job import Job
from bitwright.converter.job.work_directory import REPLACEABLE
from bitwright.converter.measure.calibrate import streamed_importance
from bitwright.converter.measure.moments import moments_dir, open_feedback
from bitwright.converter.measure.running import runnable
from bitwright.converter.measure.statistics_directory import given_moments
from bitwright.converter.model.model_map import describe
from bitwright.converter.sequence.options import encodes_in_sequence, refuse_with_sequence
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.labels import expected_mix
from bitwright.profiles.planning.plan import Plan, PlannedTensor
from bitwright.profiles.planning.protect import looks_for_super_weights
from bitwright.profiles.planning.summary import fallback_lines, mtp_lines, unscaled_lines
from bitwright.profiles.vocabulary import ModelMap, Role

if TYPE_CHECKING:
    from bitwright.converter.sequence.encoding import SequencedEncoder


class GgufTarget:
    def describe(self, job: Job, checkpoint: Checkpoint) -> ModelMap:
        return describe(checkpoint, job.pre_tokenizer, keeps_mtp=job.mtp == "keep")

    def located(self, job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Located:
        _refuse_options(job)
        output = job.output or Path()
        if output.suffix != ".gguf":
            output /= gguf_name(checkpoint, model_map, expected_mix(job.profile, model_map, job.overrides))
        return Located(output, model_map.notes)

    def plan(self, run: Run, evidence: Evidence | None, importance: ImportanceMatrix | None) -> Planned[Plan]:
        job, record = run.job, blank_record(run.job, run.checkpoint, run.model_map)
        plan = assign(
            job.profile,
            run.model_map,
            job.overrides,
            job.effort,
            evidence,
            importance.names if importance is not None else (),
            lambda candidate: counted_bytes(run, candidate, importance, record),
        )
        refuse_protection(job.protection, plan)
        refuse_starved(plan, importance)
        takes = any(map(wants_feedback, plan.tensors))
        plan = as_encoded(job, plan, record)
        return Planned(
            plan,
            (
                *fallback_lines(plan),
                *unscaled_lines(plan),
                *mtp_lines(plan),
                *protection_notes(job.protection, plan),
                *feedback_notes(run, plan, "every matrix of this plan has a format of 8 bits or more", takes),
            ),
            needs_statistics=plan.uses_importance,
            reads_text_later=looks_for_super_weights(job.protection, plan)
            or (plan.error_feedback is not None and given_moments(job) is None),
        )

    def files(self, run: Run, plan: Plan | None = None, importance: ImportanceMatrix | None = None) -> Files:
        if plan is None:
            return Files(outputs=(run.output, *_shards(run.output)))
        layouts = gguf_layouts(run, plan, importance)
        outputs = tuple(run.output.with_name(layout.file_name) for layout in layouts)
        return Files(tuple(layouts), outputs, growing=tuple(map(partial_path, outputs)))

    def calibrate(self, run: Run, plan: Plan | None) -> ImportanceMatrix:
        """The importance matrix, and the second moments of the same inputs where feedback is wanted."""
        return streamed_importance(run, moments_dir(run, plan))

    def adapt(self, prepared: Prepared[Plan]) -> Adapted[Plan, Protected]:
        """Super weights are looked for and protected, and the channels of all other matrices folded."""
        protected = protect(prepared.run, prepared.plan, prepared.importance)
        decisions = tuple(asdict(decision) for decision in protected.decisions)
        adapted = _with(prepared, protected)
        if not adapted.plan.folding or adapted.importance is None:
            return Adapted(adapted, decisions, protected, {})
        equalised = equalise(adapted.run, adapted.plan, adapted.importance, _special(protected))
        return Adapted(_folded(adapted, equalised), decisions, protected, {}, (equalised.note(),))

    def adapted_before(self, prepared: Prepared[Plan]) -> Prepared[Plan] | None:
        protected = protected_before(prepared.run, prepared.plan, prepared.importance)
        adapted = None if protected is None else _with(prepared, protected)
        if adapted is None or not adapted.plan.folding or adapted.importance is None:
            return adapted
        equalised = equalised_before(adapted.run, adapted.importance)
        return None if equalised is None else _folded(adapted, equalised)

    def encoder(self, adapted: Adapted[Plan, Protected]) -> "ReusingEncoder | SequencedEncoder[PlannedTensor]":
        prepared, run = adapted.prepared, adapted.prepared.run
        plan, importance, threads = prepared.plan, prepared.importance, run.job.n_threads
        _check_size(plan, prepared.files.layouts)
        if not encodes_in_sequence(run.job, plan):
            feedback = open_feedback(run, plan)
            return ReusingEncoder(Encoder(run.checkpoint, plan, importance, threads, feedback), run)
        from bitwright.converter.gguf.sequence.layers import TensorLayers
        from bitwright.converter.sequence.encoding import SequencedEncoder, encode_in_sequence

        encoder = Encoder(run.checkpoint, plan, importance, threads)
        return SequencedEncoder(encoder, encode_in_sequence(prepared, TensorLayers(prepared)))

    def write(self, adapted: Adapted[Plan, Protected], encoder: PlanEncoder[PlannedTensor]) -> list[Path]:
        run, layouts = adapted.prepared.run, adapted.prepared.files.layouts
        replaceable = Replaceable(run.work_dir / REPLACEABLE)
        writer = ArtifactWriter(encoder, layouts, run.output.parent, run.work_dir / JOURNAL, replaceable)
        return writer.write(run.progress, run.should_stop)

    def verify(
        self, adapted: Adapted[Plan, Protected], paths: list[Path]
    ) -> tuple[list[TensorError], dict[str, Any] | None]:
        run = adapted.prepared.run
        errors = verify(
            paths, run.checkpoint, run.model_map, adapted.prepared.importance, run.progress, run.job.n_threads
        )
        return errors, gguf_coverage(adapted.findings.report, paths, run.model_map, run.job.protection.tolerance)

    def complete(self, adapted: Adapted[Plan, Protected], paths: list[Path]) -> list[Path]:
        return paths  # every file has got its name when it was whole

    def hashes(self, adapted: Adapted[Plan, Protected], paths: list[Path]) -> dict[Path, str]:
        layouts, journal = adapted.prepared.files.layouts, adapted.prepared.run.work_dir / JOURNAL
        return {path: written_sha256(path, layout, journal) for path, layout in zip(paths, layouts, strict=True)}

    def candidate(self, adapted: Adapted[Plan, Protected], paths: list[Path]) -> Candidate:
        run = adapted.prepared.run
        _, model_map = runnable(run.checkpoint, run.model_map, run.work_dir)
        return gguf_candidate(paths, model_map, adapted.prepared.run.job.n_threads)

    def uniform_sizes(self, prepared: Prepared[Plan]) -> list[dict[str, Any]]:
        return uniform_sizes(prepared.run.model_map)


def _shards(output: Path) -> list[Path]:
    """The shards of this artifact that are there, of any number of them."""
    if not output.parent.is_dir():
        return []
    shard = re.compile(re.escape(output.stem) + r"-\d{5}-of-\d{5}\.gguf")
    return sorted(path for path in output.parent.iterdir() if shard.fullmatch(path.name))


def _with(prepared: Prepared[Plan], protected: Protected) -> Prepared[Plan]:
    """The job as its super weights are protected."""
    return replace(prepared, run=replace(prepared.run, model_map=protected.model_map), plan=protected.plan)


def _special(protected: Protected) -> set[str]:
    """The tensors that super weights lie in: what is known of these is of the source's own columns."""
    return set() if protected.report is None else {weight.tensor for weight in protected.report.weights}


def _folded(prepared: Prepared[Plan], equalised: Equalised) -> Prepared[Plan]:
    """The job with its channels folded: the weights that are encoded, and the importance of their inputs."""
    return replace(
        prepared,
        run=replace(prepared.run, checkpoint=equalised.checkpoint),
        plan=replace(prepared.plan, folding=equalised.record),
        importance=equalised.importance,
    )


def _check_size(plan: Plan, layouts: Sequence[Layout]) -> None:
    """A size that was asked for holds for the whole artifact, with the record of what protects super weights."""
    n_bytes = sum(layout.n_bytes for layout in layouts)
    if plan.spent is not None and plan.spent.budget.size is not None and n_bytes > plan.spent.budget.size:
        raise ConvertError(
            f"with the record of its super weights the artifact takes {n_bytes} bytes, more than the"
            f" {plan.spent.budget.size} of its budget",
            plan.spent.budget.where,
            "raise the size a little, or use --protect-super-weights off",
        )


def refuse_starved(plan: Plan, importance: ImportanceMatrix | None) -> None:
    """Raises ConvertError for a tensor of the layers that predict several tokens in a format that needs importance,
    where none is given: calibration runs the model without these layers."""
    names = importance.names if importance is not None else ()
    for planned in plan.tensors:
        if planned.tensor.role is Role.MTP and planned.needs_importance and planned.tensor.name not in names:
            raise ConvertError(
                f"{planned.format} cannot be encoded without importance, and none is measured of the layers that"
                " predict several tokens (MTP)",
                f"tensor {planned.tensor.name}",
                "take a format that needs none (--set 'mtp=Q4_K'), or leave these layers out: --mtp drop",
            )


def _refuse_options(job: Job) -> None:
    """Options that say something of a directory, for a profile that makes a GGUF; and what contradicts each other."""
    refuse_with_sequence(job)
    options = {
        "--alpha": job.alpha,
        "--activation-scales": job.activation_scales,
        "--tensor-parallel": job.tensor_parallel,
    }
    given = ", ".join(option for option, value in options.items() if value is not None)
    if given:
        raise ConvertError(
            f"the profile {job.profile.name!r} writes a GGUF for llama.cpp, and that is for a directory for vLLM",
            given,
            "leave it out, or name a profile for a safetensors directory, see `bitwright profiles list`",
        )
