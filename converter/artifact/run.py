"""A run: a job that is being done, with everything that was decided before its first stage."""

from dataclasses import dataclass
from pathlib import Path

from bitwright.calibration.control import PassControl, ShouldStop
from bitwright.converter.job.cache import SourceCache
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.source.checkpoint import Checkpoint
from bitwright.profiles.vocabulary import ModelMap


@dataclass(frozen=True)
class EarlierArtifact:
    """An artifact of the same source that is done. files: its own; journal: what was written into them."""

    files: tuple[Path, ...]
    journal: Path


@dataclass(frozen=True)
class Run:
    """What every stage knows: `stage(run, what_it_needs) -> what_it_makes`.

    output: the artifact's path, decided. work_dir: where the stages leave their results, decided; it exists when the
    first stage that writes runs. checkpoint, model_map: the source, described. progress: where stages say what they do.
    should_stop: asked between steps; a stage that hears True saves what it has and raises Interrupted. notes: what was
    decided in the user's place and should be said. earlier: artifacts whose encoded tensors may be copied where they
    are the same.
    """

    job: Job
    output: Path
    work_dir: Path
    checkpoint: Checkpoint
    model_map: ModelMap
    progress: Progress
    should_stop: ShouldStop
    notes: tuple[str, ...] = ()
    earlier: tuple[EarlierArtifact, ...] = ()

    @property
    def cache(self) -> SourceCache:
        """Of what is measured of the source."""
        return SourceCache.of_job(self.job, self.checkpoint, self.progress)

    def control(self, name: str) -> PassControl:
        """Of a pass over the model, whose checkpoints are in a directory of that name in the work directory."""
        return PassControl(self.work_dir / name, self.progress, self.should_stop)
