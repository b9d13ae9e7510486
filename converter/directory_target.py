"""A safetensors directory of compressed-tensors schemes as the artifact of a conversion, for vLLM and transformers."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from calibration.control import ShouldStop, never
from calibration.imatrix_file import load_imatrix, save_imatrix
from calibration.importance import ImportanceMatrix
from converter.adapt_activations import ActivationFindings, adapt_activations, smoothing_of, uses_activations
from converter.artifact import file_name
from converter.calibrate import MOMENTS, calibrate
from converter.checkpoint import Checkpoint
from converter.directory import (
    companions,
    complete_directory,
    partial_directory,
    write_directory,
    written_hashes,
)
from converter.directory_artifact import DirectoryArtifact
from converter.directory_verify import verify_directory
from converter.encode_modules import ModuleEncoder
from converter.feedback import Feedback, feedback_notes, feedback_report
from converter.job import Job, default_work_dir
from converter.keep_out import KeptOut, directory_coverage, keep_out, keeps_out, refuse_other_ways
from converter.kept import kept
from converter.kv_cache import cache_lines
from converter.modules import describe_modules, directory_name, gguf_names, stored_dtypes
from converter.progress import Progress
from converter.quantization_config import quantization_config, stored_dtype
from converter.recipe import IMPORTANCE_FILE, recipe
from converter.safetensors_layout import directory_layouts
from converter.scheme_products import SchemeProducts
from converter.smooth import SMOOTHING_FILE, observe
from converter.smoothing_file import load_smoothing
from converter.target import Adapted, Candidate, Layout, Prepared, Surveyed
from converter.verify import TensorError
from converter.write import partial_path
from formats.errors import ConvertError
from formats.files import remove_tree
from formats.schemes import SCHEMES
from profiles.evidence import Evidence
from profiles.modules import EXPERT_ROLES, PlannedModule, plan_modules, repair_lines
from profiles.plan import Plan, PlannedTensor
from profiles.schema import QuantizationProfile
from profiles.vocabulary import ModelMap


class Findings(NamedTuple):
    kept: KeptOut
    activations: ActivationFindings


class DirectoryTarget:
    is_directory = True

    def located(self, job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Job:
        _refuse_options(job)
        companions(checkpoint.location)  # a link that will not be followed is said before the work
        metadata = {key: entry.value for key, entry in model_map.metadata.items()}
        name = file_name(metadata, checkpoint.model_id.rpartition("/")[2], job.profile.label)
        output = job.output or Path(directory_name(name))
        return replace(job, output=output, work_dir=job.work_dir or default_work_dir(output))

    def plan(self, surveyed: Surveyed, evidence: Evidence | None, importance: ImportanceMatrix | None) -> Plan:
        job, checkpoint = surveyed.job, surveyed.checkpoint
        modules = describe_modules(checkpoint, surveyed.model_map)
        plan = plan_modules(job.profile, modules, stored_dtypes(checkpoint), job.overrides, job.effort)
        if not any(isinstance(row, PlannedModule) and row.scheme for row in plan.tensors):
            raise ConvertError(
                "the plan quantizes nothing: it would copy the checkpoint",
                f"--profile {job.profile.name}",
                "choose a scheme for some role: --set 'mlp_*=W8A8'",
            )
        return replace(plan, error_feedback=job.error_feedback and any(map(_takes_feedback, plan.tensors)))

    def plan_of(self, profile: QuantizationProfile, surveyed: Surveyed) -> Plan:
        modules = describe_modules(surveyed.checkpoint, surveyed.model_map)
        return plan_modules(profile, modules, stored_dtypes(surveyed.checkpoint))

    def notes(self, job: Job, plan: Plan) -> list[str]:
        why = "no matrix of this plan has integer or FP4 weights"
        notes = [*repair_lines(plan), *cache_lines(plan), *_runtime_notes(plan), *_unseen_lines(job, plan)]
        return [*notes, *feedback_notes(job, plan, why)]

    def needs_statistics(self, job: Job, plan: Plan) -> bool:
        return plan.uses_importance or uses_activations(job, plan)

    def reads_text_later(self, job: Job, plan: Plan) -> bool:
        return uses_activations(job, plan) or keeps_out(job) or plan.error_feedback

    def layouts(self, surveyed: Surveyed, plan: Plan, importance: ImportanceMatrix | None) -> list[Layout]:
        return [*directory_layouts(plan, surveyed.job.shard_bytes)]

    def outputs(self, job: Job, layouts: Sequence[Layout]) -> list[Path]:
        assert job.output is not None
        return [job.output]

    def partial_files(self, job: Job, layouts: Sequence[Layout]) -> list[Path]:
        assert job.output is not None
        directory = partial_directory(job.output)
        paths = [directory / layout.file_name for layout in layouts]
        return [*paths, *map(partial_path, paths)]

    def calibrate(
        self, prepared: Surveyed, work_dir: Path, progress: Progress, should_stop: ShouldStop
    ) -> ImportanceMatrix:
        """Importance, out of the activation statistics where these are needed, too: one pass serves both. Second
        moments where feedback is wanted take a pass of their own then."""
        job, checkpoint, model_map = prepared.job, prepared.checkpoint, prepared.model_map
        if prepared.feeds_back or not (isinstance(prepared, Prepared) and uses_activations(job, prepared.plan)):
            moments_dir = work_dir / MOMENTS if prepared.feeds_back else None
            return calibrate(job, checkpoint, model_map, work_dir, progress, should_stop, moments_dir)

        def compute() -> ImportanceMatrix:
            return observe(job, checkpoint, model_map, work_dir, progress, should_stop).importance()

        return kept(work_dir / IMPORTANCE_FILE, "importance matrix", progress, compute, save_imatrix, load_imatrix)

    def adapt(
        self,
        prepared: Prepared,
        importance: ImportanceMatrix | None,
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> Adapted:
        if prepared.feeds_back and prepared.job.imatrix is not None:
            self.calibrate(prepared, work_dir, progress, should_stop)
        kept = keep_out(prepared, importance, work_dir, progress, should_stop)
        adapted = adapt_activations(kept.prepared, importance, work_dir, progress, should_stop)
        notes = tuple(f"{decision['tensor']}: {decision['why']}" for decision in kept.decisions)
        return replace(adapted, found=Findings(kept, adapted.found), notes=(*notes, *adapted.notes))

    def adapted_before(self, prepared: Prepared, progress: Progress) -> Prepared:
        assert prepared.job.work_dir is not None
        return self.adapt(prepared, prepared.importance, prepared.job.work_dir, progress, never).prepared

    def write(
        self,
        adapted: Adapted,
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> list[Path]:
        prepared, plan, importance = adapted.prepared, adapted.prepared.plan, adapted.importance
        assert prepared.job.output is not None
        names = gguf_names(prepared.model_map)
        found = adapted.found.activations
        ranges, scales = found.ranges, {scale.name: scale.bits for scale in found.caches}
        feedback = Feedback(work_dir / MOMENTS, prepared.job.effort) if plan.error_feedback else None
        smooths = feedback is not None and smoothing_of(prepared.job) is not None
        factors = load_smoothing(work_dir / SMOOTHING_FILE).factors if smooths else None
        with ModuleEncoder(
            prepared.checkpoint,
            plan,
            importance,
            names,
            ranges,
            scales,
            prepared.job.n_threads,
            feedback,
            factors,
        ) as encoder:
            paths = write_directory(
                prepared.job.output,
                encoder,
                directory_layouts(plan, prepared.job.shard_bytes),
                prepared.checkpoint,
                {"dtype": stored_dtype(plan), "quantization_config": quantization_config(plan)},
                _description(adapted),
                work_dir,
                progress,
                should_stop,
            )
        remove_tree(work_dir / MOMENTS)
        return paths

    def verify(
        self, adapted: Adapted, paths: list[Path], progress: Progress
    ) -> tuple[list[TensorError], dict[str, Any]]:
        prepared = adapted.prepared
        artifact = DirectoryArtifact.of_plan(paths[0].parent, prepared.plan)
        errors = verify_directory(
            paths[0].parent, artifact, prepared.checkpoint, adapted.importance, gguf_names(prepared.model_map), progress
        )
        kept, tolerance = adapted.found.kept, prepared.job.protection.tolerance
        covered = directory_coverage(kept.report, artifact, prepared.checkpoint, prepared.model_map, tolerance)
        feedback = feedback_report(prepared.job, prepared.plan)
        found = {"super_weight_coverage": covered, "protection": kept.decisions, "feedback": feedback}
        return errors, found | adapted.found.activations.report

    def complete(self, adapted: Adapted, paths: list[Path]) -> list[Path]:
        job = adapted.prepared.job
        assert job.output is not None and job.work_dir is not None
        return complete_directory(job.output, job.work_dir)

    def hashes(self, adapted: Adapted, paths: list[Path], work_dir: Path) -> dict[Path, str]:
        job = adapted.prepared.job
        assert job.output is not None
        layouts = directory_layouts(adapted.prepared.plan, job.shard_bytes)
        return written_hashes(job.output, layouts, _description(adapted), work_dir)

    def candidate(self, adapted: Adapted, paths: list[Path], work_dir: Path) -> Candidate:
        artifact = DirectoryArtifact.of_plan(paths[0].parent, adapted.prepared.plan)
        return Candidate(artifact, SchemeProducts(artifact), artifact.directory, artifact.unreadable)

    def uniform_sizes(self, surveyed: Surveyed) -> list[dict[str, Any]]:
        """Of the schemes: what does not fit becomes what a plan would make of it."""
        modules, dtypes = describe_modules(surveyed.checkpoint, surveyed.model_map), stored_dtypes(surveyed.checkpoint)
        rows = []
        for name in SCHEMES:
            profile = QuantizationProfile(name, "", "", name, (), "", target="safetensors")
            plan = plan_modules(profile, modules, dtypes)
            matrices = [row for row in plan.tensors if row.tensor.quantizable and row.tensor.layer is not None]
            n_fitting = sum(row.tensor.n_weights for row in matrices if row.format == name)
            n_weights = sum(row.tensor.n_weights for row in matrices)
            rows.append({"format": name, "bytes": plan.n_bytes, "fits": n_fitting / n_weights if n_weights else 0.0})
        return rows

    def weight_files(self, paths: list[Path]) -> list[Path]:
        return [path for path in paths if path.suffix == ".safetensors"]


def _description(adapted: Adapted) -> dict[str, Any]:
    """What the directory says of its making, beside the hashes of its files."""
    prepared, plan = adapted.prepared, adapted.prepared.plan
    tensors = [
        {"tensor": row.tensor.name, "format": row.format, "shape": list(row.tensor.shape)}
        | ({"cache_scales": list(row.cache_scales)} if row.cache_scales else {})
        for row in plan.tensors
    ]
    return {"recipe": recipe(prepared.job, prepared.checkpoint, plan, adapted.importance), "tensors": tensors}


def _takes_feedback(planned: PlannedTensor) -> bool:
    return isinstance(planned, PlannedModule) and planned.scheme is not None and planned.scheme.takes_feedback


def _runtime_notes(plan: Plan) -> list[str]:
    """What a runtime does not read, or not by itself."""
    schemes = [(row.tensor.role, row.scheme) for row in plan.tensors if isinstance(row, PlannedModule) and row.scheme]
    notes = []
    if any(scheme.format == "int-quantized" for role, scheme in schemes if role in EXPERT_ROLES):
        notes.append("transformers reads no INT8 experts with rounded inputs, vLLM does; FP8 and W4A16 load in both")
    asymmetric = sorted({scheme.name for _, scheme in schemes if not scheme.weights.symmetric})
    if asymmetric:
        how = "quantization_config=CompressedTensorsConfig(dequantize=True)"
        notes.append(f"transformers loads {', '.join(asymmetric)} with {how} only; vLLM as it is")
    return notes


def _unseen_lines(job: Job, plan: Plan) -> list[str]:
    """Schemes that would fall back if anything had to be known of the inputs that they round."""
    if not job.profile.activations.adapt or uses_activations(job, plan):
        return []
    schemes = {row.format: row.scheme for row in plan.tensors if isinstance(row, PlannedModule) and row.scheme}
    rounding = sorted(name for name, scheme in schemes.items() if scheme.activations is not None)
    if not rounding:
        return []
    why = "every scale is measured at run time, so inputs are not looked at and none falls back"
    return [f"{', '.join(rounding)}: {why}; smooth (--alpha 0.5) to have them looked at"]


def _refuse_options(job: Job) -> None:
    """Options that say something of a GGUF, for a profile that makes a directory."""
    refuse_other_ways(job)
    refused = {
        "--output": job.output is not None and job.output.suffix == ".gguf",
        "--sensitivity": job.sensitivity is not None,
        "--lm-eval": bool(job.lm_eval),
    }
    for option, given in refused.items():
        if given:
            raise ConvertError(
                f"{option} is for a GGUF, and the profile {job.profile.name!r} makes a safetensors directory",
                option,
                "leave it out, or name a profile whose target is a GGUF; `convert profiles list` tells",
            )
