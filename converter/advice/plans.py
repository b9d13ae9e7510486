"""What every profile would make of a model, to the byte: plans from headers and configuration, without calibration,
network or torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUFValueType
from gguf.gguf_writer import GGUFValue

from bitwright.calibration.control import never
from bitwright.converter.architectures.refusal import NotInLlamaCpp
from bitwright.converter.artifact.run import Run
from bitwright.converter.directory.layout import directory_layouts
from bitwright.converter.gguf.folding.equalise import foldable_groups
from bitwright.converter.gguf.folding.record import blank
from bitwright.converter.gguf.layout import as_encoded, counted_bytes, gguf_layouts
from bitwright.converter.job.build import build_job
from bitwright.converter.job.progress import Progress
from bitwright.converter.measure.calibrate import planned_importance
from bitwright.converter.measure.evidence import given_evidence
from bitwright.converter.model.model_map import describe
from bitwright.converter.model.module_map import describe_modules, stored_dtypes
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.converter.source.open import open_checkpoint
from bitwright.formats.errors import ConvertError
from bitwright.formats.files.gguf import key_value_bytes
from bitwright.profiles.advice.hardware import Runtime
from bitwright.profiles.advice.operators import Row
from bitwright.profiles.planning.assign import assign
from bitwright.profiles.planning.labels import sized_like_its_mix
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.planning.plan_modules import plan_modules
from bitwright.profiles.reading.activations import NO_CACHE_SCHEME
from bitwright.profiles.sizes import size_text
from bitwright.profiles.vocabulary import ModelMap, Role

# The text of a plan that is never carried out: the network is not asked what lies on it.
_TEXT = "embedded"
# The keys that a vocabulary is in begin so; what stands in for its lists is called that.
_VOCABULARY = "tokenizer.ggml."
_LARGEST_TOKENIZER = 12 << 20  # bytes of a file that is read in half a second
_BITS_16 = {"F16", "BF16"}


@dataclass(frozen=True)
class PricedPlan:
    """What a profile makes of the model. tensor_bytes: of all tensors, exact. file_bytes: with the headers, as
    `bitwright plan` states them; of a GGUF without the vocabulary where Source.without_vocabulary says why.
    formats: of the matrices in the layers, the most frequent first. kv: what the profile keeps keys and values in,
    None where it leaves them to the runtime. by_rules: measured sensitivity will choose the formats, within about
    these bytes."""

    profile: str
    runtime: Runtime
    plan: Plan
    tensor_bytes: int
    file_bytes: int
    rows: tuple[Row, ...]
    formats: tuple[str, ...]
    kv: str | None
    by_rules: bool

    @property
    def is_plain(self) -> bool:
        """Whether every matrix has 16 bits or more."""
        return set(self.formats) <= {*_BITS_16, "F32"}

    @property
    def bits_per_weight(self) -> float:
        return self.plan.bits_per_weight


@dataclass(frozen=True)
class Source:
    """The model that advice is asked for. model_map: without the lists of its vocabulary, which take vocabulary_bytes
    more than what stands in for them. without_vocabulary: why sizes of files are without it, None where they are
    not."""

    model: str
    checkpoint: Checkpoint
    model_map: ModelMap
    vocabulary_bytes: int
    without_vocabulary: str | None

    @classmethod
    def open(cls, model: str, from_quantized: bool = False, base: str | None = None) -> "Source":
        """Raises ConvertError for what is no model, and for an architecture without a data file, of which nothing here
        knows the attention."""
        checkpoint = open_checkpoint(model, metadata_only=True, from_quantized=from_quantized, base=base)
        try:
            described = _described(checkpoint)
        except NotInLlamaCpp as refusal:
            raise ConvertError(refusal.what, refusal.where, "nothing is advised for a model without a GGUF") from None
        return cls(model, checkpoint, *described)

    def price(self, profile: str, overrides: Sequence[str] = (), sensitivity: Path | None = None) -> PricedPlan:
        """What the profile makes of it. sensitivity: a table, by which it decides where it does by any. Raises
        ConvertError for a profile that cannot be planned: it needs a table, its formats do not fit, or the overrides
        match nothing."""
        options: dict[str, Any] = {"calibration": _TEXT, "sensitivity": sensitivity}
        job = build_job(self.model, profile, tuple(overrides), **options)
        job = replace(job, profile=sized_like_its_mix(job.profile, self.model_map))
        run = Run(job, Path("model.gguf"), Path("work"), self.checkpoint, self.model_map, Progress(quiet=True), never)
        return self._gguf(run) if job.profile.target == "gguf" else self._directory(run)

    def _gguf(self, run: Run) -> PricedPlan:
        job, evidence, by_rules = run.job, given_evidence(run), False
        record = self._record if job.folding else ""
        if job.profile.needs_sensitivity and evidence is None:
            if not job.profile.has_rules_instead:
                raise ConvertError(
                    "the profile decides by measured sensitivity, which has not been measured",
                    f"--profile {job.profile.name}",
                    f"bitwright imatrix --sensitivity --output FILE.gguf {self.model}, then --sensitivity",
                )
            by_rules = True
            job = replace(job, profile=job.profile.by_rules())
            run = replace(run, job=job)
        importance = planned_importance(run) if evidence is not None else None
        plan = assign(
            job.profile,
            run.model_map,
            job.overrides,
            job.effort,
            evidence,
            () if importance is None else importance.names,
            lambda candidate: counted_bytes(run, candidate, importance, record) + self.vocabulary_bytes,
        )
        plan = as_encoded(job, plan, record)
        if importance is None and plan.uses_importance:
            importance = planned_importance(run)
        file_bytes = sum(layout.n_bytes for layout in gguf_layouts(run, plan, importance)) + self.vocabulary_bytes
        rows = tuple(Row(row.tensor.role, row.tensor.n_weights, row.n_bytes, row.tensor.n_rows) for row in plan.tensors)
        return PricedPlan(
            job.profile.name, "llama.cpp", plan, plan.n_bytes, file_bytes, rows, _formats(plan), None, by_rules
        )

    def _directory(self, run: Run) -> PricedPlan:
        job, checkpoint = run.job, self.checkpoint
        if checkpoint.metadata is not None:
            raise ConvertError(
                "a directory is made from a Hugging Face checkpoint, and this is a GGUF", self.model, "name that one"
            )
        refuse_directory(checkpoint)
        modules = describe_modules(checkpoint, run.model_map, by_shape=True)
        plan = plan_modules(job.profile, modules, stored_dtypes(checkpoint), job.overrides, job.effort)
        text = {source for tensor in run.model_map.tensors for source in tensor.sources}
        rows = tuple(
            Row(
                row.tensor.role,
                row.tensor.n_weights,
                row.n_bytes,
                row.tensor.n_rows,
                kept_out=row.tensor.name not in text,
            )
            for row in plan.tensors
        )
        file_bytes = sum(layout.n_bytes for layout in directory_layouts(plan, None))
        cache = job.profile.activations.kv_cache
        kv = None if cache == NO_CACHE_SCHEME else cache
        return PricedPlan(job.profile.name, "vLLM", plan, plan.n_bytes, file_bytes, rows, _formats(plan), kv, False)

    @cached_property
    def _record(self) -> str:
        """As long as a GGUF's of the factors that its channels are folded with."""
        return blank(foldable_groups(self.checkpoint, self.model_map))

    @cached_property
    def plain_rows(self) -> tuple[Row, ...]:
        """The model's tensors in 16 bits: what a speed-up is over."""
        return tuple(
            Row(tensor.role, tensor.n_weights, 2 * tensor.n_weights, tensor.n_rows) for tensor in self.model_map.tensors
        )


def _described(checkpoint: Checkpoint) -> tuple[ModelMap, int, str | None]:
    """What Source has of the model. A vocabulary is megabytes that no plan looks into, and that the header of each
    would be made of: it is counted once, but for what the padding of a header depends on."""
    tokenizer = checkpoint.location / "tokenizer.json"
    if tokenizer.is_file() and tokenizer.stat().st_size > _LARGEST_TOKENIZER:
        why = f"{tokenizer.name} is larger than {size_text(_LARGEST_TOKENIZER)}, which takes seconds to read"
        return describe(checkpoint, with_tokenizer=False), 0, why
    try:
        model_map = describe(checkpoint)
    except ConvertError as error:  # of the tokenizer, or else the same is raised once more
        return describe(checkpoint, with_tokenizer=False), 0, error.what
    lists = {key: value for key, value in model_map.metadata.items() if key.startswith(_VOCABULARY) and _is_list(value)}
    if not lists:
        return model_map, 0, None
    n_bytes = sum(key_value_bytes(key, value) for key, value in lists.items())
    least = key_value_bytes(_VOCABULARY, GGUFValue("", GGUFValueType.STRING))
    n_padding = (n_bytes - least) % GGUF_DEFAULT_ALIGNMENT
    others = {key: value for key, value in model_map.metadata.items() if key not in lists}
    others[_VOCABULARY] = GGUFValue(" " * n_padding, GGUFValueType.STRING)
    return replace(model_map, metadata=others), n_bytes - least - n_padding, None


def _is_list(value: GGUFValue) -> bool:
    return value.type is GGUFValueType.ARRAY and len(value.value) > 0


def refuse_directory(checkpoint: Checkpoint) -> None:
    """Raises ConvertError where the architecture's data file says that no directory is made of it."""
    from bitwright.converter.architectures.architecture import known_architecture

    architecture = known_architecture(checkpoint.config)
    if architecture is not None and (why := architecture.without.get("directory")) is not None:
        raise ConvertError(
            f"no directory is made of the architecture {architecture.name!r}: {why}",
            str(checkpoint.location),
            "choose a profile whose target is a GGUF",
        )


def _formats(plan: Plan) -> tuple[str, ...]:
    """Of the matrices in the layers, the most frequent first."""
    weights: Counter[str] = Counter()
    for row in plan.tensors:
        if row.tensor.quantizable and row.tensor.layer is not None and row.tensor.role is not Role.OTHER:
            weights[row.format] += row.tensor.n_weights
    return tuple(name for name, _ in weights.most_common())
