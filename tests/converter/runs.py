"""Runs for the tests of the stages: a small model, in a work directory of its own."""

from pathlib import Path
from typing import Any

from bitwright.calibration.control import ShouldStop, never
from bitwright.converter.artifact.run import Run
from bitwright.converter.job.job import Job
from bitwright.converter.job.progress import Progress
from bitwright.converter.model.model_map import describe
from bitwright.converter.source.open import open_checkpoint
from bitwright.profiles.reading.schema import load_profile


def run_of(model: Path, work_dir: Path, should_stop: ShouldStop = never, **options: Any) -> Run:
    """options: of the Job."""
    work_dir.mkdir(exist_ok=True)
    checkpoint = open_checkpoint(str(model))
    job = Job(str(model), load_profile("uniform-8bit"), **{"device": "cpu", "threads": 2} | options)
    output = work_dir / "model.gguf"
    return Run(job, output, work_dir, checkpoint, describe(checkpoint), Progress(quiet=True), should_stop)
