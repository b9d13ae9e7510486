"""A GGUF as the artifact of a conversion, for llama.cpp."""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from calibration.control import ShouldStop
from calibration.importance import ImportanceMatrix
from converter.artifact import artifact_layout, artifact_metadata, file_name
from converter.breakdown import uniform_sizes
from converter.calibrate import MOMENTS, calibrate, runnable
from converter.checkpoint import Checkpoint
from converter.encode import Encoder
from converter.feedback import Feedback, feedback_notes, feedback_report, wants_feedback
from converter.job import REPLACEABLE, Job
from converter.ownership import Replaceable
from converter.preflight import refuse_activation_options
from converter.progress import Progress
from converter.protect import protect, protected_before, protection_notes, refuse_protection
from converter.recipe import PROTECTION_RESERVE
from converter.report import fallback_lines, unscaled_lines
from converter.super_weights import super_weight_coverage
from converter.target import Adapted, Candidate, Layout, Prepared, Surveyed
from converter.verify import DecodedArtifact, TensorError, verify
from converter.write import JOURNAL, ArtifactWriter, partial_path, written_sha256
from formats.errors import ConvertError
from formats.files import remove_tree
from profiles.assign import assign
from profiles.evidence import Evidence
from profiles.plan import Plan
from profiles.schema import QuantizationProfile
from profiles.vocabulary import ModelMap


class GgufTarget:
    is_directory = False

    def located(self, job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Job:
        refuse_activation_options(job)
        metadata = {key: entry.value for key, entry in model_map.metadata.items()}
        return job.with_output(file_name(metadata, checkpoint.model_id.rpartition("/")[2], job.profile.label))

    def plan(self, surveyed: Surveyed, evidence: Evidence | None, importance: ImportanceMatrix | None) -> Plan:
        job = surveyed.job
        reserve = 0 if job.protection.super_weights == "off" else PROTECTION_RESERVE

        def file_bytes(plan: Plan) -> int:
            fed = replace(plan, error_feedback=job.error_feedback)
            return sum(layout.n_bytes for layout in self.layouts(surveyed, fed, importance)) + reserve

        plan = assign(
            job.profile,
            surveyed.model_map,
            job.overrides,
            job.effort,
            evidence,
            importance.names if importance is not None else (),
            file_bytes,
        )
        refuse_protection(job.protection, plan)
        return replace(plan, error_feedback=job.error_feedback and any(map(wants_feedback, plan.tensors)))

    def plan_of(self, profile: QuantizationProfile, surveyed: Surveyed) -> Plan:
        return assign(profile, surveyed.model_map)

    def notes(self, job: Job, plan: Plan) -> list[str]:
        why = "every matrix of this plan has a format of 8 bits or more"
        shortfalls = [*fallback_lines(plan), *unscaled_lines(plan)]
        return [*shortfalls, *protection_notes(job.protection, plan), *feedback_notes(job, plan, why)]

    def needs_statistics(self, job: Job, plan: Plan) -> bool:
        return plan.uses_importance

    def reads_text_later(self, job: Job, plan: Plan) -> bool:
        return job.protection.looks(plan) or plan.error_feedback

    def layouts(self, surveyed: Surveyed, plan: Plan, importance: ImportanceMatrix | None) -> list[Layout]:
        job = surveyed.job
        assert job.output is not None
        metadata = artifact_metadata(job, surveyed.checkpoint, surveyed.model_map, plan, importance)
        return [*artifact_layout(job.output.name, metadata, plan, job.shard_bytes)]

    def outputs(self, job: Job, layouts: Sequence[Layout]) -> list[Path]:
        assert job.output is not None
        paths = [job.output.with_name(layout.file_name) for layout in layouts]
        if paths or not job.output.parent.is_dir():
            return paths or [job.output]
        shard = re.compile(re.escape(job.output.stem) + r"-\d{5}-of-\d{5}\.gguf")
        return [job.output, *sorted(path for path in job.output.parent.iterdir() if shard.fullmatch(path.name))]

    def partial_files(self, job: Job, layouts: Sequence[Layout]) -> list[Path]:
        assert job.output is not None
        return [partial_path(job.output.with_name(layout.file_name)) for layout in layouts]

    def calibrate(
        self, prepared: Surveyed, work_dir: Path, progress: Progress, should_stop: ShouldStop
    ) -> ImportanceMatrix:
        """The importance matrix, and the second moments of the same inputs where feedback is wanted."""
        moments_dir = work_dir / MOMENTS if prepared.feeds_back else None
        job, checkpoint, model_map = prepared.job, prepared.checkpoint, prepared.model_map
        return calibrate(job, checkpoint, model_map, work_dir, progress, should_stop, moments_dir)

    def adapt(
        self,
        prepared: Prepared,
        importance: ImportanceMatrix | None,
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> Adapted:
        """Super weights are looked for and protected; where an importance matrix is given, and feedback is wanted all
        the same, the second moments are computed."""
        job, checkpoint, model_map = prepared.job, prepared.checkpoint, prepared.model_map
        if prepared.feeds_back and job.imatrix is not None:
            self.calibrate(prepared, work_dir, progress, should_stop)
        protected = protect(job, checkpoint, model_map, prepared.plan, importance, work_dir, progress, should_stop)
        notes = tuple(f"{decision.tensor}: {decision.why}" for decision in protected.decisions)
        return Adapted(
            replace(prepared, plan=protected.plan, model_map=protected.model_map), importance, protected, notes
        )

    def adapted_before(self, prepared: Prepared, progress: Progress) -> Prepared | None:
        done = protected_before(prepared.job, prepared.model_map, prepared.plan, prepared.importance)
        return None if done is None else replace(prepared, plan=done.plan, model_map=done.model_map)

    def write(
        self,
        adapted: Adapted,
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> list[Path]:
        prepared, job, importance = adapted.prepared, adapted.prepared.job, adapted.importance
        assert job.output is not None
        layouts = prepared.layouts(importance)
        _check_size(prepared.plan, layouts)
        feedback = Feedback(work_dir / MOMENTS, job.effort) if prepared.feeds_back else None
        with Encoder(prepared.checkpoint, prepared.plan, importance, job.n_threads, feedback) as encoder:
            replaceable = Replaceable(work_dir / REPLACEABLE)
            writer = ArtifactWriter(encoder, layouts, job.output.parent, work_dir / JOURNAL, replaceable)
            paths = writer.write(progress, should_stop)
        remove_tree(work_dir / MOMENTS)
        return paths

    def verify(
        self, adapted: Adapted, paths: list[Path], progress: Progress
    ) -> tuple[list[TensorError], dict[str, Any]]:
        prepared, protected = adapted.prepared, adapted.found
        errors = verify(paths, prepared.checkpoint, prepared.model_map, adapted.importance, progress)
        tolerance = prepared.job.protection.tolerance
        coverage = super_weight_coverage(protected.report, paths, prepared.model_map, tolerance)
        decisions = [asdict(decision) for decision in protected.decisions]
        feedback = feedback_report(prepared.job, prepared.plan)
        return errors, {"super_weight_coverage": coverage, "protection": decisions, "feedback": feedback}

    def complete(self, adapted: Adapted, paths: list[Path]) -> list[Path]:
        return paths  # every file has got its name when it was whole

    def hashes(self, adapted: Adapted, paths: list[Path], work_dir: Path) -> dict[Path, str]:
        layouts = adapted.prepared.layouts(adapted.importance)
        return {path: written_sha256(path, of, work_dir / JOURNAL) for path, of in zip(paths, layouts, strict=True)}

    def candidate(self, adapted: Adapted, paths: list[Path], work_dir: Path) -> Candidate:
        prepared = adapted.prepared
        _, model_map = runnable(prepared.checkpoint, prepared.model_map, work_dir)
        return Candidate(DecodedArtifact(paths, model_map), artifact=paths[0])

    def uniform_sizes(self, surveyed: Surveyed) -> list[dict[str, Any]]:
        return uniform_sizes(surveyed.model_map)

    def weight_files(self, paths: list[Path]) -> list[Path]:
        return paths


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
