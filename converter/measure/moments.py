"""The second moments of a run's inputs: whether they are collected, where they are, and what they are for."""

from pathlib import Path

from bitwright.converter.artifact.feedback import Feedback
from bitwright.converter.artifact.run import Run
from bitwright.converter.measure.calibrate import MOMENTS
from bitwright.converter.smoothing.view import foldings_of
from bitwright.profiles.planning.plan import Plan


def collects_moments(run: Run, plan: Plan | None) -> bool:
    """Whether second moments are collected with the importance; before there is a plan, as far as it is known. Those of
    sequential inputs are collected while the layers are encoded."""
    wanted = run.job.feedback if plan is None else plan.error_feedback
    return wanted is not None and not run.job.in_sequence


def moments_dir(run: Run, plan: Plan | None) -> Path | None:
    """Where second moments are collected until the tensors are encoded; None where they are not wanted."""
    return run.work_dir / MOMENTS if collects_moments(run, plan) else None


def open_feedback(run: Run, plan: Plan) -> Feedback | None:
    """What the tensors of a plan with error feedback are encoded with."""
    level = plan.error_feedback
    return (
        None if level is None else Feedback(run.work_dir / MOMENTS, level, run.job.effort, foldings_of(run.checkpoint))
    )
