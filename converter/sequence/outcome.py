"""What tuning has done for the layers of an artifact, as its journal has it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.formats.files.journal import read_lines
from bitwright.profiles.planning.plan import Plan

REMARK = "tuning"
"""The key of an outcome among a tensor's remarks in the journal."""


@dataclass(frozen=True)
class OutcomeOfTuning:
    """before, after: the mean squared difference of a layer's outputs from the source's, on held-out samples; kept: it
    fell, and the layer is stored as it was tuned."""

    before: float
    after: float
    kept: bool

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def tuning_report(run: Run, plan: Plan) -> dict[str, Any] | None:
    """What the report has of it; None for a job without tuning.

    layers, kept: how many; tensors: those that were tuned, in all layers; ratio: the geometric mean of `after` over
    `before` where it was kept, None without any.
    """
    if not run.job.tune:
        return None
    layers = {planned.tensor.name: planned.tensor.layer for planned in plan.tensors}
    tuned = {e["tensor"]: OutcomeOfTuning(**e[REMARK]) for e in read_lines(run.work_dir / JOURNAL) if REMARK in e}
    outcomes = {layers[name]: outcome for name, outcome in tuned.items()}
    ratios = [outcome.after / outcome.before for outcome in outcomes.values() if outcome.kept and outcome.before]
    mean = float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-30))))) if ratios else None
    kept = sum(outcome.kept for outcome in outcomes.values())
    return {"layers": len(outcomes), "tensors": len(tuned), "kept": kept, "ratio": mean}
