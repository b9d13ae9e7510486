"""What is known of a conversion before it runs, from headers alone."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from calibration.importance import ImportanceMatrix
from converter.checkpoint import Checkpoint
from converter.job import Job
from converter.report import group_rows
from profiles.plan import Plan
from profiles.vocabulary import ModelMap

if TYPE_CHECKING:
    from converter.target import Layout, Target


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

    def layouts(self, importance: ImportanceMatrix | None) -> "list[Layout]":
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
            "tensors": self.plan.rows(),
        }
