"""What tuning has done for the layers of an artifact, as its journal has it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bitwright.converter.artifact.run import Run
from bitwright.converter.artifact.writer import JOURNAL
from bitwright.formats.files.journal import read_lines

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


def tuning_report(run: Run) -> dict[str, Any] | None:
    """What the report has of it; None for a job without tuning.

    layers, kept: how many; ratio: the geometric mean of `after` over `before` where it was kept, None without any.
    """
    if not run.job.tune:
        return None
    layers = {tensor.name: tensor.layer for tensor in run.model_map.tensors}
    outcomes = {
        layers[entry["tensor"]]: OutcomeOfTuning(**entry[REMARK])
        for entry in read_lines(run.work_dir / JOURNAL)
        if REMARK in entry
    }
    ratios = [outcome.after / outcome.before for outcome in outcomes.values() if outcome.kept and outcome.before]
    mean = float(np.exp(np.mean(np.log(np.maximum(ratios, 1e-30))))) if ratios else None
    return {"layers": len(outcomes), "kept": sum(outcome.kept for outcome in outcomes.values()), "ratio": mean}
