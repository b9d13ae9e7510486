"""The second moments of a run's inputs: whether they are collected, where they are, and what they are for."""

from pathlib import Path

from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.run import Run
from bitwright.converter.measure.calibrate import MOMENTS
from bitwright.converter.measure.statistics_directory import given_moments
from bitwright.converter.source.smoothed import foldings_of
from bitwright.profiles.planning.plan import Plan


def collects_moments(run: Run, plan: Plan | None) -> bool:
    """Whether second moments are collected with the importance; before there is a plan, as far as it is known. Those of
    sequential inputs are collected while the layers are encoded; others may be given."""
    wanted = run.job.feedback if plan is None else plan.error_feedback
    return wanted is not None and not run.job.in_sequence and given_moments(run.job) is None


def moments_dir(run: Run, plan: Plan | None) -> Path | None:
    """Where second moments are collected until the tensors are encoded; None where they are not wanted."""
    return run.work_dir / MOMENTS if collects_moments(run, plan) else None


def open_feedback(run: Run, plan: Plan) -> Feedback | None:
    """What the tensors of a plan with error feedback are encoded with."""
    level = plan.error_feedback
    if level is None:
        return None
    directory = given_moments(run.job) or run.work_dir / MOMENTS
    return Feedback(directory, level, run.job.effort, foldings_of(run.checkpoint))
