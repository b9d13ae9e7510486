"""What an artifact can be, and what is known of one before it is begun.

The pipeline's stages are the same for a GGUF and for a safetensors directory; what differs is behind the seam Target.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from bitwright.calibration.statistics.importance import ImportanceMatrix
from bitwright.converter.artifact.candidate import Candidate
from bitwright.converter.artifact.layout import Files
from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.tensor_errors import TensorError
from bitwright.converter.artifact.writer import PlanEncoder
from bitwright.converter.job.job import Job
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.formats.typed import to_plain
from bitwright.profiles.evidence import Evidence
from bitwright.profiles.planning.plan import Plan
from bitwright.profiles.planning.summary import tensor_groups
from bitwright.profiles.vocabulary import ModelMap

P = TypeVar("P", bound=Plan)
"""The plans of one kind of artifact."""
F = TypeVar("F")
"""What one kind of artifact finds out when it adapts a plan, and needs later."""


class Located(NamedTuple):
    """The artifact's path, decided; notes: what of the model this kind of artifact leaves out or reads otherwise."""

    output: Path
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Planned(Generic[P]):
    """A plan with what follows from it. notes: what it leaves open, or departs from. needs_statistics: something about
    the inputs of the matrices has to be known to encode it. reads_text_later: `adapt` or `write` need the model run
    over the calibration text, even where an importance matrix is given."""

    plan: P
    notes: tuple[str, ...]
    needs_statistics: bool
    reads_text_later: bool


@dataclass(frozen=True)
class Prepared(Generic[P]):
    """Everything that is known before the artifact is begun. importance: the identity of what the encoders will use,
    None when no format asks for it. notes: those of the run, and of the plan. reads_text_later: as of Planned."""

    run: Run
    target: "Target[P, Any]"
    plan: P
    importance: ImportanceMatrix | None
    notes: tuple[str, ...]
    reads_text_later: bool

    @property
    def files(self) -> Files:
        """The artifact's files; equally long for the planned identity of the importance and for the final one."""
        return self.target.files(self.run, self.plan, self.importance)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: what `--dry-run --json` prints."""
        return {
            "model": self.run.checkpoint.model_id,
            "revision": self.run.checkpoint.revision,
            "profile": self.plan.profile,
            "plan_sha256": self.plan.digest(),
            "output": str(self.run.output),
            "bytes": self.files.n_bytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "predicted_kld": self.plan.predicted_kld,
            "budget": asdict(self.plan.spent) if self.plan.spent else None,
            "groups": to_plain(tensor_groups(self.plan)),
            "notes": list(self.notes),
            "tensors": self.plan.rows(),
        }


@dataclass(frozen=True)
class Adapted(Generic[P, F]):
    """A job after its model has been looked at. prepared: the plan that is executed, the weights that are encoded, and
    the importance of the inputs of these. decisions: what protects super weights, one a tensor. findings: what the
    target needs later. report: what else the report has of it. notes: what should be said."""

    prepared: Prepared[P]
    decisions: tuple[dict[str, Any], ...]
    findings: F
    report: dict[str, Any]
    notes: tuple[str, ...] = ()


Encoders = Callable[[Adapted[Any, Any]], AbstractContextManager[PlanEncoder[Any]]]
"""As Target.encoder."""


class Target(Protocol[P, F]):
    """One kind of artifact. What a method has done when it raises Interrupted is there for a later call."""

    def describe(self, job: Job, checkpoint: Checkpoint) -> ModelMap:
        """What the checkpoint is made of, as far as this kind of artifact asks; see model.model_map.describe."""

    def located(self, job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Located:
        """Raises ConvertError for options that this kind of artifact has no use for."""

    def plan(self, run: Run, evidence: Evidence | None, importance: ImportanceMatrix | None) -> Planned[P]: ...

    def files(self, run: Run, plan: P | None = None, importance: ImportanceMatrix | None = None) -> Files: ...

    def calibrate(self, run: Run, plan: P | None) -> ImportanceMatrix:
        """What running the model over the calibration text shows. It stays in the work directory."""

    def adapt(self, prepared: Prepared[P]) -> Adapted[P, F]:
        """Plan and weights as they are encoded. What is found out stays in the work directory."""

    def adapted_before(self, prepared: Prepared[P]) -> Prepared[P] | None:
        """What `adapt` has made of a finished job; None where that is lost."""

    def encoder(self, adapted: Adapted[P, F]) -> AbstractContextManager[PlanEncoder[Any]]:
        """What encodes the rows of the plan, ready as long as the `with` block."""

    def write(self, adapted: Adapted[P, F], encoder: PlanEncoder[Any]) -> list[Path]:
        """Encode and write what is not there yet; returns all files of the artifact, those with the weights first."""

    def verify(self, adapted: Adapted[P, F], paths: list[Path]) -> tuple[list[TensorError], dict[str, Any] | None]:
        """The error of every tensor as it can be read, and how many super weights have come out right, None where
        nobody has looked for them."""

    def complete(self, adapted: Adapted[P, F], paths: list[Path]) -> list[Path]:
        """Give the verified artifact its name; returns its files as `write` does."""

    def hashes(self, adapted: Adapted[P, F], paths: list[Path]) -> dict[Path, str]:
        """SHA-256 of every file of the artifact, once it has its name. Raises ConvertError for a file that is not, to
        the byte, what the plan and the journal of this job say: then another one describes what is there."""

    def candidate(self, adapted: Adapted[P, F], paths: list[Path]) -> Candidate: ...

    def uniform_sizes(self, prepared: Prepared[P]) -> list[dict[str, Any]]:
        """Bytes of tensor data of the model in each format throughout, see converter.report.data.UniformSize."""
