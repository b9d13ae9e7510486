"""What an artifact can be, and what is known of one before it is begun.

The pipeline's stages are the same for a GGUF and for a safetensors directory; what differs is behind the seam Target.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from calibration.control import ShouldStop
from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.progress import Progress
from converter.report import group_rows
from converter.verify import TensorError
from profiles.evidence import Evidence
from profiles.plan import Plan
from profiles.schema import QuantizationProfile
from profiles.vocabulary import ModelMap

if TYPE_CHECKING:
    from calibration.arithmetic import Arithmetic
    from calibration.weights import WeightSource


class Entry(Protocol):
    """What is written in one go, and is finished or not: a tensor, or the tensors of a module."""

    @property
    def name(self) -> str: ...
    @property
    def n_bytes(self) -> int: ...


class Layout(Protocol):
    """One file, known to the byte; offsets: where the data of each entry starts, up to the next one or to the end."""

    @property
    def file_name(self) -> str: ...
    @property
    def header(self) -> bytes: ...
    @property
    def tensors(self) -> "tuple[Entry, ...]": ...
    @property
    def offsets(self) -> tuple[int, ...]: ...
    @property
    def n_bytes(self) -> int: ...


@dataclass(frozen=True)
class Surveyed:
    """What headers say: the job with its paths and its goal decided, and the model. target: what the artifact is.
    notes: what was decided in the user's place and should be said."""

    job: Job
    checkpoint: Checkpoint
    model_map: ModelMap
    target: "Target"
    notes: tuple[str, ...]

    @property
    def feeds_back(self) -> bool:
        """Whether the second moments of the inputs have to be collected, as far as it is known."""
        return self.job.error_feedback


@dataclass(frozen=True)
class Prepared(Surveyed):
    """Everything that is known before the artifact is begun. importance: the identity of what the encoders will use,
    None when no format asks for it."""

    plan: Plan
    importance: ImportanceMatrix | None

    @property
    def feeds_back(self) -> bool:
        return self.plan.error_feedback

    def layouts(self, importance: ImportanceMatrix | None) -> list[Layout]:
        """The artifact's files; equally long for the planned identity of the importance and for the final one."""
        return self.target.layouts(self, self.plan, importance)

    @property
    def file_bytes(self) -> int:
        return sum(layout.n_bytes for layout in self.layouts(self.importance))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: what `--dry-run --json` prints."""
        return {
            "model": self.checkpoint.model_id,
            "revision": self.checkpoint.revision,
            "profile": self.plan.profile,
            "plan_sha256": self.plan.digest(),
            "output": str(self.job.output),
            "bytes": self.file_bytes,
            "bits_per_weight": self.plan.bits_per_weight,
            "predicted_kld": self.plan.predicted_kld,
            "budget": asdict(self.plan.spent) if self.plan.spent else None,
            "groups": group_rows(self.plan),
            "notes": list(self.notes),
            "tensors": self.plan.rows(),
        }


@dataclass(frozen=True)
class Adapted:
    """A job after its model has been looked at: prepared has the plan that is executed, of the weights that are
    encoded; importance: of the inputs of these. found: what the target reports of that. notes: what should be said."""

    prepared: Prepared
    importance: ImportanceMatrix | None
    found: Any
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """The artifact as something to run: its weights under the checkpoint's names, decoded; arithmetic: how products
    with them are computed, None for as they are; artifact: what a runtime loads, a GGUF's first file or a directory;
    unreadable: why the runtime that is here does not read it, None where it should."""

    weights: "WeightSource"
    arithmetic: "Arithmetic | None" = None
    artifact: Path | None = None
    unreadable: str | None = None

    @property
    def runtime(self) -> Literal["llama.cpp", "transformers"]:
        """What the artifact is made for, or what stands in for it here: directories are vLLM's."""
        return "transformers" if self.artifact is not None and self.artifact.is_dir() else "llama.cpp"

    @property
    def gguf(self) -> Path | None:
        return self.artifact if self.runtime == "llama.cpp" else None


class Target(Protocol):
    """One kind of artifact. is_directory: whether it is one, not a file or several."""

    is_directory: bool

    def located(self, job: Job, checkpoint: Checkpoint, model_map: ModelMap) -> Job:
        """The job with its paths decided. Raises ConvertError for options that this kind of artifact has no use for."""

    def plan(self, surveyed: Surveyed, evidence: Evidence | None, importance: ImportanceMatrix | None) -> Plan: ...

    def plan_of(self, profile: QuantizationProfile, surveyed: Surveyed) -> Plan:
        """By another profile, which decides by its rules alone."""

    def notes(self, job: Job, plan: Plan) -> list[str]:
        """What a plan leaves open, or departs from."""

    def needs_statistics(self, job: Job, plan: Plan) -> bool:
        """Whether something about the inputs of the matrices has to be known to encode the plan."""

    def reads_text_later(self, job: Job, plan: Plan) -> bool:
        """Whether `adapt` runs the model over the calibration text, even where an importance matrix is given."""

    def layouts(self, surveyed: Surveyed, plan: Plan, importance: ImportanceMatrix | None) -> list[Layout]: ...

    def outputs(self, job: Job, layouts: Sequence[Layout]) -> list[Path]:
        """What must not be there before; without layouts, anything that may be written."""

    def partial_files(self, job: Job, layouts: list[Layout]) -> list[Path]:
        """Where the files grow until they are whole."""

    def calibrate(
        self, prepared: Surveyed, work_dir: Path, progress: Progress, should_stop: ShouldStop
    ) -> ImportanceMatrix:
        """What running the model over the calibration text shows. It stays in the work directory."""

    def adapt(
        self,
        prepared: Prepared,
        importance: ImportanceMatrix | None,
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> Adapted:
        """Plan and weights as they are encoded: what was found stays in the work directory."""

    def adapted_before(self, prepared: Prepared, progress: Progress) -> Prepared | None:
        """What `adapt` has made of a finished job; None where that is lost."""

    def write(
        self,
        adapted: Adapted,
        work_dir: Path,
        progress: Progress,
        should_stop: ShouldStop,
    ) -> list[Path]:
        """Encode and write what is not there yet; returns all files of the artifact, those with the weights first."""

    def verify(
        self, adapted: Adapted, paths: list[Path], progress: Progress
    ) -> tuple[list[TensorError], dict[str, Any]]:
        """The error of every tensor as it can be read, and what else the report has of this kind of artifact."""

    def complete(self, adapted: Adapted, paths: list[Path]) -> list[Path]:
        """Give the verified artifact its name; returns its files as `write` does."""

    def hashes(self, adapted: Adapted, paths: list[Path], work_dir: Path) -> dict[Path, str]:
        """SHA-256 of every file of the artifact, once it has its name. Raises ConvertError for a file that is not, to
        the byte, what the plan and the journal of this job say: then another one describes what is there."""

    def candidate(self, adapted: Adapted, paths: list[Path], work_dir: Path) -> Candidate: ...

    def uniform_sizes(self, surveyed: Surveyed) -> list[dict[str, Any]]:
        """Bytes of tensor data of the model in each format throughout, see converter.breakdown."""

    def weight_files(self, paths: list[Path]) -> list[Path]:
        """Those of the artifact's files that hold weights: its size."""
