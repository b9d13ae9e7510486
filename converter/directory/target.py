"""A safetensors directory of compressed-tensors schemes as the artifact of a conversion, for vLLM and transformers."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bitwright.calibration.control import never
from bitwright.calibration.statistics.imatrix_file import load_imatrix, save_imatrix
from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.calibration.statistics.super_weights import SuperWeightReport
from bitwright.converter.architectures.architecture import known_architecture
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.feedback import feedback_notes
from bitwright.converter.artifact.layout import Files, partial_path
from bitwright.converter.artifact.naming import directory_name
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.target import Adapted, Located, Planned, Prepared
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.artifact.writer import PlanEncoder
from bitwright.converter.directory.activations import (
    adapt_activations,
    looks_at_activations,
    smoothing_of,
    uses_activations,
)
from bitwright.converter.directory.artifact import DirectoryArtifact
from bitwright.converter.directory.config import quantization_config, stored_dtype
from bitwright.converter.directory.encode import ModuleEncoder, StoredScales
from bitwright.converter.directory.files import (
    companions,
    complete_directory,
    write_directory,
    written_hashes,
)
from bitwright.converter.directory.keep_out import directory_coverage, keep_out, keeps_out, refuse_other_ways
from bitwright.converter.directory.kv_cache import cache_lines
from bitwright.converter.directory.layout import directory_layouts
from bitwright.converter.directory.products import directory_candidate
from bitwright.converter.directory.verify import verify_directory
from bitwright.converter.job.job import Job
from bitwright.converter.job.kept import kept
from bitwright.converter.job.recipe import IMPORTANCE_FILE, recipe
from bitwright.converter.measure.activations import streamed_activations
from bitwright.converter.measure.calibrate import streamed_importance
from bitwright.converter.measure.moments import collects_moments, moments_dir, open_feedback
from bitwright.converter.measure.obstacles import obstacle
from bitwright.converter.measure.statistics_directory import given_moments
from bitwright.converter.model.module_map import (
    describe_for_directory,
    describe_modules,
    gguf_names,
    stored_dtypes,
)
from bitwright.converter.sequence.options import asked_by, encodes_in_sequence, refuse_with_sequence
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.schemes.registry import SCHEMES
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.plan_modules import (
    ModulePlan,
    PlannedModule,
    plan_modules,
    repair_lines,
)
from bitwright.profiles.planning.tensor_parallel import Heads, check_tensor_parallel, unchecked_roles
from bitwright.profiles.reading.schema import QuantizationProfile
from bitwright.profiles.vocabulary import EXPERT_ROLES, ModelMap, Role

if TYPE_CHECKING:
    from bitwright.converter.sequence.encoding import SequencedEncoder


class Findings(NamedTuple):
    """super_weights: what is known of them, None where nobody looked. scales: what is stored of inputs and caches."""

    super_weights: SuperWeightReport | None
    scales: StoredScales


class DirectoryTarget:
    def describe(self, job: Job, checkpoint: Checkpoint) -> ModelMap:
        return describe_for_directory(checkpoint, job.pre_tokenizer)

    def located(self, job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Located:
        _refuse_options(job)
        companions(checkpoint.location)  # a link that will not be followed is said before the work
        name = directory_name(checkpoint, model_map, job.profile)
        return Located(job.output or Path(name), model_map.source_notes)

    def plan(self, run: Run, evidence: Evidence | None, importance: ImportanceMatrix | None) -> Planned[ModulePlan]:
        job, dtypes = run.job, stored_dtypes(run.checkpoint)
        _check_smoothing(run)
        modules = describe_modules(run.checkpoint, run.model_map)
        plan = plan_modules(job.profile, modules, dtypes, job.overrides, job.effort)
        if all(row.scheme is None for row in plan.tensors):
            raise ConvertError(
                "the plan quantizes nothing: it would copy the checkpoint",
                f"--profile {job.profile.name}",
                "choose a scheme for some role: --set 'mlp_*=W8A8'",
            )
        unseen = obstacle(run.checkpoint) if plan.uses_importance and job.imatrix is None else None
        takes = any(map(_takes_feedback, plan.tensors))
        _check_sequence(job, plan, takes)
        asked = job.feedback_is_asked_for or job.in_sequence
        if not asked:  # what 8 bits gain is not worth it, nor a pass over the model of its own
            takes = unseen is None and any(map(_is_coarse, plan.tensors))
        passes = asked or not uses_activations(job, plan) or given_moments(job) is not None
        plan = replace(plan, error_feedback=job.feedback if takes and passes else None)
        return Planned(
            plan,
            (
                *_shard_lines(run, plan),
                *repair_lines(plan),
                *cache_lines(plan),
                *_runtime_notes(plan),
                *_kept_lines(run.model_map, modules),
                *_copied_lines(run.model_map, modules),
                *_dense_lines(run.checkpoint),
                *_unseen_lines(job, plan),
                *feedback_notes(run, plan, "no matrix of this plan has integer or FP4 weights", takes),
                *_untuned_lines(job, plan),
                *([] if unseen is None else [f"{unseen}: the weights are rounded without importance"]),
            ),
            needs_statistics=(plan.uses_importance and unseen is None) or uses_activations(job, plan),
            reads_text_later=keeps_out(job)
            or looks_at_activations(job, plan)
            or (plan.error_feedback is not None and given_moments(job) is None),
        )

    def files(self, run: Run, plan: ModulePlan | None = None, importance: ImportanceMatrix | None = None) -> Files:
        if plan is None:
            return Files(outputs=(run.output,), is_directory=True)
        layouts, directory = directory_layouts(plan, run.job.shard_bytes), partial_path(run.output)
        paths = [directory / layout.file_name for layout in layouts]
        return Files(tuple(layouts), (run.output,), (*paths, *map(partial_path, paths)), is_directory=True)

    def calibrate(self, run: Run, plan: ModulePlan | None) -> ImportanceMatrix:
        """Importance, out of the activation statistics where these are needed, too: one pass serves both. Second
        moments where feedback is wanted take a pass of their own then."""
        if plan is None or collects_moments(run, plan) or not uses_activations(run.job, plan):
            return streamed_importance(run, moments_dir(run, plan))
        path = run.work_dir / IMPORTANCE_FILE
        return kept(
            path,
            "importance matrix",
            run.progress,
            lambda: streamed_activations(run).importance(),
            save_imatrix,
            load_imatrix,
        )

    def adapt(self, prepared: Prepared[ModulePlan]) -> Adapted[ModulePlan, Findings]:
        kept_out = keep_out(prepared)
        prepared, activations = adapt_activations(kept_out.prepared)
        _shard_lines(prepared.run, prepared.plan)  # other schemes than those that were planned
        findings = Findings(kept_out.report, activations.scales)
        return Adapted(prepared, kept_out.decisions, findings, activations.report, activations.notes)

    def adapted_before(self, prepared: Prepared[ModulePlan]) -> Prepared[ModulePlan]:
        run = replace(prepared.run, should_stop=never)
        return self.adapt(replace(prepared, run=run)).prepared

    def encoder(self, adapted: Adapted[ModulePlan, Findings]) -> "ModuleEncoder | SequencedEncoder[PlannedModule]":
        prepared, run, plan = adapted.prepared, adapted.prepared.run, adapted.prepared.plan
        names, scales, threads = gguf_names(run.model_map), adapted.findings.scales, run.job.n_threads
        encoder = ModuleEncoder(run.checkpoint, plan, prepared.importance, names, scales, threads)
        if not encodes_in_sequence(run.job, plan):
            encoder.feedback = open_feedback(run, plan)
            return encoder
        from bitwright.converter.directory.sequence.layers import ModuleLayers
        from bitwright.converter.sequence.encoding import SequencedEncoder, encode_in_sequence

        return SequencedEncoder(encoder, encode_in_sequence(prepared, ModuleLayers(prepared, scales)))

    def write(self, adapted: Adapted[ModulePlan, Findings], encoder: PlanEncoder[PlannedModule]) -> list[Path]:
        run, plan = adapted.prepared.run, adapted.prepared.plan
        stated = {"dtype": stored_dtype(plan), "quantization_config": quantization_config(plan)}
        layouts = directory_layouts(plan, run.job.shard_bytes)
        return write_directory(run, encoder, layouts, stated, _description(adapted.prepared))

    def verify(
        self, adapted: Adapted[ModulePlan, Findings], paths: list[Path]
    ) -> tuple[list[TensorError], dict[str, Any] | None]:
        prepared, run, directory = adapted.prepared, adapted.prepared.run, paths[0].parent
        artifact = DirectoryArtifact.of_plan(directory, prepared.plan)
        names = gguf_names(run.model_map)
        errors = verify_directory(
            directory, artifact, run.checkpoint, prepared.importance, names, run.progress, run.job.n_threads
        )
        return errors, directory_coverage(adapted.findings.super_weights, artifact, run)

    def complete(self, adapted: Adapted[ModulePlan, Findings], paths: list[Path]) -> list[Path]:
        return complete_directory(adapted.prepared.run)

    def hashes(self, adapted: Adapted[ModulePlan, Findings], paths: list[Path]) -> dict[Path, str]:
        prepared, run = adapted.prepared, adapted.prepared.run
        layouts = directory_layouts(prepared.plan, run.job.shard_bytes)
        return written_hashes(run, layouts, _description(prepared))

    def candidate(self, adapted: Adapted[ModulePlan, Findings], paths: list[Path]) -> Candidate:
        return directory_candidate(DirectoryArtifact.of_plan(paths[0].parent, adapted.prepared.plan))

    def uniform_sizes(self, prepared: Prepared[ModulePlan]) -> list[dict[str, Any]]:
        """Of the schemes: what does not fit becomes what a plan would make of it."""
        dtypes = stored_dtypes(prepared.run.checkpoint)
        # The plan's own, as finding out what transformers makes of a model takes building it.
        modules = replace(prepared.run.model_map, tensors=tuple(row.tensor for row in prepared.plan.tensors))
        rows = []
        for name in SCHEMES:
            profile = QuantizationProfile(name, "", "", name, (), "", target="safetensors")
            plan = plan_modules(profile, modules, dtypes)
            matrices = [row for row in plan.tensors if row.tensor.quantizable and row.tensor.layer is not None]
            n_fitting = sum(row.tensor.n_weights for row in matrices if row.format == name)
            n_weights = sum(row.tensor.n_weights for row in matrices)
            rows.append({"format": name, "bytes": plan.n_bytes, "fits": n_fitting / n_weights if n_weights else 0.0})
        return rows


def _description(prepared: Prepared[ModulePlan]) -> dict[str, Any]:
    """What the directory says of its making, beside the hashes of its files."""
    run, plan = prepared.run, prepared.plan
    tensors = [
        {"tensor": row.tensor.name, "format": row.format, "shape": list(row.tensor.shape)}
        | ({"cache_scales": list(row.cache_scales)} if row.cache_scales else {})
        for row in plan.tensors
    ]
    return {"recipe": recipe(run.job, run.checkpoint, plan, prepared.importance), "tensors": tensors}


def _takes_feedback(row: PlannedModule) -> bool:
    return row.scheme is not None and row.scheme.takes_feedback


def _is_coarse(row: PlannedModule) -> bool:
    return row.scheme is not None and row.scheme.takes_feedback and row.scheme.weights.num_bits < 8


def _check_sequence(job: Job, plan: ModulePlan, takes: bool) -> None:
    """Raises ConvertError for layers in sequence where nothing is chosen by their inputs, or can be tuned. takes: some
    matrix of the plan takes feedback."""
    if job.in_sequence and not takes:
        raise ConvertError(
            "no weight of this plan depends on the inputs of its layer: FP8 is rounded one by one",
            asked_by(job),
            "leave it out, or give some role integer or FP4 weights: --set 'mlp_*=W4A16'",
        )
    if job.tune and not any(row.scheme is not None and row.scheme.is_tunable for row in plan.tensors):
        raise ConvertError(
            "no weight of this plan can be tuned: steps of 8 bits are too fine for it",
            f"--tune {job.tune}",
            "use --sequential instead, or give some role weights of 4 bits: --set 'mlp_*=W4A16'",
        )


def _untuned_lines(job: Job, plan: ModulePlan) -> list[str]:
    """What tuning leaves as it is."""
    schemes = [row.scheme for row in plan.tensors if row.scheme is not None]
    left = [scheme.name for scheme in schemes if not scheme.is_tunable]
    if not job.tune or not left:
        return []
    names = ", ".join(sorted(set(left)))
    return [f"--tune leaves {len(left)} of {len(schemes)} quantized matrices as they are: {names}"]


def _shard_lines(run: Run, plan: ModulePlan) -> list[str]:
    """What of the plan is held against the GPUs that it is cut over, where the job says how many there are. Raises
    ConvertError as check_tensor_parallel does."""
    n_gpus = run.job.tensor_parallel
    if n_gpus is None:
        return []
    check_tensor_parallel(plan, _heads(run), n_gpus)
    unchecked = unchecked_roles(plan)
    but = f"; how it cuts {', '.join(unchecked)} is not checked" if unchecked else ""
    return [f"vLLM can cut this plan over {n_gpus} GPUs: heads, rows and groups divide{but}"]


def _heads(run: Run) -> Heads:
    """By the keys of a GGUF where there are some, else by those of config.json."""

    def counts(key: str, own: str) -> tuple[int, ...]:
        stated = run.model_map.metadata.get(f"{run.model_map.architecture}.attention.{key}")
        value = stated.value if stated is not None else run.checkpoint.config.get(own)
        return tuple(n for n in (value if isinstance(value, list) else [value]) if n)

    queries = counts("head_count", "num_attention_heads")
    return Heads(queries, counts("head_count_kv", "num_key_value_heads") or queries)


def _runtime_notes(plan: ModulePlan) -> list[str]:
    """What a runtime does not read, or not by itself."""
    schemes = [(row.tensor.role, row.scheme) for row in plan.tensors if row.scheme is not None]
    notes = []
    if any(scheme.format == "int-quantized" for role, scheme in schemes if role in EXPERT_ROLES):
        notes.append("transformers reads no INT8 experts with rounded inputs, vLLM does; FP8 and W4A16 load in both")
    asymmetric = sorted({scheme.name for _, scheme in schemes if not scheme.weights.symmetric})
    if asymmetric:
        how = "quantization_config=CompressedTensorsConfig(dequantize=True)"
        notes.append(f"transformers loads {', '.join(asymmetric)} with {how} only; vLLM as it is")
    return notes


def _kept_lines(model_map: ModelMap, modules: ModelMap) -> list[str]:
    """Matrices of a GGUF that a directory has to keep."""
    matrices = {source for tensor in model_map.tensors if tensor.quantizable for source in tensor.sources}
    kept = [tensor.name for tensor in modules.tensors if tensor.role is Role.OTHER and tensor.name in matrices]
    if not kept:
        return []
    what = "tensors are" if len(kept) > 1 else "tensor is"
    return [
        f"{len(kept)} {what} kept, the first {kept[0]}: transformers has in no linear module what schemes are read for"
    ]


def _copied_lines(model_map: ModelMap, modules: ModelMap) -> list[str]:
    """What of the checkpoint the text model does without."""
    own = {source for tensor in model_map.tensors for source in tensor.sources}
    copied = [tensor.name for tensor in modules.tensors if tensor.name not in own]
    if not copied:
        return []
    return [f"{len(copied)} tensors beside the text model, the first {copied[0]}, are copied as they are"]


def _dense_lines(checkpoint: Checkpoint) -> list[str]:
    """What modules.json, which is copied, names and no conversion reads."""
    if not checkpoint.config.get("dense_layers"):
        return []
    return [
        "modules.json names layers after the pooling (Dense), which are no part of this directory: copy their folders"
        " from the source, or vectors are those before them"
    ]


def _unseen_lines(job: Job, plan: ModulePlan) -> list[str]:
    """Schemes that would fall back if anything had to be known of the inputs that they round."""
    if not job.profile.activations.adapt or uses_activations(job, plan):
        return []
    schemes = {row.format: row.scheme for row in plan.tensors if row.scheme is not None}
    rounding = sorted(name for name, scheme in schemes.items() if scheme.activations is not None)
    if not rounding:
        return []
    why = "every scale is measured at run time, so inputs are not looked at and none falls back"
    return [f"{', '.join(rounding)}: {why}; smooth (--alpha 0.5) to have them looked at"]


def _check_smoothing(run: Run) -> None:
    """Raises ConvertError where outliers are to be moved, and no data file says between which matrices."""
    architecture = known_architecture(run.checkpoint.config)
    if smoothing_of(run.job) is None or (architecture is not None and architecture.feeds):
        return
    raise ConvertError(
        f"the profile {run.job.profile.name!r} moves outliers of inputs into weights, and no data file says what feeds"
        f" the matrices of the architecture {run.checkpoint.config.get('model_type')!r}",
        "--alpha" if run.job.alpha is not None else f"--profile {run.job.profile.name}",
        "take a profile that smooths nothing: fp8, or W8A8; `bitwright architectures` tells what works for which",
    )


def _refuse_options(job: Job) -> None:
    """Options that say something of a GGUF, for a profile that makes a directory; and what contradicts each other."""
    refuse_other_ways(job)
    refuse_with_sequence(job)
    refused = {
        "--output": job.output is not None and job.output.suffix == ".gguf",
        "--sensitivity": job.sensitivity is not None,
        "--lm-eval": bool(job.lm_eval),
        "--mtp drop": job.mtp == "drop",
    }
    for option, given in refused.items():
        if given:
            raise ConvertError(
                f"{option} is for a GGUF, and the profile {job.profile.name!r} makes a safetensors directory",
                option,
                "leave it out, or name a profile whose target is a GGUF; `bitwright profiles list` tells",
            )
