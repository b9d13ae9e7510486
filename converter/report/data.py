"""The report of a conversion: what report.json holds, as docs/report.md describes it.

Field names are the keys. A report of an earlier version may lack keys that may be null; keys that no field has, as a
later version may write, are ignored: what rewrites a report (split, publish) writes only what is known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from bitwright.calibration.evaluation.coherence import Problem
from bitwright.calibration.evaluation.quality import QualityReport
from bitwright.calibration.statistics.activations import InputFigures
from bitwright.converter.artifact.feedback import Outcome
from bitwright.converter.artifact.grades import Agreeing, Grade, TextGrade
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.gguf.protect import Trial
from bitwright.converter.job.spelling import profile_file
from bitwright.converter.smoothing.search import SmoothedGroup
from bitwright.formats.typed import ABSENT, Absent, from_plain, to_plain
from bitwright.profiles.planning.precision import PrecisionChoice
from bitwright.profiles.planning.summary import TensorGroup


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A file that was measured of the model. path: where it was on the machine of the conversion; in a published report
    there is none."""

    file: str
    path: str | Absent = ABSENT
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Calibration(Manifest):
    """The importance matrix and the text it was computed from, None for what the file does not say. computed: by this
    job; seed, split and dtype, in which the model was computed, are known only then."""

    computed: bool
    model: str | None
    corpus: str | None
    corpus_sha256: str | None
    samples: int | None
    sequence_length: int | None
    seed: int | None
    split: str | None
    dtype: str | None


@dataclass(frozen=True)
class Source:
    """bytes: of the checkpoint's tensors. card: what the source states of license, language, tags and task."""

    bytes: int
    card: dict[str, object]


@dataclass(frozen=True)
class ArtifactFile:
    path: str
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        return Path(self.path).name


@dataclass(frozen=True)
class Artifact:
    """kind: what it is. bytes: of the files that hold weights. files: all, those with the weights first."""

    kind: Literal["gguf", "safetensors"]
    bytes: int
    files: tuple[ArtifactFile, ...]

    @property
    def is_directory(self) -> bool:
        return self.kind == "safetensors"

    @property
    def first(self) -> ArtifactFile:
        return self.files[0]

    @property
    def by_name(self) -> dict[str, ArtifactFile]:
        """The files by their paths in the artifact's directory, wherever that lay. Raises ValueError for a file outside
        of it."""
        root = Path(self.first.path).parent  # the files with weights come first, and lie in no folder
        return {Path(file.path).relative_to(root).as_posix(): file for file in self.files}

    @property
    def location(self) -> Path:
        """The directory, or the first file of a GGUF."""
        first = Path(self.first.path)
        return first.parent if self.is_directory else first


@dataclass(frozen=True)
class Layer:
    """A layer, or all that lies outside of them (layer None). formats: the share of its matrices' weights in each.
    relative_error, weighted_error: means over the weights of the matrices; what is never quantized does not count."""

    layer: int | None
    weights: int
    bytes: int
    bits_per_weight: float
    share: float
    formats: dict[str, float]
    relative_error: float
    weighted_error: float


@dataclass(frozen=True)
class UniformSize:
    """Bytes of tensor data of the model in one format throughout. fits: the share of weights that it divides."""

    format: str
    bytes: int
    fits: float


@dataclass(frozen=True)
class CoveredWeight:
    """A super weight and what it is decoded to."""

    tensor: str
    matrix: int
    row: int
    column: int
    value: float
    decoded: float
    relative_error: float
    within: bool


@dataclass(frozen=True)
class Coverage:
    """Of the confirmed super weights those that are decoded within the tolerance, a share of their value."""

    confirmed: int
    within: int
    tolerance: float
    weights: tuple[CoveredWeight, ...]


@dataclass(frozen=True)
class Protected:
    """What was done for the super weights of a tensor; in directories nothing but exclusion is, and nothing tried."""

    tensor: str
    action: str | None
    why: str
    format: str | Absent | None = ABSENT
    factors: tuple[tuple[int, int, float], ...] | Absent = ABSENT
    trials: tuple[Trial, ...] | Absent = ABSENT


@dataclass(frozen=True)
class Feedback:
    """Error feedback by matrix, and the means over those that were measured, None without any."""

    matrices: int
    kept: int
    plain_error: float | None
    feedback_error: float | None
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class TunedLayers:
    """layers, kept: how many were tuned, and are stored so. tensors: how many were tuned, in all layers. ratio: the
    geometric mean of what is left of the squared output error of layers on held-out samples, None without any."""

    layers: int
    tensors: int
    kept: int
    ratio: float | None


@dataclass(frozen=True)
class Smoothing:
    """alpha: as it was asked for. left: GGUF tensors whose inputs nothing makes up for."""

    alpha: float | Literal["auto"]
    groups: tuple[SmoothedGroup, ...]
    left: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TensorInputs(InputFigures):
    """The inputs of a tensor in a few numbers."""

    tensor: str


@dataclass(frozen=True)
class StoredScale:
    """A scale of an FP8 cache."""

    tensor: str
    layer: int
    scale: float
    absmax: float
    outlier_ratio: float


@dataclass(frozen=True)
class Answer:
    """To a fixed prompt: the artifact's text, and the source's. agreed: tokens before the first that the source would
    not have chosen, agreed_text what they say. Entropies and surprises in nats a token, None for an empty text."""

    prompt: str
    text: str
    agreed_text: str
    source_text: str
    tokens: int
    agreed: int
    entropy: float | None
    source_entropy: float | None
    surprise: float | None
    source_surprise: float | None
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Coherence:
    """What the artifact writes. runtime_note: why it was not llama.cpp ("unavailable") or how that "failed", and what
    was "shortened" for the model's size, the "source"'s answers, too."""

    verdict: TextGrade
    runtime: str
    runtime_note: dict[str, str]
    prompts: tuple[Answer, ...]
    greedy_agreement: float
    greedy_common_prefix: float
    greedy_prompts: int
    greedy_tokens: int
    held_out_not_finite: int
    held_out_text: str

    @property
    def whole(self) -> int:
        """Answers that hold together."""
        return sum(not answer.problems for answer in self.prompts)


@dataclass(frozen=True)
class Cut:
    """A text that the runtime cuts into other tokens: the first that differ. known: where it is known to."""

    text: str
    known: bool
    source: tuple[str | None, ...]
    runtime: tuple[str | None, ...]


@dataclass(frozen=True)
class Ends:
    """Tokens that end a generation for one of source and runtime alone, see judge.agreement.compare_ends."""

    missing: tuple[str, ...]
    sayable: bool
    ordinary: tuple[str, ...]
    special: tuple[str, ...]


@dataclass(frozen=True)
class Logits:
    """The runtime's predictions beside our evaluation's, see judge.agreement.compare_logits."""

    mean_kld: float | None
    max_kld: float | None
    relative_error: float | None
    top1_agreement: float
    tokens: int
    scored: int


@dataclass(frozen=True)
class Agreement:
    """What the true runtime computes beside our evaluation. lacking: the runtime, or the bytes of memory, that it would
    take to check the rest."""

    verdict: Agreeing | None
    runtime: str
    reasons: tuple[str, ...]
    texts: int
    cuts: tuple[Cut, ...]
    ends: Ends | None
    logits: Logits | None
    unchecked: tuple[str, ...]
    lacking: int | str | None


@dataclass(frozen=True)
class Tasks:
    """results: task -> metric -> value. limit: examples of each task, None for all."""

    tasks: tuple[str, ...]
    limit: int | None
    results: dict[str, dict[str, float]]


@dataclass(frozen=True)
class OnMachine:
    """What was predicted of the artifact on a machine, before it was made: see converter/advice. low, high: tokens a
    second, is_class: the ends of a class, and no range; basis: what stands behind it. shares: group -> its part of a
    step."""

    hardware: str
    runtime: str
    context: int
    batch: int
    kv: str
    total_bytes: int
    memory: int
    longest_context: int
    low: float
    high: float
    is_class: bool
    basis: str
    shares: dict[str, float]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """See docs/report.md for each key. smoothing, activations, precision, kv_cache: of directories alone. machine: of a
    conversion whose profile was chosen for one."""

    model: str
    revision: str | None
    profile: str
    plan_sha256: str
    tool: str
    recipe: dict[str, str | int | float]
    arguments: tuple[str, ...]
    calibration: Calibration | None
    sensitivity: Manifest | None
    reads_text_later: bool
    source: Source
    artifact: Artifact
    compression_ratio: float
    groups: tuple[TensorGroup, ...]
    errors: tuple[TensorError, ...]
    super_weight_coverage: Coverage | None
    protection: tuple[Protected, ...]
    feedback: Feedback | None
    tuning: TunedLayers | Absent = ABSENT
    smoothing: Smoothing | Absent | None = ABSENT
    activations: tuple[TensorInputs, ...] | Absent | None = ABSENT
    precision: tuple[PrecisionChoice, ...] | Absent = ABSENT
    kv_cache: tuple[StoredScale, ...] | Absent = ABSENT
    machine: OnMachine | Absent = ABSENT
    layers: tuple[Layer, ...]
    uniform: tuple[UniformSize, ...]
    predicted_kld: float | None
    target_kld: float | None
    quality: QualityReport | None
    coherence: Coherence | None
    agreement: Agreement | None
    tasks: Tasks | None
    verdict: Grade | None
    better: str | None
    seconds: dict[str, float]
    path: str | Absent = ABSENT
    page: str

    def __post_init__(self) -> None:
        """Raises ValueError for what no conversion leaves."""
        if not (self.artifact.files and self.errors and self.n_weights > 0):
            raise ValueError("a report is of a file, a tensor and a weight at least")
        if not isinstance(self.recipe.get("profile_toml"), str):
            raise ValueError("the recipe has no profile")
        names = self.artifact.by_name
        if len(names) < len(self.artifact.files) or any(".." in Path(name).parts for name in names):
            raise ValueError("a file is listed twice, or lies outside of the artifact's directory")
        measured = [manifest.file for manifest in (self.calibration, self.sensitivity) if manifest is not None]
        for file in (profile_file(self.profile), *measured):
            name = self._name_of(file)
            if Path(name).name != name or name == "..":
                raise ValueError(f"{file!r} is no name of a file")

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What to_dict has made this of. Raises ValueError for anything else."""
        report: Self = from_plain(cls, plain, "the report")
        return report

    @property
    def n_weights(self) -> int:
        return sum(group.weights for group in self.groups)

    @property
    def bits_per_weight(self) -> float:
        return sum(group.bytes for group in self.groups) * 8 / self.n_weights

    @property
    def largest_error(self) -> TensorError:
        return max(self.errors, key=lambda error: error.weighted_error)

    @property
    def not_judged(self) -> bool:
        """Whether the system kept ending the runtime that a part of the verdict needs."""
        return self.quality is not None and None in (self.coherence, self.agreement)

    def _name_of(self, file: str) -> str:
        """The name of a file that was measured of the model."""
        return file

    @property
    def promises(self) -> dict[str, float]:
        """What was said of the mean KL divergence before it was measured."""
        said = {"predicted": self.predicted_kld, "asked for": self.target_kld}
        return {what: kld for what, kld in said.items() if kld is not None}


@dataclass(frozen=True, kw_only=True)
class PublishedReport(Report):
    """As it lies in a repository: paths are relative to it. base_model: the source's id on the Hub, None for a local
    checkpoint. recipe_directory: where the report and what made the artifact are."""

    base_model: str | None
    recipe_directory: str

    def _name_of(self, file: str) -> str:
        return file.removeprefix(f"{self.recipe_directory}/")

    @property
    def source_model(self) -> str:
        return self.base_model or self.model

    @property
    def name(self) -> str:
        """The first file's; a directory goes by its profile, for its files are named alike in all of them."""
        return self.profile if self.artifact.is_directory else self.artifact.first.path

    @property
    def identity(self) -> list[str | int | float | None]:
        """What makes an artifact another one, not a newer state of the same."""
        return [self.recipe.get(key) for key in ("plan_sha256", "profile", "overrides", "source.model")]

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the artifact's files by their paths."""
        return {file.path: file.sha256 for file in self.artifact.files}
